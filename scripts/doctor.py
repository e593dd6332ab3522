"""Is this machine, or this allocation, fit to train on? Looks for a minute and says what it found.

    python scripts/doctor.py                                     # this machine
    torchrun --nproc_per_node 8 scripts/doctor.py                # its processes together
    srun python scripts/doctor.py                                # every node of an allocation (scripts/launch.slurm)
    python scripts/doctor.py --folder /scratch/me/outputs        # where checkpoints will go

A line that begins with `!` wants a change, one with `?` a look. The status is 1 where there is a `!`.
"""

from __future__ import annotations

import argparse
import email.utils
import importlib.metadata
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from unlabeled import exit_on_user_error

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
MEGABYTE = 1 << 20
MEETING = 60  # seconds to find all processes


class Findings:
    """Lines of a report: a mark, a topic, what was found."""

    def __init__(self):
        self.lines: list[tuple[str, str, str]] = []

    def add(self, topic: str, text: str, mark: str = " ") -> None:
        self.lines.append((mark, topic, text))


def look_at_versions(found: Findings) -> None:
    pins = re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    others = []
    for package, wanted in pins:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            others.append(f"{package} is missing")
            continue
        if version.split("+")[0] != wanted:
            others.append(f"{package} {version} instead of {wanted}")
    text = f"python {sys.version.split()[0]}, " + ("all packages as in requirements.txt" if not others else "")
    found.add("versions", text + "; ".join(others), "?" if others else " ")


def look_at_devices(found: Findings) -> None:
    """The processor, and each accelerator with its free memory and its peak."""
    import torch

    from unlabeled.config.precision import has_fast_bf16
    from unlabeled.planning import available_cores, main_memory_bytes

    cores = available_cores()
    threads = torch.get_num_threads()
    text = f"{cores} cores, {main_memory_bytes() / 1e9:.0f} GB, {threads} threads"
    found.add("processor", text, "?" if threads > cores else " ")
    if not torch.accelerator.is_available():
        found.add(
            "devices", f"no GPU; bf16 is {'fast' if has_fast_bf16(True) else 'slow, fp32 is used'} on this processor"
        )
        return
    kind = torch.accelerator.current_accelerator().type
    if kind != "cuda":
        found.add("devices", f"{torch.accelerator.device_count()} of type {kind}, on which nothing was tested", "?")
        return
    for index in range(torch.accelerator.device_count()):
        look_at_gpu(found, torch.device("cuda", index))


def look_at_gpu(found: Findings, device: torch.device) -> None:
    """Name, free memory and peak of one GPU; another process on it, or one that does not answer, wants a change."""
    import torch

    from unlabeled.planning import device_name, peak_flops

    try:
        name = device_name(device)
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:  # in exclusive mode with a process on it, or out of order
        found.add("devices", f"{device.index}: cannot be used ({str(error).splitlines()[0][:150]})", "!")
        return
    peak = peak_flops(name, "bf16")
    known = f"{peak / 1e12:.0f} TFLOPS in bf16" if peak else "peak not known, so no MFU"
    busy = total - free > 0.1 * total
    text = f"{device.index}: {name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, {known}"
    found.add("devices", text + (": another process is on it" if busy else ""), "!" if busy else " ")


