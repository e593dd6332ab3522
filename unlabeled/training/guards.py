"""What looks after a run: signals and time limits that end it whole, spikes that would spoil it, standstill."""

import faulthandler
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from unlabeled import Stopped, UserError
from unlabeled.budget import main_memory_bytes
from unlabeled.checkpoints import newest_complete

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # of `kill` and Slurm, of Ctrl-C, of `sbatch --signal`
TIME_IS_UP = 255  # where a signal's number would be
AGAIN = (
    5.0  # seconds; a launcher passes Ctrl-C on to processes that had it already, so the second one is not yet a wish
)
STARTED = time.monotonic()
SKIPS = 10  # steps that may be skipped for their gradients among the last WINDOW
WINDOW = 1000
REMEDY = "lower learning_rate or max_grad_norm and set another output_dir"


def usual(history: list[dict], key: str, last: int) -> float:
    """The median of the last values in the history, infinite while there are fewer than five."""
    found = (entry[key] for entry in reversed(history) if math.isfinite(entry.get(key, math.nan)))
    values = list(islice(found, last))  # asked at every step, so it must not grow with the history
    return statistics.median(values) if len(values) >= 5 else math.inf


def give_up(args, what: str, remedy: str = REMEDY) -> None:
    """Stop a run whose weights are no longer worth saving.

    Raises:
        UserError: always; it names the last good checkpoint.
    """
    last = newest_complete(args.output_dir, say=lambda line: None)
    raise UserError(f"{what}; the last good checkpoint is {last or 'none'}: {remedy}")


@contextmanager
def explained_memory(args, by_micro_batch: dict[int, int]) -> Iterator[None]:
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
    """Stops a run before it is saved when its loss or weights are NaN, or its loss rose by over `max_loss_rise`."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        # The loss is that of the weights before the step: it may be finite where what would be saved is not.
        if (control.should_save or state.global_step >= state.max_steps) and not all(
            bool(parameter.isfinite().all()) for parameter in model.parameters()
        ):
            give_up(args, f"the weights are no longer finite at step {state.global_step}")
        last = state.log_history[-1] if state.log_history else {}
        if "skipped_steps" in last and last["step"] == state.global_step - 1 and not control.should_training_stop:
            control.should_save = False  # weights that have given such gradients may not be good

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not math.isfinite(metrics.get("eval_loss", 0.0)):
            give_up(args, f"the held-out loss is {metrics['eval_loss']} after step {state.global_step}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        loss, before = logs["loss"], usual(state.log_history[:-1], "loss", last=9)
        if not math.isfinite(loss):
            give_up(args, f"the loss is {loss} at step {state.global_step}")
        if args.max_loss_rise and loss > before + args.max_loss_rise:
            what = f"the loss rose from {before:.3f} to {loss:.3f} at step {state.global_step}"
            give_up(args, what, f"{REMEDY}, or raise max_loss_rise")


def usable(norm: float, args, state) -> bool:
    """Whether gradients of this norm may be used: it is finite, and at most `max_grad_rise` times what is usual.

    Usual is the median of the last logged norms. Every checkpoint has them, so that a resumed run decides as an
    uninterrupted one would.
    """
    limit = usual(state.log_history, "grad_norm", last=50) * (args.max_grad_rise or math.inf)
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
        give_up(args, f"the gradients of {which} were not usable, their norm is {norm:.3g} at step {now + 1}")
    if state.is_world_process_zero:
        print(f"step {now + 1:>6,} left out: the norm of its gradients is {norm:.3g}", flush=True)
    return len(before) + 1


class Preemption(TrainerCallback):
    """After a signal, or `max_hours`: finish the step, save, stop, on all processes at the same step.

    `reason` says why, once the processes agree. A second signal, seconds later, ends the process at once.
    """

    def __init__(self, max_hours: float | None):
        self.seconds = max_hours * 3600 if max_hours else math.inf
        self.noticed, self.since, self.reason = 0, 0.0, None
        self.handlers, self.group = {}, None

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._notice) for number in SIGNALS}
        if dist.is_initialized() and dist.get_backend() != "gloo":
            self.group = dist.new_group(backend="gloo")  # so that asking costs the accelerators nothing

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.handlers.items():
            # When everything is saved, a launcher may be quick to end the slower processes.
            signal.signal(number, (lambda number, frame: os._exit(Stopped.STATUS)) if self.reason else handler)

    def on_step_end(self, args, state, control, **kwargs):
        self._agree(control)

    def on_evaluate(self, args, state, control, **kwargs):
        self._agree(control)

    def _notice(self, number: int, frame) -> None:
        if self.noticed and time.monotonic() - self.since > AGAIN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.noticed, self.since = self.noticed or number, time.monotonic()

    def _agree(self, control) -> None:
        if not self.noticed and time.monotonic() - STARTED > self.seconds:
            self.noticed = TIME_IS_UP
        noticed = self.noticed
        if dist.is_initialized():
            found = torch.tensor([noticed])
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
            noticed = int(found)
        if noticed:
            self.reason = "max_hours" if noticed == TIME_IS_UP else signal.Signals(noticed).name
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


def leave_signals_to_the_parent(seed: Callable[[int], None], worker: int) -> None:
    """Goes before the `worker_init_fn` of a data loader: its processes get the signals of the whole group as well."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    seed(worker)


class Watchdog(TrainerCallback):
    """Ends a process that stands still for longer than `ddp_timeout` seconds, and says where it stands.

    A collective has that limit of its own, and a quarter of it is added so that it speaks first. What is left is mostly
    the loading of data, which nobody else watches. What counts as progress: a micro-batch, a forward pass of an
    evaluation, rows that were read, bytes of a checkpoint that were written.
    """

    def __init__(self):
        self.step = 0
        self.last = time.monotonic()
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
        self.last = time.monotonic()

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
        while not self.over.wait(min(limit / 4, 10)):
            if self._is_paused or self._has_written():
                self.beat()
            if time.monotonic() - self.last > limit:
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
