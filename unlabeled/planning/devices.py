"""Devices: peak FLOPs, memory and bandwidth of GPUs, and the processor and memory of this machine."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

import psutil

from unlabeled.errors import UserError

if TYPE_CHECKING:  # a plan is made without loading torch
    import torch

_COLUMN = {"bf16": 0, "fp16": 1, "tf32": 2, "fp32": 3}
_PREFIX = re.compile(r"^(NVIDIA|Tesla) ")


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: Its short name.
        pattern: A regular expression that matches the whole name of `torch.cuda.get_device_name`, without its vendor.
        tera: Dense peaks in TFLOPS: bf16, fp16, tf32, fp32. None if it has no unit for a precision.
        gigabytes: Memory, in GB of 1e9 bytes.
        gigabytes_per_second: Bandwidth of the memory.
    """

    name: str
    pattern: str
    tera: tuple[float | None, float | None, float | None, float]
    gigabytes: float
    gigabytes_per_second: float

    def peak(self, precision: str) -> float | None:
        """Return the peak in FLOPs per second; None without a unit for `precision` (bf16 and tf32 on V100 and T4)."""
        tera = self.tera[_COLUMN[precision]]
        return None if tera is None else tera * 1e12


# From NVIDIA's data sheets and architecture white papers: fp32 accumulation, figures "with sparsity" halved. A laptop,
# Ti, NVL or MIG variant of the same name has another peak and is not listed.
DEVICES = (
    Device("H200", "H200", (989.4, 989.4, 494.7, 66.9), 141, 4800),
    Device("H100", "H100 80GB HBM3", (989.4, 989.4, 494.7, 66.9), 80, 3350),
    Device("H100 PCIe", "H100 PCIe", (756.0, 756.0, 378.0, 51.0), 80, 2000),
    Device("A100 80GB", "A100-SXM4-80GB|A100 80GB PCIe", (312.0, 312.0, 156.0, 19.5), 80, 1935),
    Device("A100 40GB", "A100-(SXM4|PCIE)-40GB", (312.0, 312.0, 156.0, 19.5), 40, 1555),
    Device("L40S", "L40S", (362.0, 362.0, 183.0, 91.6), 48, 864),
    Device("L4", "L4", (121.0, 121.0, 60.0, 30.3), 24, 300),
    Device("A10", "A10", (125.0, 125.0, 62.5, 31.2), 24, 600),
    Device("RTX 4090", "GeForce RTX 4090", (165.2, 165.2, 82.6, 82.6), 24, 1008),
    Device("RTX 3090", "GeForce RTX 3090", (71.0, 71.0, 35.6, 35.6), 24, 936),
    Device("V100", r"V100-SXM2-\d+GB", (None, 125.0, None, 15.7), 16, 900),
    Device("V100 PCIe", r"V100-PCIE-\d+GB", (None, 112.0, None, 14.0), 16, 900),
    Device("T4", "T4", (None, 65.0, None, 8.1), 16, 320),
)


def find_device(name: str) -> Device:
    """Return a device by its short name or by that of `torch.cuda.get_device_name`.

    Raises:
        UserError: The device is not in the table.
    """
    bare = _PREFIX.sub("", name)
    for device in DEVICES:
        if bare.lower() == device.name.lower() or re.fullmatch(device.pattern, bare):
            return device
    known = [device.name for device in DEVICES]
    near = get_close_matches(bare, known, 1, 0.6)
    raise UserError(
        f"device {name!r} is not in the table of {', '.join(known)}"
        + (f"; did you mean {near[0]!r}?" if near else "")
        + "; for another one train a few steps on it and name that run with --measured"
    )


def peak_flops(name: str, precision: str) -> float | None:
    """Return the dense peak of a GPU in FLOPs per second.

    Args:
        name: The name of `torch.cuda.get_device_name`.
        precision: That of the matrix products: bf16, fp16, tf32, or fp32 without tensor cores.

    Returns:
        None if the device is not known or has no unit for the precision.

    Raises:
        KeyError: There is no such precision.
    """
    bare = _PREFIX.sub("", name)
    device = next((device for device in DEVICES if re.fullmatch(device.pattern, bare)), None)
    return device.peak(precision) if device else None


def update_seconds(parameters: int, gigabytes_per_second: float) -> float:
    """Return the shortest time of an AdamW step, which reads four fp32 values per parameter and writes three."""
    return 7 * 4 * parameters / (gigabytes_per_second * 1e9)


def available_cores() -> int:
    """Return the cores that this process may use: on Linux those of its affinity mask, elsewhere all of the machine."""
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def main_memory_bytes() -> int:
    """Return the main memory of this machine, in bytes."""
    return psutil.virtual_memory().total


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    return psutil.Process().memory_info().rss


def device_name(device: torch.device) -> str:
    """Return the name of a device for the plan and the lineage; of a GPU the one that `peak_flops` takes."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = torch.cpu.get_capabilities().get("cpu_name") or device.type
    return f"{name}, {torch.get_num_threads()} threads"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process, in bytes: allocated on a GPU, resident otherwise."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes
