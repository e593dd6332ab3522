"""Checks of a machine, or of the machines of an allocation, before a run: `scripts/doctor.py`.

torch is imported where it is needed, so that the script answers `--help` at once.
"""

from __future__ import annotations

import email.utils
import importlib.metadata
import os
import re
import shutil
import socket
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MEGABYTE = 1 << 20
DISK_TEST_MEGABYTES = 256
SLOW_DISK = 100  # MB/s
LITTLE_DISK_SPACE = 10e9  # bytes
BUSY_MEMORY_SHARE = 0.1  # of a GPU's memory in use, from which on another process is likely to be on it
RENDEZVOUS_TIMEOUT = 60  # seconds in which all processes have to connect
DEFAULT_PORT = 29500  # of torchrun and accelerate
HUB_TIMEOUT = 10  # seconds
MAX_CLOCK_DIFFERENCE = 5  # seconds between machines
MAX_HUB_CLOCK_DIFFERENCE = 60  # seconds
ALL_REDUCE_REPEATS = 6  # of which the first, which connects, is not timed
MAX_REASON_LENGTH = 150


class Severity(Enum):
    """How serious a finding is, and its mark in the report."""

    OK = " "
    WARNING = "?"
    PROBLEM = "!"


@dataclass(frozen=True)
class Finding:
    """A line of the report."""

    topic: str
    text: str
    severity: Severity = Severity.OK

    def __str__(self) -> str:
        return f"{self.severity.value} {self.topic:10} {self.text}"


def check_machine(folder: Path, requirements: Path) -> list[Finding]:
    """Run all checks that concern one machine.

    Args:
        folder: The folder that checkpoints will be written to.
        requirements: The file with the pinned versions.
    """
    return [
        check_versions(requirements),
        *check_devices(),
        check_disk(folder),
        *check_hub(),
        *check_network(),
    ]


def check_versions(requirements: Path) -> Finding:
    """Compare the installed packages with the versions that `requirements` pins."""
    pins = re.findall(r"^([\w-]+)==([\w.]+)", requirements.read_text(encoding="utf-8"), re.MULTILINE)
    differences = []
    for package, pinned_version in pins:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            differences.append(f"{package} is missing")
            continue
        if version.split("+")[0] != pinned_version:
            differences.append(f"{package} {version} instead of {pinned_version}")
    python = f"python {sys.version.split()[0]}"
    if differences:
        return Finding("versions", f"{python}, {'; '.join(differences)}", Severity.WARNING)
    return Finding("versions", f"{python}, all packages as in {requirements.name}")


# --- Devices ----------------------------------------------------------------------------------------------------------


def check_devices() -> list[Finding]:
    """Describe the processor, and each accelerator with its free memory and its peak."""
    import torch

    from unlabeled.config.precision import has_fast_bf16

    findings = [check_processor()]
    if not torch.accelerator.is_available():
        speed = "fast" if has_fast_bf16(use_cpu=True) else "slow, so fp32 is used"
        return [*findings, Finding("devices", f"no GPU; bf16 is {speed} on this processor")]
    device_type = torch.accelerator.current_accelerator().type
    count = torch.accelerator.device_count()
    if device_type != "cuda":
        text = f"{count} of type {device_type}, which is not tested"
        return [*findings, Finding("devices", text, Severity.WARNING)]
    return findings + [check_gpu(torch.device("cuda", index)) for index in range(count)]


def check_processor() -> Finding:
    """Describe cores, main memory and threads; more threads than cores are a warning."""
    import torch

    from unlabeled.planning.devices import available_cores, main_memory_bytes

    cores = available_cores()
    threads = torch.get_num_threads()
    text = f"{cores} cores, {main_memory_bytes() / 1e9:.0f} GB, {threads} threads"
    return Finding("processor", text, Severity.WARNING if threads > cores else Severity.OK)


def check_gpu(device: torch.device) -> Finding:
    """Describe a GPU; that it cannot be used, or that another process uses it, is a problem."""
    import torch

    from unlabeled.planning.devices import device_name, peak_flops

    try:
        name = device_name(device)
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:  # such as another process on it in exclusive mode
        return Finding("devices", f"{device.index}: cannot be used ({_first_line(error)})", Severity.PROBLEM)
    peak = peak_flops(name, "bf16")
    speed = f"{peak / 1e12:.0f} TFLOPS in bf16" if peak else "unknown peak, so no MFU"
    text = f"{device.index}: {name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, {speed}"
    if total - free > BUSY_MEMORY_SHARE * total:
        return Finding("devices", f"{text}: in use by another process", Severity.PROBLEM)
    return Finding("devices", text)


# --- Disk, Hub and network --------------------------------------------------------------------------------------------


def check_disk(folder: Path, megabytes: int = DISK_TEST_MEGABYTES) -> Finding:
    """Write a file and flush it to the disk, as when a checkpoint is saved."""
    block = os.urandom(MEGABYTE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(megabytes):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - start
        free = shutil.disk_usage(folder).free
    except OSError as error:
        text = f"cannot write to {folder} ({error.strerror}); choose another folder with --folder"
        return Finding("disk", text, Severity.PROBLEM)
    speed = megabytes * MEGABYTE / 1e6 / seconds
    is_poor = speed < SLOW_DISK or free < LITTLE_DISK_SPACE
    text = f"{folder}: written at {speed:,.0f} MB/s, {free / 1e9:,.0f} GB free"
    return Finding("disk", text, Severity.WARNING if is_poor else Severity.OK)


def check_hub() -> list[Finding]:
    """Ask the Hub for an answer, and compare its clock with that of this machine."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return [Finding("hub", "HF_HUB_OFFLINE is set: models and data are read from local folders")]
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(f"{endpoint}/api/models?limit=1", timeout=HUB_TIMEOUT) as response:
            status = response.status
            date = response.headers.get("Date")
    except urllib.error.HTTPError as error:
        status = error.code
        date = error.headers.get("Date")
    except OSError as error:
        reason = getattr(error, "reason", error)
        text = f"{endpoint} cannot be reached ({reason}); use local folders, or a proxy"
        return [Finding("hub", text, Severity.WARNING)]

    from huggingface_hub import get_token

    token = "a token is set" if get_token() else "no token is set, so nothing can be pushed"
    findings = [Finding("hub", f"{endpoint} answers with status {status}, {token}")]
    if date:
        findings.append(_compare_with_hub_clock(date))
    return findings


def _compare_with_hub_clock(date: str) -> Finding:
    difference = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    direction = "ahead of" if difference > 0 else "behind"
    is_large = abs(difference) > MAX_HUB_CLOCK_DIFFERENCE
    text = f"{abs(difference):.0f} s {direction} the Hub's"
    return Finding("clock", text, Severity.WARNING if is_large else Severity.OK)


def check_network() -> list[Finding]:
    """Resolve the name of this machine, and see whether the default port of a launcher is free."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        text = f"{name} has no address; add it to /etc/hosts, or set GLOO_SOCKET_IFNAME"
        return [Finding("network", text, Severity.PROBLEM)]
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", os.environ.get("GROUP_WORLD_SIZE", "1")))
    findings = []
    if address.startswith("127.") and nodes > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        text = f"{name} is {address}, which other nodes cannot reach: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        findings.append(Finding("network", text, Severity.PROBLEM))
    else:
        findings.append(Finding("network", f"{name} is {address}"))
    if "MASTER_PORT" not in os.environ:
        findings.append(check_default_port())
    return findings


def check_default_port() -> Finding:
    """See whether the port is free through which processes connect by default."""
    with socket.socket() as probe:
        try:
            probe.bind(("", DEFAULT_PORT))
        except OSError:
            text = (
                f"port {DEFAULT_PORT} is in use: pass another --master_port to torchrun, or --main_process_port to "
                "accelerate"
            )
            return Finding("ports", text, Severity.WARNING)
    return Finding("ports", f"{DEFAULT_PORT}, through which processes connect, is free")


# --- Processes --------------------------------------------------------------------------------------------------------


def check_peers() -> list[Finding]:
    """Connect all launched processes, compare their clocks, and measure an all-reduce of 64 MB."""
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    start = time.perf_counter()
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=RENDEZVOUS_TIMEOUT))
        hosts: list[tuple[str, float] | None] = [None] * world_size
        dist.all_gather_object(hosts, (socket.gethostname(), time.time()))
        seconds = time.perf_counter() - start
        bandwidth, is_correct = measure_all_reduce(device, world_size)
    except RuntimeError as error:
        return [Finding("peers", f"process {rank} of {world_size}: {_first_line(error)}", Severity.PROBLEM)]
    names = {name for name, _ in hosts}
    times = [clock for _, clock in hosts]
    findings = [Finding("peers", f"{world_size} processes on {len(names)} machines connected after {seconds:.1f} s")]
    speed = f"all-reduce of 64 MB: {bandwidth:.1f} GB/s"
    if is_correct:
        findings.append(Finding("peers", speed))
    else:
        findings.append(Finding("peers", f"{speed}, and the SUM IS WRONG", Severity.PROBLEM))
    if len(names) > 1:
        difference = max(times) - min(times)
        severity = Severity.WARNING if difference > MAX_CLOCK_DIFFERENCE else Severity.OK
        findings.append(Finding("clock", f"{difference:.1f} s between the machines", severity))
    dist.destroy_process_group()
    return findings


def measure_all_reduce(device: torch.device, world_size: int) -> tuple[float, bool]:
    """Measure an all-reduce of 64 MB in fp32.

    Returns:
        The median of the GB/s that each process sends, as in a ring, and whether the sum is correct.
    """
    import torch
    import torch.distributed as dist

    data = torch.ones(16 * MEGABYTE, device=device)
    seconds = []
    for _ in range(ALL_REDUCE_REPEATS):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(data)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    is_correct = bool((data == float(world_size) ** ALL_REDUCE_REPEATS).all())
    sent_bytes = data.nbytes * 2 * (world_size - 1) / world_size
    return sent_bytes / statistics.median(seconds[1:]) / 1e9, is_correct


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:MAX_REASON_LENGTH]
