"""The size of the benchmark, its device, and how it measures."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from unlabeled.planning import peak_flops

IGNORE = -100  # label of a position without a target


@dataclass(frozen=True)
class Shape:
    """The size of a GPT-2 and of its batch. The default is that of gpt2-124m."""

    rows: int = 64
    length: int = 1024
    layers: int = 12
    heads: int = 12
    head_dim: int = 64
    vocabulary: int = 50304
    repeats: int = 10
    steps: int = 15

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        return self.rows * self.length


SMALL = Shape(rows=4, length=64, layers=2, heads=2, head_dim=16, vocabulary=640, repeats=2, steps=2)


@dataclass
class Bench:
    """The device and the size of a measurement, and where its values go.

    Attributes:
        record: called with the name of an entry and its values.
        compile: False in tests on a CPU, where compilation would take too long.
        seconds: time limit.
    """

    device: torch.device
    shape: Shape
    record: Callable
    compile: bool = True
    backend: str = "inductor"
    seconds: float = math.inf

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def compiled(self, function: Callable, **options) -> Callable:
        """The function, compiled unless `compile` is False."""
        return torch.compile(function, backend=self.backend, **options) if self.compile else function

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable, repeats: int | None = None, warmup: int = 3) -> float:
        """The median time of a call, measured by events on a GPU."""
        repeats = repeats or self.shape.repeats
        for _ in range(warmup if self.on_gpu else 1):
            call()
        times = []
        for _ in range(repeats):
            if self.on_gpu:
                start = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end))
            else:
                started = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times)

    def extra_gigabytes(self, call: Callable) -> float | None:
        """Peak memory of a call beyond what is allocated already; None on a CPU."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e9

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Record an error in this context under a name, and continue after it."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip()}"
            self.record(name, error=reason[:300])


def both_passes(bench: Bench, name: str, call: Callable, inputs: list, gradient: torch.Tensor) -> None:
    """Record the time of a forward pass, and of forward and backward pass together."""
    with bench.attempt(name):
        forward_ms = bench.milliseconds(lambda: call(*inputs))
        differentiable = [value for value in inputs if value.requires_grad]

        def both():
            torch.autograd.grad(call(*inputs), differentiable, gradient)

        bench.record(name, ms=bench.milliseconds(both), forward_ms=forward_ms, extra_gb=bench.extra_gigabytes(both))


def mfu(bench: Bench, flops_per_second: float) -> float | None:
    """Model FLOPs utilization: the share of the peak in the data sheet; None if the peak is not known."""
    if not bench.on_gpu:
        return None
    peak = peak_flops(torch.cuda.get_device_name(), "bf16")
    return flops_per_second / peak if peak else None


def compilations() -> list[dict]:
    """The compilations of this process: function, seconds, reason of a recompilation, and start."""
    from torch._dynamo.utils import get_compilation_metrics

    entries = []
    for entry in get_compilation_metrics():
        if not getattr(entry, "is_forward", True) and not getattr(entry, "entire_frame_compile_time_s", None):
            continue  # a backward pass that was compiled with its forward pass
        if getattr(entry, "co_name", None) is None:
            continue
        began = getattr(entry, "start_time_us", None) or 0
        file = (entry.co_filename or "").split("site-packages/")[-1]
        entries.append(
            {
                "function": f"{entry.co_name} ({file}:{entry.co_firstlineno})",
                "seconds": entry.entire_frame_compile_time_s,
                "reason": entry.recompile_reason,
                "failed": entry.fail_reason,
                "began": began / 1e6,
            }
        )
    return entries
