"""The shipped batch script on a real Slurm: two nodes on this box."""

import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, free_ports, recipe_arguments, run_recipe, weights

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(shutil.which(name) for name in NEEDED),
        reason="needs root and Slurm: apt-get install --no-install-recommends slurm-wlm munge",
    ),
]
CONF = """
ClusterName=box
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=bf_interval=1,sched_interval=1
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=2000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=2000
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment in which Slurm's commands talk to a cluster of two nodes."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    host = socket.gethostname().split(".")[0]
    conf = CONF.format(folder=folder, host=host, ports=free_ports(3))
    (folder / "slurm.conf").write_text(conf)
    (folder / "munge.key").write_bytes(os.urandom(128))
    os.chmod(folder / "munge.key", 0o400)
    environment = os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    munge = [
        f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")
    ]
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "node1"],
        ["slurmd", "-D", "-N", "node2"],
    ]
    processes = []
    for command in commands:
        log = open(folder / f"{command[0]}.out", "ab")  # noqa: SIM115
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        time.sleep(0.5)
    try:
        deadline = time.monotonic() + 30
        while "idle" not in (said := ask(environment, "sinfo", "-h", "-o", "%T %D")) or "2" not in said:
            assert time.monotonic() < deadline, said + (folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.5)
        yield environment
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(20)


def ask(environment: dict, *command: str, cwd=None) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd)
    return done.stdout + done.stderr


def wait_for(condition, seconds: float, what) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.5)


def place_for_jobs(folder: Path) -> Path:
    """A folder to submit jobs from, with the repository in it and logs of its own."""
    (folder / "logs").mkdir(parents=True)
    for name in ("recipes", "scripts", ".venv", "requirements.txt"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    return folder


def submit(environment: dict, place: Path, words: list[str]) -> str:
    sizes = ["--nodes=2", "--ntasks=4", "--time=30", "scripts/launch.slurm", "recipes/pretrain_clm.py"]
    return re.search(r"\d+", ask(environment, "sbatch", *sizes, *words, cwd=place))[0]


def test_two_nodes_are_preempted_requeued_and_end_in_the_same_weights(slurm, corpus, tokenizers, tmp_path):
    place = place_for_jobs(tmp_path / "place")
    options = {"train_tokens": 150 * 256, "save_strategy": "no", "per_device_train_batch_size": 2}
    words = recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "run", **options)
    job = submit(slurm, place, words)

    def logs() -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted((place / "logs").iterdir()))

    def log(rank: int) -> str:
        path = place / "logs" / f"unlabeled-{job}-rank{rank}.log"
        return path.read_text() if path.exists() else ""

    wait_for(lambda: "step     10/150" in log(0), 120, logs)
    ask(slurm, "scancel", "--batch", "--signal=USR1", job)  # what Slurm does before the time is up
    wait_for(lambda: "requeued" in (place / "logs" / f"unlabeled-{job}.log").read_text(), 60, logs)
    assert "SIGUSR1 ended the run after step" in log(0)
    wait_for(lambda: (tmp_path / "run" / "metrics.json").exists(), 180, logs)
    wait_for(lambda: not ask(slurm, "squeue", "-h", "-j", job).strip(), 60, logs)
    assert "resuming from" in log(0) and "start 2" in (place / "logs" / f"unlabeled-{job}.log").read_text()
    assert "4 processes on 1 machines met" in log(0)

    whole = recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "whole", **options)
    run_recipe("pretrain_clm", whole)
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)


def test_bad_input_ends_the_job(slurm, tmp_path):
    """Its status is 2, or 143 where one process was quicker than another one had begun."""
    place = place_for_jobs(tmp_path)
    job = submit(slurm, place, ["--config", "none.yaml"])
    wait_for(lambda: not ask(slurm, "squeue", "-h", "-j", job).strip(), 120, lambda: ask(slurm, "squeue"))
    assert "error: cannot read --config none.yaml" in (place / "logs" / f"unlabeled-{job}-rank0.log").read_text()
    said = ask(slurm, "scontrol", "show", "job", job)
    assert "JobState=FAILED" in said and "Restarts=0" in said
    assert re.search(r" ExitCode=(2|143):0", said)
