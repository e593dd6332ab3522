"""The speed of the device itself."""

import torch

from benchmarks.gpu.bench import Bench


def machine(bench: Bench) -> None:
    """Measure matrix products and copies, the best that the device can do."""
    size = 8192 if bench.on_gpu else 256
    left = torch.randn(size, size, device=bench.device, dtype=torch.bfloat16)
    right = torch.randn(size, size, device=bench.device, dtype=torch.bfloat16)
    for name, call in {
        f"bf16 matrix product, {size} x {size} x {size}": lambda: left @ right,
        "the same, right matrix transposed": lambda: left @ right.T,
    }.items():
        ms = bench.milliseconds(call, repeats=20)
        bench.record(name, ms=ms, tflops=2 * size**3 / ms / 1e9)
    source = torch.empty(size * size * 8, device=bench.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    ms = bench.milliseconds(lambda: target.copy_(source), repeats=20)
    bench.record("copy on the device", ms=ms, gigabytes_per_second=2 * source.numel() * 2 / ms / 1e6)
    if bench.on_gpu:
        host = torch.empty(64 * 1024 * 1024, dtype=torch.uint8, pin_memory=True)
        card = torch.empty(host.shape, dtype=torch.uint8, device=bench.device)
        ms = bench.milliseconds(lambda: card.copy_(host, non_blocking=True))
        bench.record("64 MiB (a bool mask of 64 x 1,024 x 1,024) from pinned memory to the device", ms=ms)
