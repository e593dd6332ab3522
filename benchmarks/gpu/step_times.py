"""Times the steps of a `Trainer`, and counts compilations and calls that wait for the GPU."""

import contextlib
import statistics
import time
import traceback
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
import transformers.trainer
from transformers import TrainerCallback

from benchmarks.gpu.bench import Bench, compilations, mfu
from unlabeled.planning import count_parameters, training_flops_per_token

ROOT = Path(__file__).resolve().parents[2]
WARM_UP_STEPS = 6  # not timed
WATCHED_STEPS = 8  # the last ones, in which calls that wait for the GPU are counted
STALL_FACTOR = 3  # a step that takes this many times the median is a stall


class StopRun(BaseException):
    """A run has made its steps. Not an error, so that nothing on the way catches it."""


class StepTimes:
    """The end of each step, and the calls that wait for the GPU.

    Args:
        steps: after which the run is stopped.
        seconds: time limit of the piece; the run is stopped before it, so that its values are recorded.
    """

    def __init__(self, on_gpu: bool, steps: int, seconds: float):
        self.on_gpu = on_gpu
        self.steps = steps
        self.started = time.monotonic()
        self.deadline = self.started + 0.85 * seconds
        self.events: list[torch.cuda.Event] = []
        self.host_times: list[float] = []
        self.waits: Counter = Counter()
        self.model = None
        self.batch_tokens = 0
        self.peak_gb: float | None = None

    def on_step_end(self, step: int) -> None:
        """Record the end of a step.

        Raises:
            StopRun: after the last step, or when the time is up.
        """
        self.host_times.append(time.time())
        if step in (1, 2, 5, 10):
            print(f"step {step} ended {time.monotonic() - self.started:.1f} s after the start", flush=True)
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(event)
            if step == self.steps - WATCHED_STEPS:
                self.watch_synchronization()
        if step >= self.steps or time.monotonic() > self.deadline:
            if self.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
            raise StopRun

    def watch_synchronization(self) -> None:
        """Count the calls that wait for the GPU from now on, of which torch warns."""
        torch.cuda.synchronize()
        self.peak_gb = torch.cuda.max_memory_allocated() / 1e9
        warnings.showwarning = self.count_wait
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def count_wait(self, message: Warning | str, *args, **kwargs) -> None:
        if "synchroniz" in str(message):
            self.waits[origin_of_call()] += 1

    def milliseconds(self) -> list[float]:
        """Of each step but the first."""
        if self.on_gpu:
            return [start.elapsed_time(end) for start, end in pairwise(self.events)]
        return [1e3 * (end - start) for start, end in pairwise(self.host_times)]


def origin_of_call() -> str:
    """Where the current call comes from: its innermost frame, and up to three frames of the project or of libraries."""
    frames = []
    for frame in reversed(traceback.extract_stack()):
        if frame.filename == __file__ or "/warnings.py" in frame.filename:
            continue
        path = frame.filename.replace(f"{ROOT}/", "").split("site-packages/")[-1]
        frames.append(f"{path}:{frame.lineno} {frame.name}: {(frame.line or '').strip()[:70]}")
        if len(frames) == 6 or path.startswith(("unlabeled", "recipes")):
            break
    prefixes = ("unlabeled", "transformers", "accelerate", "torch/utils")
    callers = [frame for frame in frames if frame.startswith(prefixes) and frame != frames[0]]
    return " <- ".join([frames[0], *callers][:4])


def add_callback(times: StepTimes) -> None:
    """Let every `Trainer` of this process report its steps to `times`."""

    class StepTimesCallback(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            times.model = model
            times.batch_tokens = getattr(args, "batch_tokens", None) or times.batch_tokens
            times.on_step_end(state.global_step)

    transformers.trainer.DEFAULT_CALLBACKS.append(StepTimesCallback)


def record_steps(
    bench: Bench, name: str, times: StepTimes, max_length: int, head_share: float = 1.0, target_length: int = 0
) -> None:
    """Record a run: the median step, stalls, compilations with their reasons, and calls that wait.

    Args:
        head_share: share of the positions for which the output head is needed.
        target_length: of an encoder-decoder.
    """
    milliseconds = times.milliseconds()
    timed = milliseconds[WARM_UP_STEPS : len(milliseconds) - WATCHED_STEPS] if bench.on_gpu else milliseconds
    if not timed:
        note = f"the time was up after {len(milliseconds) + 1} steps; the last three are timed"
        bench.record(f"{name}: note", note=note)
        timed = milliseconds[-3:]
    median = statistics.median(timed)
    tokens_per_second = 1e3 * times.batch_tokens / median
    values = {
        "ms": median,
        "tokens_per_second": tokens_per_second,
        "peak_gb": times.peak_gb,
        "steps": len(milliseconds) + 1,
    }
    with contextlib.suppress(Exception):  # the parameters of an adapter's model cannot be counted
        model = getattr(times.model, "_orig_mod", times.model)
        counts = count_parameters(model)
        flops = training_flops_per_token(
            model.config, counts, max_length, head_share=head_share, target_length=target_length
        )
        values["mfu"] = mfu(bench, flops * tokens_per_second)
    stalls = {index + 2: round(step) for index, step in enumerate(milliseconds) if step > STALL_FACTOR * median}
    entries = compilations()
    values["stalls_ms_by_step"] = stalls
    values["mean_ms_with_stalls"] = statistics.mean(timed)
    values["compilations"] = len(entries)
    values["compiling_s"] = round(sum(entry["seconds"] or 0 for entry in entries), 1)
    values["compiled"] = [describe_compilation(entry, times) for entry in entries]
    values["waits_per_step"] = round(sum(times.waits.values()) / WATCHED_STEPS, 2)
    values["waits"] = {origin: round(count / WATCHED_STEPS, 2) for origin, count in times.waits.most_common(12)}
    bench.record(name, **values)


def describe_compilation(entry: dict, times: StepTimes) -> str:
    step = 1 + sum(end < entry["began"] for end in times.host_times)
    reason = entry["reason"] or "first time"
    return f"during step {step}, {entry['seconds'] or 0:.1f} s: {entry['function']}: {reason}"
