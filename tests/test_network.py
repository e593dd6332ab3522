"""Recipes and scripts on local data connect to no other machine, so they never wait for an answer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from experiments.network import run as network

# Commands of experiments/network that cover all recipes and most scripts. Each reads the outputs of those before it.
COMMANDS = (
    "tokenizer-bpe", "tokenizer-wordpiece", "tokenizer-unigram", "clm", "mlm", "span", "sft", "sft lora, own base",
    "sft lora", "dpo lora", "classify", "tag", "embed", "merge", "generate with an adapter", "evaluate",
    "push --dry-run",
)  # fmt: skip


def has_namespaces() -> bool:
    """Whether this process may create network namespaces with interfaces in them, as root may."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    command = ["unshare", "--net", "--mount", "ip", "link", "add", "type", "veth"]
    return subprocess.run(command, capture_output=True).returncode == 0


def run_recorded(command: list[str], folder: Path) -> tuple[str, list[dict]]:
    """Run a command with HF_HUB_OFFLINE=0, without a network if namespaces can be created.

    Returns:
        Its output, and its connection attempts.
    """
    log = folder / "network.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "CI"))}
    environment |= {"NETWORK_LOG": str(log), "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(network.RECORDER), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    isolated = has_namespaces()
    command = network.in_black_hole(command, folder) if isolated else command
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout[-2000:], result.stderr[-3000:])
    attempts = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
    packets = int((folder / "packets").read_text()) if isolated else 0
    assert attempts or not packets, "code that is not Python connects"
    return result.stdout, attempts


def test_connection_attempts_are_recorded(tmp_path):
    """By name, by address, and from a child process; otherwise the next test would always pass."""
    connect = """
import socket, subprocess, sys, urllib.request
with socket.socket() as local:
    local.bind(("127.0.0.1", 0))
    local.listen()
    socket.create_connection(local.getsockname(), timeout=1).close()
for address in (("unlabeled.invalid", 80), ("10.77.0.9", 80)):
    try:
        socket.create_connection(address, timeout=0.2).close()
    except OSError:
        pass
if len(sys.argv) == 1:
    subprocess.run([sys.executable, __file__, "again"], check=True)
"""
    (tmp_path / "connect.py").write_text(connect)
    _, attempts = run_recorded([sys.executable, "connect.py"], tmp_path)
    hosts = {attempt["host"] for attempt in attempts}
    assert hosts == {"unlabeled.invalid", "10.77.0.9"}
    assert len(attempts) >= 4


@pytest.mark.slow
def test_no_connections_with_local_data(tmp_path):
    network.make_data(tmp_path)
    commands = network.commands()
    scripts = [[str(word) for word in commands[name][1:]] for name in COMMANDS]
    (tmp_path / "commands.json").write_text(json.dumps(scripts))
    worker = [sys.executable, str(ROOT / "tests" / "network_worker.py"), "commands.json"]
    output, attempts = run_recorded(worker, tmp_path)
    assert output.count("--- ") >= len(COMMANDS)
    assert not attempts, attempts[0]
