"""Two machines, simulated by network namespaces: their run equals that of one, and a lost machine is noticed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch_environment, recipe_arguments, run_recipe, weights


def can_make_namespaces() -> bool:
    if os.geteuid() != 0:
        return False
    try:
        succeeded = subprocess.run(["ip", "netns", "add", "unlabeled-try"], capture_output=True).returncode == 0
        subprocess.run(["ip", "netns", "delete", "unlabeled-try"], capture_output=True)
    except OSError:
        return False
    return succeeded


pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.skipif(not can_make_namespaces(), reason="needs root, iproute2 and network namespaces"),
]
ADDRESSES = ("10.77.0.10", "10.77.0.11")
TIMEOUT = 20  # seconds, of collectives


class Machines:
    """Two network namespaces that a virtual cable connects."""

    def __init__(self, folder: Path):
        self.names = [f"unlabeled-{os.getpid()}-{i}" for i in (0, 1)]
        self.hosts = folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{ADDRESSES[i]} node{i}\n" for i in (0, 1)))
        for name in self.names:
            self.ip("netns", "add", name)
            self.ip("-n", name, "link", "set", "lo", "up")
        self.ip(
            "link", "add", "v0", "netns", self.names[0], "type", "veth", "peer", "name", "v1", "netns", self.names[1]
        )
        for i, name in enumerate(self.names):
            self.ip("-n", name, "address", "add", f"{ADDRESSES[i]}/24", "dev", f"v{i}")
            self.ip("-n", name, "link", "set", f"v{i}", "up")

    @staticmethod
    def ip(*words: str) -> str:
        return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout

    def cable(self, state: str) -> None:
        self.ip("-n", self.names[1], "link", "set", "v1", state)

    def start(self, words: list[str], port: int) -> list[subprocess.Popen]:
        """Start a recipe on both machines, one process each."""
        processes = []
        for i, name in enumerate(self.names):
            launcher = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes=2",
                f"--node_rank={i}",
                "--nproc_per_node=1",
            ]
            launcher += [f"--master_addr={ADDRESSES[0]}", f"--master_port={port}"]
            inside = f'hostname node{i}; mount --bind {self.hosts} /etc/hosts; exec "$@"'
            outside = [
                "nsenter",
                f"--net=/run/netns/{name}",
                "unshare",
                "--uts",
                "--mount",
                "bash",
                "-c",
                inside,
                "node",
            ]
            environment = launch_environment() | {"GLOO_SOCKET_IFNAME": f"v{i}"}
            command = [*outside, *launcher, *words]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, **pipes))
        return processes

    def kill(self, i: int) -> None:
        for number in self.ip("netns", "pids", self.names[i]).split():
            os.kill(int(number), signal.SIGKILL)

    def remove(self) -> None:
        for i, name in enumerate(self.names):
            self.kill(i)
            self.ip("netns", "delete", name)


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    both = Machines(tmp_path_factory.mktemp("machines"))
    yield both
    both.remove()


@pytest.fixture
def words(corpus, tokenizers, tmp_path):
    """The recipe with its arguments, and those of the same run on one machine."""

    def make(folder: str, **options) -> list[str]:
        options = {"train_tokens": 12 * 256, "save_steps": 4, "ddp_timeout": TIMEOUT} | options
        return recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / folder, **options)

    return lambda folder, **options: [
        str(ROOT / "recipes" / "pretrain_clm.py"),
        *make(folder, per_device_train_batch_size=4, **options),
    ], make


def read(process: subprocess.Popen, seconds: float = 150) -> str:
    return process.communicate(timeout=seconds)[0]


def assert_equal_weights(first: Path, second: Path) -> None:
    expected = weights(second)
    for name, tensor in weights(first).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["ddp", "zero2"])
def test_two_machines(kind, machines, words, tmp_path):
    on_both, on_one = words
    options = {"deepspeed": str(ROOT / "ds_configs" / "zero2.json")} if kind == "zero2" else {}
    processes = machines.start(on_both("both", **options), port=29510)
    outputs = [read(process, 300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    run_recipe("pretrain_clm", on_one("one"))
    assert_equal_weights(tmp_path / "both", tmp_path / "one")


@pytest.mark.parametrize("failure", ["killed", "unplugged"])
def test_lost_machine(failure, machines, words, tmp_path):
    on_both, on_one = words
    many = {"train_tokens": 400 * 256, "save_steps": 50}
    processes = machines.start(on_both("both", **many), port=29511)
    for line in processes[0].stdout:
        if line.startswith("step     60/400"):
            break
    started = time.monotonic()
    machines.kill(1) if failure == "killed" else machines.cable("down")
    output = read(processes[0], 120)
    seconds = time.monotonic() - started
    machines.cable("up")
    machines.kill(0)
    machines.kill(1)
    read(processes[1])
    assert processes[0].returncode != 0 and "stopped: process 0 has lost another one" in output, output[-9000:]
    assert seconds < (15 if failure == "killed" else TIMEOUT + 40)  # 30 of them are torchrun's
    processes = machines.start(on_both("both", **many), port=29512)
    outputs = [read(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:]
    assert "resuming from" in outputs[0]
    run_recipe("pretrain_clm", on_one("one", **many))
    assert_equal_weights(tmp_path / "both", tmp_path / "one")
