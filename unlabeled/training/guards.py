"""What looks after a run: signals and time limits that end it whole, spikes that would spoil it, standstill."""

import atexit
import faulthandler
import math
import multiprocessing
import os
import re
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from unlabeled.errors import Stopped, UserError
from unlabeled.planning import main_memory_bytes
from unlabeled.runtime import signals
from unlabeled.runtime.checkpoints import find_newest_checkpoint

TIME_IS_UP = 255  # where a signal's number would be
LAUNCHER_IS_GONE = 254
# What the parent of a data-loader worker raises when somebody else has ended the worker.
KILLED_WORKER = re.compile(r"DataLoader worker \(pid \d+\) is killed by signal: (Killed|Terminated)")
STARTED = time.monotonic()
SKIPS = 10  # steps that may be skipped for their gradients among the last WINDOW
WINDOW = 1000
REMEDY = "lower learning_rate or max_grad_norm and set another output_dir"


def median_grad_norm(history: list[dict], key: str, last: int) -> float:
    """The median of the last values in the history, infinite while there are fewer than five."""
    found = (entry[key] for entry in reversed(history) if math.isfinite(entry.get(key, math.nan)))
    values = list(islice(found, last))  # asked at every step, so it must not grow with the history
    return statistics.median(values) if len(values) >= 5 else math.inf


def stop_with_checkpoint(args, what: str, remedy: str = REMEDY) -> None:
    """Stop a run whose weights are no longer worth saving.

    Raises:
        UserError: always; it names the last good checkpoint.
    """
    last = find_newest_checkpoint(args.output_dir, report=lambda line: None)
    raise UserError(f"{what}; the last good checkpoint is {last or 'none'}: {remedy}")