def look_at_disk(found: Findings, folder: Path, megabytes: int = 256) -> None:
    """Writes, flushes and reads a file as a checkpoint would be; the read may come from the page cache."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        block = os.urandom(MEGABYTE)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            begun = time.perf_counter()
            for _ in range(megabytes):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            writing = megabytes * MEGABYTE / 1e6 / (time.perf_counter() - begun)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        found.add("disk", f"cannot write to {folder} ({error.strerror}); give --folder another one", "!")
        return
    slow, full = writing < 100, free < 10e9
    found.add("disk", f"{folder}: {writing:,.0f} MB/s written, {free / 1e9:,.0f} GB free", "?" if slow or full else " ")


def look_at_hub(found: Findings) -> None:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        found.add("hub", "HF_HUB_OFFLINE is set: models and data come from local folders")
        return
    try:
        with urllib.request.urlopen(f"{endpoint}/api/models?limit=1", timeout=10) as answer:
            there, date = answer.status, answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        there, date = error.code, error.headers.get("Date")
    except OSError as error:
        text = f"{endpoint} cannot be reached ({getattr(error, 'reason', error)}); use local folders, or a proxy"
        found.add("hub", text, "?")
        return
    from huggingface_hub import get_token

    token = "a token is there" if get_token() else "no token, so nothing can be pushed"
    found.add("hub", f"{endpoint} answers {there}, {token}")
    if date:
        off = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
        found.add(
            "clock", f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the Hub's", "?" if abs(off) > 60 else " "
        )


def look_at_network(found: Findings) -> None:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        found.add("network", f"{name} has no address; add it to /etc/hosts, or set GLOO_SOCKET_IFNAME", "!")
        return
    several = int(os.environ.get("SLURM_JOB_NUM_NODES", os.environ.get("GROUP_WORLD_SIZE", "1"))) > 1
    if address.startswith("127.") and several and "GLOO_SOCKET_IFNAME" not in os.environ:
        text = f"{name} is {address}, which other nodes cannot reach: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        found.add("network", text, "!")
    else:
        found.add("network", f"{name} is {address}")
    if "MASTER_PORT" not in os.environ:
        port = 29500
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                text = f"port {port} is taken: give torchrun another --master_port, accelerate a --main_process_port"
                found.add("ports", text, "?")
                return
        found.add("ports", f"{port}, where processes meet, is free")


def look_at_peers(found: Findings) -> None:
    """All processes meet, compare their clocks and sum 64 MB, as often as takes a few seconds."""
    import torch
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    begun = time.perf_counter()
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=MEETING))
        hosts: list = [None] * size
        dist.all_gather_object(hosts, (socket.gethostname(), time.time()))
        met = time.perf_counter() - begun
        bandwidth, right = measure_all_reduce(device, size)
    except RuntimeError as error:
        found.add("peers", f"process {rank} of {size}: {str(error).splitlines()[0][:150]}", "!")
        return
    names = {name for name, _ in hosts}
    apart = max(clock for _, clock in hosts) - min(clock for _, clock in hosts)
    found.add("peers", f"{size} processes on {len(names)} machines met after {met:.1f} s")
    text = f"all-reduce of 64 MB: {bandwidth:.1f} GB/s" + ("" if right else ", AND A WRONG SUM")
    found.add("peers", text, " " if right else "!")
    if len(names) > 1:
        found.add("clock", f"{apart:.1f} s between the machines", "?" if apart > 5 else " ")
    dist.destroy_process_group()


def measure_all_reduce(device: torch.device, size: int) -> tuple[float, bool]:
    """GB/s that each of `size` processes sends as a ring would, the median of five, and whether the sum is right."""
    import torch
    import torch.distributed as dist

    data = torch.ones(16 * MEGABYTE, device=device)  # 64 MB of fp32
    seconds = []
    for _ in range(6):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(data)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    right = bool((data == float(size) ** len(seconds)).all())
    median = sorted(seconds[1:])[2]  # the first one connects
    return data.nbytes * 2 * (size - 1) / size / median / 1e9, right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs"), help="where to write (default: outputs)")
    args = parser.parse_args()
    found = Findings()
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if os.environ.get("LOCAL_RANK", "0") == "0":
        look_at_versions(found)
        look_at_devices(found)
        look_at_disk(found, args.folder)
        look_at_hub(found)
        look_at_network(found)
    if launched:
        look_at_peers(found)
    marked = any(mark == "!" for mark, _, _ in found.lines)
    if os.environ.get("RANK", "0") == "0" or marked or (launched and os.environ.get("LOCAL_RANK") == "0"):
        before = f"{socket.gethostname()} " if launched else ""
        print("\n".join(f"{before}{mark} {topic:10} {text}" for mark, topic, text in found.lines), flush=True)
    return int(marked)


if __name__ == "__main__":
    with exit_on_user_error():
        raise SystemExit(main())
