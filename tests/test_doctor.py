"""The doctor finds what is wrong, and nothing where nothing is."""

import importlib.util
import os
import socket
import subprocess
import sys

import pytest
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
