"""Checks of a machine: problems are found, and a sound machine has none."""

import importlib.metadata
import os
import re
import socket
import subprocess
import sys
import urllib.request

import psutil
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

from unlabeled.planner import machine_checks
from unlabeled.planning import devices


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("MASTER_PORT", "GLOO_SOCKET_IFNAME", "SLURM_JOB_NUM_NODES", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def as_text(findings: machine_checks.Finding | list[machine_checks.Finding]) -> list[str]:
    """The mark, topic and text of each finding."""
    if isinstance(findings, machine_checks.Finding):
        findings = [findings]
    return [f"{finding.severity.value} {finding.topic}: {finding.text}" for finding in findings]


@pytest.mark.slow
def test_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "scripts" / "doctor.py"), "--folder", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stdout + process.stderr
    for expected in (
        "all packages as in requirements.txt",
        "2 processes on 1 machines connected",
        "all-reduce of 64 MB: ",
    ):
        assert expected in process.stdout
    assert not list(tmp_path.iterdir())


def test_versions(monkeypatch):
    assert as_text(machine_checks.check_versions(ROOT / "requirements.txt"))[0].startswith("  versions: python 3")
    right = importlib.metadata.version

    def version(package):
        if package == "trl":
            raise importlib.metadata.PackageNotFoundError
        return "4.0" if package == "peft" else right(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    (line,) = as_text(machine_checks.check_versions(ROOT / "requirements.txt"))
    assert line.startswith("? ") and "trl is missing" in line and "peft 4.0 instead of " in line


@pytest.fixture
def h100s(monkeypatch):
    """torch as on a machine with two H100s, of which the second is in use."""
    sizes = [(79_000_000_000, 85_000_000_000), (40_000_000_000, 85_000_000_000)]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: sizes[torch.device(device).index])
    return sizes


def test_gpus(h100s, monkeypatch):
    processor, first, second = as_text(machine_checks.check_devices())
    assert processor[2:].startswith("processor: ")
    assert first == "  devices: 0: NVIDIA H100 80GB HBM3, 79 of 85 GB free, 989 TFLOPS in bf16"
    assert (
        second == "! devices: 1: NVIDIA H100 80GB HBM3, 40 of 85 GB free, 989 TFLOPS in bf16: in use by another process"
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Unheard Of")
    assert as_text(machine_checks.check_devices())[1].endswith("GB free, unknown peak, so no MFU")

    def exclusive(device=None):
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore lines")

    monkeypatch.setattr(torch.cuda, "mem_get_info", exclusive)
    (line,) = as_text(machine_checks.check_gpu(torch.device("cuda", 1)))
    assert line == "! devices: 1: cannot be used (CUDA error: CUDA-capable device(s) is/are busy or unavailable)"


def test_queries_of_a_gpu(h100s, monkeypatch):
    """The queries of a device that a run plan, its results and the guards make, each with a `torch.device`."""
    from unlabeled.planning import device_name, peak_flops, peak_memory_bytes
    from unlabeled.training.memory_errors import device_memory

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 * device.index)
    properties = type("Properties", (), {"total_memory": 85_000_000_000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = torch.device("cuda", 1)
    assert peak_flops(device_name(device), "bf16") == pytest.approx(989.4e12)
    assert peak_memory_bytes(device) == 7
    assert device_memory(device) == 85_000_000_000
    assert device_memory(torch.device("cpu")) == pytest.approx(psutil.virtual_memory().total)


def test_other_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert as_text(machine_checks.check_devices())[1] == "? devices: 1 of type mps, which is not tested"


def test_peers_with_gpus(h100s, monkeypatch):
    """Two processes with NCCL, of which the other one is simulated: it sends the same values."""
    called = []
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda size, device: called.append(str(device)) or ones(size))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: called.append(f"set {device}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: called.append(f"synchronize {device}"))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: called.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "all_reduce", lambda data: data.mul_(2))

    def all_gather_object(hosts, own):
        hosts[:] = [own, ("another", own[1] + 9)]

    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    met, speed, clock = as_text(machine_checks.check_peers())
    assert called == ["set cuda:1", "nccl", "cuda:1", *["synchronize cuda:1"] * 6]
    assert met.startswith("  peers: 2 processes on 2 machines connected")
    assert speed.startswith("  peers: all-reduce of 64 MB: ") and "WRONG" not in speed
    assert clock == "? clock: 9.0 s between the machines"
    monkeypatch.setattr(dist, "all_reduce", lambda data: None)
    assert as_text(machine_checks.check_peers())[1].endswith(", and the SUM IS WRONG")


def test_system_without_affinity(monkeypatch):
    """macOS has neither `os.sched_getaffinity` nor /proc."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 11)
    assert devices.available_cores() == 11
    (processor, *_) = as_text(machine_checks.check_devices())
    assert "processor: 11 cores, " in processor
    assert 10e6 < devices.resident_bytes() < devices.main_memory_bytes()


def test_linux_only_calls():
    """Calls that only Linux has are made in a few modules, because recipes and scripts run on macOS as well."""
    linux_only = re.compile(r"sched_getaffinity|os\.sysconf|[\"']/(?:proc|sys|dev/shm)/|posix_fadvise|os\.fdatasync")
    allowed = {"unlabeled/planning/devices.py", "benchmarks/memory.py"}
    allowed |= {"unlabeled/runtime/lock_holders.py", "unlabeled/data/rendering.py"}
    found = set()
    for folder in ("unlabeled", "scripts", "recipes", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            if linux_only.search(path.read_text(encoding="utf-8")):
                found.add(path.relative_to(ROOT).as_posix())
    assert found <= allowed


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    (line,) = as_text(machine_checks.check_disk(tmp_path / "file" / "folder"))
    assert line.startswith("! disk: cannot write to") and "--folder" in line


def test_hub_and_its_clock(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in as_text(machine_checks.check_hub())[0]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (line,) = as_text(machine_checks.check_hub())
    assert line.startswith("? hub: http://127.0.0.1:9 cannot be reached")

    class Answer:
        status, headers = 200, {"Date": "Mon, 01 Jan 2024 00:00:00 GMT"}
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *args: None  # noqa: E731

    monkeypatch.setenv("HF_TOKEN", "hf_a_secret_that_nobody_may_read")
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: Answer())
    hub, clock = as_text(machine_checks.check_hub())
    assert "answers with status 200, a token is set" in hub and "secret" not in hub + clock
    assert clock.startswith("? clock: ") and "ahead of the Hub's" in clock


def test_network_and_ports(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("", 29500))
        taken.listen()
        network, ports = as_text(machine_checks.check_network())
    assert network.startswith("  network") and ports.startswith("? ports: port 29500 is in use")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert as_text(machine_checks.check_network())[0].startswith("! network: ")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert as_text(machine_checks.check_network())[0].startswith("  network: ")