@contextmanager
def user_error_on_out_of_memory(args, by_micro_batch: dict[int, int]) -> Iterator[None]:
    """Say in one sentence what to do where memory runs out; `by_micro_batch` is the plan's estimate in bytes.

    Raises:
        UserError: it did.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in said:
            raise
        size, there = args.per_device_train_batch_size, device_memory(args.device)
        smaller = {micro: needed for micro, needed in by_micro_batch.items() if micro < size}
        fitting = [micro for micro, needed in smaller.items() if needed <= 0.9 * there]
        remedy = "shorten max_length, set activation_checkpointing, or let ZeRO share out the optimizer"
        if fitting:
            remedy = (
                f"lower per_device_train_batch_size from {size} to {max(fitting)}, which takes about "
                f"{smaller[max(fitting)] / 1e9:.1f} of {there / 1e9:.1f} GB; the batch stays what it is"
            )
        raise UserError(f"memory ran out ({said.splitlines()[0][:120]}): {remedy}") from error


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return main_memory_bytes()


class SpikeGuard(TrainerCallback):
    """Stops a run before it is saved when loss or weights are NaN, or the loss rose by over `loss_spike_threshold`."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        # The loss is that of the weights before the step: it may be finite where what would be saved is not.
        if (control.should_save or state.global_step >= state.max_steps) and not all(
            bool(parameter.isfinite().all()) for parameter in model.parameters()
        ):
            stop_with_checkpoint(args, f"the weights are no longer finite at step {state.global_step}")
        last = state.log_history[-1] if state.log_history else {}
        if "skipped_steps" in last and last["step"] == state.global_step - 1 and not control.should_training_stop:
            control.should_save = False  # weights that have given such gradients may not be good
        if control.should_save:
            control.should_log = True  # `on_log` stops the run before a loss of NaN is saved

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not math.isfinite(metrics.get("eval_loss", 0.0)):
            stop_with_checkpoint(args, f"the held-out loss is {metrics['eval_loss']} after step {state.global_step}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        loss, before = logs["loss"], median_grad_norm(state.log_history[:-1], "loss", last=9)
        if not math.isfinite(loss):
            stop_with_checkpoint(args, f"the loss is {loss} at step {state.global_step}")
        if args.loss_spike_threshold and loss > before + args.loss_spike_threshold:
            what = f"the loss rose from {before:.3f} to {loss:.3f} at step {state.global_step}"
            stop_with_checkpoint(args, what, f"{REMEDY}, or raise loss_spike_threshold")


def is_finite_step(norm: float, args, state) -> bool:
    """Whether gradients of this norm may be used: it is finite, and at most `grad_norm_skip_ratio` times what is usual.

    Usual is the median of the last logged norms. Every checkpoint has them, so that a resumed run decides as an
    uninterrupted one would.
    """
    limit = median_grad_norm(state.log_history, "grad_norm", last=50) * (args.grad_norm_skip_ratio or math.inf)
    return math.isfinite(norm) and norm <= limit


def count_skipped(norm: float, args, state) -> int:
    """Say that a step is left out for the norm of its gradients, and return how many there were.

    Raises:
        UserError: this was one too many, or the third in a row, so that it is the weights and not the text.
    """
    now, before = state.global_step, [entry["step"] for entry in state.log_history if "skipped_steps" in entry]
    recent = sum(step >= now - WINDOW for step in before) + 1
    if recent > SKIPS or before[-2:] == [now - 2, now - 1]:
        which = "the last 3 steps" if recent <= SKIPS else f"{recent} of the last {WINDOW} steps"
        stop_with_checkpoint(
            args, f"the gradients of {which} were not usable, their norm is {norm:.3g} at step {now + 1}"
        )
    if state.is_world_process_zero:
        print(f"step {now + 1:>6,} left out: the norm of its gradients is {norm:.3g}", flush=True)
    return len(before) + 1


@contextmanager
def user_error_on_dead_worker(output_dir: str) -> Iterator[None]:
    """Say in one sentence that a data-loader worker was killed.

    Raises:
        Stopped: it was.
    """
    try:
        yield
    except Exception as error:
        killed = KILLED_WORKER.search(str(_late_error(error)))
        if not killed:
            raise
        last = find_newest_checkpoint(output_dir, report=lambda line: None)
        raise Stopped(
            f"a data-loader worker was ended from outside ({killed[1]}), as the system does when memory runs out; the "
            f"last complete checkpoint is {last or 'none'}, the same command continues, and fewer "
            "dataloader_num_workers need less memory"
        ) from error


def _late_error(error: Exception) -> Exception:
    """The error that torch raises at the end of a worker, where the connection to the worker has broken before."""
    try:
        if isinstance(error, EOFError | ConnectionError):
            time.sleep(1)  # until SIGCHLD, in whose handler torch raises
    except RuntimeError as late:
        return late
    return error


class Preemption(TrainerCallback):
    """After a signal, `max_hours` or the end of the launcher: finish the step, save, stop, all processes at one step.

    `reason` says why, once the processes agree. A second signal, seconds later, ends the process at once.
    """

    def __init__(self, max_hours: float | None):
        self.seconds = max_hours * 3600 if max_hours else math.inf
        self.noticed, self.since = 0, 0.0
        self.reason: str | None = None
        self.handlers, self.group = {}, None

    def on_train_begin(self, args, state, control, **kwargs):
        signals.set_outcome("the same command continues")
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._notice) for number in signals.STOP_SIGNALS}
        if dist.is_initialized() and dist.get_backend() != "gloo":
            self.group = dist.new_group(backend="gloo")  # so that asking costs the accelerators nothing

    def on_train_end(self, args, state, control, **kwargs):
        is_saved = Path(args.output_dir, f"checkpoint-{state.global_step}").is_dir()
        for number, handler in self.handlers.items():
            if self.reason:  # everything is saved, and a launcher may be quick to end the slower processes
                signal.signal(number, lambda number, frame: os._exit(Stopped.STATUS))
            elif is_saved:
                signal.signal(number, handler)
                signals.set_outcome("the same command repeats what follows the last step")
            else:
                signal.signal(number, self._postpone)

    def on_step_end(self, args, state, control, **kwargs):
        self._agree(control)

    def on_evaluate(self, args, state, control, **kwargs):
        self._agree(control)

    def _notice(self, number: int, frame) -> None:
        if self.noticed and time.monotonic() - self.since > signals.REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.noticed, self.since = self.noticed or number, time.monotonic()

    def _postpone(self, number: int, frame) -> None:
        """After the last step, where `save_strategy` has left no checkpoint of it: let the run save its model."""
        if not self.noticed:
            name = signals.describe_signal(number)
            # Not print: the signal may have arrived in the middle of one.
            os.write(2, f"{name}: the last step is in no checkpoint, so the run saves its model first\n".encode())
        self._notice(number, frame)

    def _agree(self, control) -> None:
        if not self.noticed and time.monotonic() - STARTED > self.seconds:
            self.noticed = TIME_IS_UP
        noticed = LAUNCHER_IS_GONE if signals.launcher_is_gone() else self.noticed
        if dist.is_initialized():
            found = torch.tensor([noticed])
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
            noticed = int(found)
        if noticed:
            names = {TIME_IS_UP: "max_hours", LAUNCHER_IS_GONE: "the end of the launcher"}
            self.reason = names.get(noticed) or signal.Signals(noticed).name
            control.should_save = control.should_training_stop = True

    def check(self, args, state) -> None:
        """To be called after training.

        Raises:
            Stopped: it was cut short.
        """
        if self.reason and state.global_step < state.max_steps:
            raise Stopped(
                f"{self.reason} ended the run after step {state.global_step:,} of {state.max_steps:,}; it is saved, "
                "and the same command continues"
            )


