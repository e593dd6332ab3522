"""The precision that a device computes in."""

import os

import torch

# oneDNN and PyTorch's own layer above it compile a kernel for each new shape and keep up to 1,024 of them, most of a
# megabyte each. Rows of many lengths would take half a gigabyte (docs/planning.md).
CPU_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
CPU_KERNEL_CACHE_ENTRIES = 64


def has_fast_bf16(use_cpu: bool) -> bool:
    """Return whether matrix products in bfloat16 are faster than in float32 on this device.

    A CPU without AMX or AVX512-BF16 emulates them: 0.9 GFLOP/s against 110 GFLOP/s in float32, measured on two cores of
    an AMD EPYC with AVX2.
    """
    if use_cpu:
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") or capabilities.get("bf16"))
    device = torch.accelerator.current_accelerator()
    if device is None or device.type != "cuda":
        return False
    return torch.cuda.is_bf16_supported(including_emulation=False)


def limit_cpu_kernel_caches() -> None:
    """Bound the caches of compiled bfloat16 kernels on a CPU, unless the environment already sets their size."""
    for name in CPU_KERNEL_CACHES:
        os.environ.setdefault(name, str(CPU_KERNEL_CACHE_ENTRIES))
