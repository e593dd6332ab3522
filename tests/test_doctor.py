"""The doctor finds what is wrong, and nothing where nothing is."""

import importlib.util
import os
import re
import socket
import subprocess
import sys

import psutil
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT


@pytest.fixture
def doctor(monkeypatch):
    spec = importlib.util.spec_from_file_location("doctor", ROOT / "scripts" / "doctor.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("MASTER_PORT", "GLOO_SOCKET_IFNAME", "SLURM_JOB_NUM_NODES", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return module


def lines(doctor, look, *args) -> list[str]:
    found = doctor.Findings()
    look(found, *args)
    return [f"{mark} {topic}: {text}" for mark, topic, text in found.lines]


@pytest.mark.slow
def test_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "scripts" / "doctor.py"), "--folder", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("all packages as in requirements.txt", "2 processes on 1 machines met", "all-reduce of 64 MB: "):
        assert expected in done.stdout
    assert not list(tmp_path.iterdir())


def test_versions(doctor, monkeypatch):
    assert lines(doctor, doctor.look_at_versions)[0].startswith("  versions: python 3")
    right = doctor.importlib.metadata.version

    def version(package):
        if package == "trl":
            raise doctor.importlib.metadata.PackageNotFoundError
        return "4.0" if package == "peft" else right(package)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    (line,) = lines(doctor, doctor.look_at_versions)
    assert line.startswith("? ") and "trl is missing" in line and "peft 4.0 instead of " in line


@pytest.fixture
def h100s(monkeypatch):
    """torch says what it says on a machine with two H100s, the second of them in use."""
    sizes = [(79_000_000_000, 85_000_000_000), (40_000_000_000, 85_000_000_000)]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: sizes[torch.device(device).index])
    return sizes


def test_gpus(doctor, h100s, monkeypatch):
    processor, first, second = lines(doctor, doctor.look_at_devices)
    assert processor[2:].startswith("processor: ")
    assert first == "  devices: 0: NVIDIA H100 80GB HBM3, 79 of 85 GB free, 989 TFLOPS in bf16"
    assert (
        second == "! devices: 1: NVIDIA H100 80GB HBM3, 40 of 85 GB free, 989 TFLOPS in bf16: another process is on it"
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Unheard Of")
    assert lines(doctor, doctor.look_at_devices)[1].endswith("GB free, peak not known, so no MFU")

    def exclusive(device=None):
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore lines")

    monkeypatch.setattr(torch.cuda, "mem_get_info", exclusive)
    (line,) = lines(doctor, doctor.look_at_gpu, torch.device("cuda", 1))
    assert line == "! devices: 1: cannot be used (CUDA error: CUDA-capable device(s) is/are busy or unavailable)"


def test_what_a_plan_and_a_run_ask_a_gpu(h100s, monkeypatch):
    """The queries that console, results and guards make of a device, each with a `torch.device`."""
    from unlabeled.planning import device_name, peak_flops, peak_memory_bytes
    from unlabeled.training.guards import device_memory

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 * device.index)
    properties = type("Properties", (), {"total_memory": 85_000_000_000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = torch.device("cuda", 1)
    assert peak_flops(device_name(device), "bf16") == pytest.approx(989.4e12)
    assert peak_memory_bytes(device) == 7
    assert device_memory(device) == 85_000_000_000
    assert device_memory(torch.device("cpu")) == pytest.approx(psutil.virtual_memory().total)


def test_an_accelerator_that_is_no_gpu(doctor, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert lines(doctor, doctor.look_at_devices)[1] == "? devices: 1 of type mps, on which nothing was tested"


def test_peers_with_gpus(doctor, h100s, monkeypatch):
    """Two processes by NCCL, of which the other is faked: it says the same, and adds as much."""
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
    met, speed, clock = lines(doctor, doctor.look_at_peers)
    assert called == ["set cuda:1", "nccl", "cuda:1", *["synchronize cuda:1"] * 6]
    assert met.startswith("  peers: 2 processes on 2 machines met")
    assert speed.startswith("  peers: all-reduce of 64 MB: ") and "WRONG" not in speed
    assert clock == "? clock: 9.0 s between the machines"
    monkeypatch.setattr(dist, "all_reduce", lambda data: None)
    assert lines(doctor, doctor.look_at_peers)[1].endswith(", AND A WRONG SUM")


def test_a_system_without_affinity(doctor, monkeypatch):
    """macOS has neither `os.sched_getaffinity` nor /proc."""
    from unlabeled import planning as budget

    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 11)
    assert budget.available_cores() == 11
    (processor, *_) = lines(doctor, doctor.look_at_devices)
    assert "processor: 11 cores, " in processor
    assert 10e6 < budget.resident_bytes() < budget.main_memory_bytes()


def test_calls_that_only_linux_has_are_made_in_one_place():
    """Recipes and scripts run on macOS too: where /proc is missing, the other modules do without."""
    linux_only = re.compile(r"sched_getaffinity|os\.sysconf|[\"']/(?:proc|sys|dev/shm)/|posix_fadvise|os\.fdatasync")
    allowed = {"unlabeled/planning/devices.py", "benchmarks/memory.py"}
    allowed |= {"unlabeled/runtime/lock_holders.py", "unlabeled/data/rendering.py"}
    found = set()
    for folder in ("unlabeled", "scripts", "recipes", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            if linux_only.search(path.read_text(encoding="utf-8")):
                found.add(path.relative_to(ROOT).as_posix())
    assert found <= allowed


def test_a_folder_that_cannot_be_written_to(doctor, tmp_path):
    (tmp_path / "file").touch()
    (line,) = lines(doctor, doctor.look_at_disk, tmp_path / "file" / "folder")
    assert line.startswith("! disk: cannot write to") and "--folder" in line


def test_the_hub_is_not_there_and_its_clock(doctor, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in lines(doctor, doctor.look_at_hub)[0]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (line,) = lines(doctor, doctor.look_at_hub)
    assert line.startswith("? hub: http://127.0.0.1:9 cannot be reached")

    class Answer:
        status, headers = 200, {"Date": "Mon, 01 Jan 2024 00:00:00 GMT"}
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *args: None  # noqa: E731

    monkeypatch.setenv("HF_TOKEN", "hf_a_secret_that_nobody_may_read")
    monkeypatch.setattr(doctor.urllib.request, "urlopen", lambda *args, **kwargs: Answer())
    hub, clock = lines(doctor, doctor.look_at_hub)
    assert "answers 200, a token is there" in hub and "secret" not in hub + clock
    assert clock.startswith("? clock: ") and "ahead of the Hub's" in clock


def test_names_and_ports(doctor, monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("", 29500))
        taken.listen()
        network, ports = lines(doctor, doctor.look_at_network)
    assert network.startswith("  network") and ports.startswith("? ports: port 29500 is taken")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert lines(doctor, doctor.look_at_network)[0].startswith("! network: ")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert lines(doctor, doctor.look_at_network)[0].startswith("  network: ")