def start_worker(initialize: Callable[[int], None] | None, worker: int) -> None:
    """Goes before the `worker_init_fn` of a data loader, so that its processes end with their parent and not before.

    They get the stop signals of a whole process group as well, and the step that is being finished needs them. In
    return they do not outlive the parent, whatever they are doing. `initialize` is the `worker_init_fn`.
    """
    for number in signals.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signals.end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of `tokenizers` do not live on in a fork, which hangs
    if initialize is not None:
        initialize(worker)


def look_after_workers(loader) -> None:
    """Make the workers of a `torch.utils.data.DataLoader` ignore stop signals, and end with this process."""
    loader.worker_init_fn = partial(start_worker, loader.worker_init_fn)
    atexit.unregister(kill_children)  # so that it is there once, and called before the one of multiprocessing
    atexit.register(kill_children)


def kill_children() -> None:
    """End the daemonic children of this process; multiprocessing would send SIGTERM, which they ignore, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise that workers have been killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class Watchdog(TrainerCallback):
    """Ends a process that stands still for longer than `ddp_timeout` seconds, and says where it stands.

    A collective has that limit of its own, and a quarter of it is added so that it speaks first. What is left is mostly
    the loading of data, which nobody else watches. What counts as progress: a micro-batch, a forward pass of an
    evaluation, rows that were read, bytes of a checkpoint that were written. Time in which the watchdog itself did not
    run, as in a suspended machine, does not count.
    """

    def __init__(self):
        self.step = 0
        self._idle = 0.0  # seconds without progress
        self.over = threading.Event()
        self._is_paused = False
        self._folder: str | None = None  # whose files grow
        self._written = 0  # bytes in it when it was looked at last

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)
        self.over.clear()
        threading.Thread(target=self._watch, args=(1.25 * args.ddp_timeout,), name="watchdog", daemon=True).start()

    def on_step_end(self, args, state, control, **kwargs):
        self.step = state.global_step
        self.beat()

    on_substep_end = on_evaluate = on_save = on_step_end

    def beat(self) -> None:
        """Say that something has happened; any thread may."""
        self._idle = 0.0

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """Count each forward pass of the model as progress."""
        # The modules inside as well: sentence-transformers calls `forward` itself, which no hook notices.
        handles = [part.register_forward_hook(lambda *_: self.beat()) for part in (model, *model.children())]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def watching_files(self, folder: str) -> Iterator[None]:
        """Count what is written to a folder as progress."""
        self._folder = folder
        try:
            yield
        finally:
            self._folder = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave it to another process to notice a standstill, which ends this one as well."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False
            self.beat()

    def stop(self) -> None:
        """To be called when training is over, also where it has failed: this process may go on with something else."""
        self.over.set()

    def _watch(self, limit: float) -> None:
        interval = min(limit / 4, 10)
        before = time.monotonic()
        while not self.over.wait(interval):
            now = time.monotonic()
            self._idle += min(now - before, 2 * interval)
            before = now
            if self._is_paused or self._has_written():
                self.beat()
            if self._idle > limit:
                faulthandler.dump_traceback(all_threads=True)
                print(
                    f"stopped: nothing has happened for {limit:.0f} s (ddp_timeout) after step {self.step:,}; the "
                    "lines above say where each thread stands; the same command continues",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(Stopped.STATUS)

    def _has_written(self) -> bool:
        """Whether the folder that is being written to has other bytes than before."""
        if self._folder is None:
            return False
        before, self._written = self._written, folder_bytes(self._folder)
        return self._written != before


def folder_bytes(folder: str) -> int:
    """Bytes of all files below a folder, while others write and delete there."""
    total = 0
    for path in Path(folder).rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
