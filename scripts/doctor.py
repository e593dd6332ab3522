"""Is this machine, or this allocation, fit to train on? Looks for a minute and says what it found.

    python scripts/doctor.py                                     # this machine
    torchrun --nproc_per_node 8 scripts/doctor.py                # its processes together
    srun python scripts/doctor.py                                # every node of an allocation (scripts/launch.slurm)
    python scripts/doctor.py --folder /scratch/me/outputs        # where checkpoints will go

A line that begins with `!` wants a change, one with `?` a look. The status is 1 where there is a `!`.
"""

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

from unlabeled import explained

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
    import torch

    from unlabeled.budget import peak_flops
    from unlabeled.optim import fast_bf16

    cores, memory = len(os.sched_getaffinity(0)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    threads = torch.get_num_threads()
    text = f"{cores} cores, {memory / 1e9:.0f} GB, {threads} threads"
    found.add("processor", text, "?" if threads > cores else " ")
    if not torch.accelerator.is_available():
        found.add("devices", f"no GPU; bf16 is {'fast' if fast_bf16(True) else 'slow, fp32 is used'} on this processor")
        return
    for index in range(torch.accelerator.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        peak = peak_flops(torch.device("cuda", index), "bf16")
        known = f"{peak / 1e12:.0f} TFLOPS in bf16" if peak else "peak not known, so no MFU"
        busy = total - free > 0.1 * total
        text = f"{index}: {properties.name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, {known}"
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
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    begun = time.perf_counter()
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=MEETING))
        hosts: list = [None] * size
        dist.all_gather_object(hosts, (socket.gethostname(), time.time()))
        met = time.perf_counter() - begun
        data = torch.ones(16 * MEGABYTE, device="cuda" if cuda else "cpu")
        seconds = []
        for _ in range(6):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(data)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    except RuntimeError as error:
        found.add("peers", f"process {rank} of {size}: {str(error).splitlines()[0][:150]}", "!")
        return
    right = bool((data == float(size) ** 6).all())
    bandwidth = data.nbytes * 2 * (size - 1) / size / sorted(seconds[1:])[2] / 1e9  # what a ring sends from each
    names = {name for name, _ in hosts}
    apart = max(at for _, at in hosts) - min(at for _, at in hosts)
    found.add("peers", f"{size} processes on {len(names)} machines met after {met:.1f} s")
    found.add(
        "peers",
        f"all-reduce of 64 MB: {bandwidth:.1f} GB/s" + ("" if right else ", AND A WRONG SUM"),
        " " if right else "!",
    )
    if len(names) > 1:
        found.add("clock", f"{apart:.1f} s between the machines", "?" if apart > 5 else " ")
    dist.destroy_process_group()


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
    with explained():
        raise SystemExit(main())
