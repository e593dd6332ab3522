"""The shipped batch script: its logic with a fake srun, and a real Slurm of two nodes on this machine."""

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
MISSING = pytest.mark.skipif(
    os.geteuid() != 0 or not all(shutil.which(name) for name in NEEDED),
    reason="needs root and Slurm: apt-get install --no-install-recommends slurm-wlm munge",
)


def on_slurm(test):
    """Marks of a test that needs a real Slurm."""
    return pytest.mark.slow(pytest.mark.cluster(MISSING(test)))


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
    """The environment of Slurm's commands, with a cluster of two nodes."""
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
        while "idle" not in (output := ask(environment, "sinfo", "-h", "-o", "%T %D")) or "2" not in output:
            assert time.monotonic() < deadline, output + (folder / "slurmctld.log").read_text()[-3000:]
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


def make_workdir(folder: Path) -> Path:
    """Make a folder to submit jobs from, with links to the repository and its own logs."""
    (folder / "logs").mkdir(parents=True)
    for name in ("recipes", "scripts", ".venv", "requirements.txt"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    return folder


def submit(environment: dict, workdir: Path, words: list[str]) -> str:
    sizes = ["--nodes=2", "--ntasks=4", "--time=30", "scripts/launch.slurm", "recipes/pretrain_clm.py"]
    return re.search(r"\d+", ask(environment, "sbatch", *sizes, *words, cwd=workdir))[0]


@on_slurm
def test_preemption_on_two_nodes(slurm, corpus, tokenizers, tmp_path):
    workdir = make_workdir(tmp_path / "place")
    options = {"train_tokens": 150 * 256, "save_strategy": "no", "per_device_train_batch_size": 2}
    words = recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "run", **options)
    job = submit(slurm, workdir, words)

    def logs() -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted((workdir / "logs").iterdir()))

    def log(rank: int) -> str:
        path = workdir / "logs" / f"unlabeled-{job}-rank{rank}.log"
        return path.read_text() if path.exists() else ""

    wait_for(lambda: "step     10/150" in log(0), 120, logs)
    ask(slurm, "scancel", "--batch", "--signal=USR1", job)  # what Slurm does before the time is up
    wait_for(lambda: "requeued" in (workdir / "logs" / f"unlabeled-{job}.log").read_text(), 60, logs)
    assert "SIGUSR1 ended the run after step" in log(0)
    wait_for(lambda: (tmp_path / "run" / "metrics.json").exists(), 180, logs)
    wait_for(lambda: not ask(slurm, "squeue", "-h", "-j", job).strip(), 60, logs)
    assert "resuming from" in log(0) and "start 2" in (workdir / "logs" / f"unlabeled-{job}.log").read_text()
    assert "4 processes on 1 machines met" in log(0)

    whole = recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "whole", **options)
    run_recipe("pretrain_clm", whole)
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)


@on_slurm
def test_bad_input_ends_the_job(slurm, tmp_path):
    """Its status is 2, or 143 if one process failed before another had started."""
    workdir = make_workdir(tmp_path)
    job = submit(slurm, workdir, ["--config", "none.yaml"])
    wait_for(lambda: not ask(slurm, "squeue", "-h", "-j", job).strip(), 120, lambda: ask(slurm, "squeue"))
    assert "error: cannot read --config none.yaml" in (workdir / "logs" / f"unlabeled-{job}-rank0.log").read_text()
    output = ask(slurm, "scontrol", "show", "job", job)
    assert "JobState=FAILED" in output and "Restarts=0" in output
    assert re.search(r" ExitCode=(2|143):0", output)


@on_slurm
def test_requeue_limit(slurm, tmp_path):
    workdir = make_workdir(tmp_path)
    (workdir / "recipe.py").write_text("raise SystemExit(75)\n", encoding="utf-8")
    sizes = ["--nodes=1", "--ntasks=1", "--time=30", "--export=ALL,UNLABELED_MAX_RETRIES=1"]
    words = ["scripts/launch.slurm", "recipe.py", "--output_dir", str(tmp_path / "run")]
    job = re.search(r"\d+", ask(slurm, "sbatch", *sizes, *words, cwd=workdir))[0]
    wait_for(lambda: not ask(slurm, "squeue", "-h", "-j", job).strip(), 180, lambda: ask(slurm, "squeue"))
    log = (workdir / "logs" / f"unlabeled-{job}.log").read_text()
    assert log.count("requeued: retry 1 of 1") == 1
    assert "not requeued: after 1 retries in a row there is no new checkpoint" in log
    output = ask(slurm, "scontrol", "show", "job", job)
    assert "JobState=FAILED" in output and "Restarts=1" in output and " ExitCode=75:0" in output


# --- The same logic with faked commands -----------------------------------------------------------------------------

SRUN = """#!/bin/bash
case "$*" in *doctor.py*) exit 0 ;; esac
echo start >> starts
. ./behaviour
"""
SCONTROL = """#!/bin/bash
[ "$1" = requeue ] && echo "requeue $2" >> requeued || echo node1
"""


@pytest.fixture
def launch(tmp_path):
    """Run launch.slurm as often as it asks to be requeued; `behaviour` is the bash code that srun runs.

    Returns:
        The exit status of the last start, the number of starts, and what they printed.
    """
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    (tmp_path / "logs").mkdir()

    def run(behaviour: str, *words: str, **environment: str) -> tuple[int, int, str]:
        (tmp_path / "behaviour").write_text(behaviour, encoding="utf-8")
        for leftover in ("starts", "requeued", "logs/unlabeled-7.retries"):
            (tmp_path / leftover).unlink(missing_ok=True)
        variables = {
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "unlabeled", "SLURM_JOB_NODELIST": "node1", "SLURM_NTASKS": "2",
            "SLURM_NNODES": "1",
        }  # fmt: skip
        output = ""
        for start in range(20):
            (tmp_path / "requeued").unlink(missing_ok=True)
            variables["SLURM_RESTART_COUNT"] = str(start)
            command = ["bash", str(ROOT / "scripts/launch.slurm"), "recipes/pretrain_clm.py", *words]
            done = subprocess.run(command, env=variables | environment, capture_output=True, text=True, timeout=60)
            output += done.stdout + done.stderr
            if not (tmp_path / "requeued").exists():
                break
        starts = tmp_path / "starts"
        return done.returncode, len(starts.read_text().split()) if starts.exists() else 0, output

    return run


def test_retries_without_progress(launch, tmp_path):
    """Two retries and no third; a checkpoint of an earlier job is no progress."""
    (tmp_path / "run" / "checkpoint-300").mkdir(parents=True)
    (tmp_path / "run.yaml").write_text("max_length: 8\noutput_dir: 'run'  # where it goes\n", encoding="utf-8")
    limit = {"UNLABELED_MAX_RETRIES": "2"}
    for words in (("--config", "run.yaml"), ("--config=run.yaml",), ("--output_dir", "run"), ()):
        status, starts, output = launch("exit 75", *words, **limit)
        assert (status, starts) == (75, 3), output
        folder = "run" if words else "the output folder, which is not known"
        assert f"not requeued: after 2 retries in a row there is no new checkpoint in {folder};" in output
        assert "requeued: retry 2 of 2 without a new checkpoint" in output


def test_retries_with_progress(launch, tmp_path):
    """A checkpoint in every third start; the limit is never reached in a row."""
    (tmp_path / "run").mkdir()
    behaviour = """
    count=$(wc -l < starts)
    [ $((count % 3)) -ne 0 ] || mkdir run/checkpoint-$count
    mkdir -p run/.checkpoint-999.incomplete run/checkpoint-888.partial
    [ $count -lt 11 ] && exit 75
    exit 0"""
    words = ("--config", "nowhere.yaml", "--output_dir=run")
    status, starts, output = launch(behaviour, *words, UNLABELED_MAX_RETRIES="2")
    assert (status, starts) == (0, 11), output
    assert "requeued: checkpoint-9 is new" in output
    assert launch(behaviour.replace("% 3", "% 4"), *words, UNLABELED_MAX_RETRIES="2")[:2] == (75, 3)


@pytest.mark.parametrize("status", [1, 2, 134, 137, 143])
def test_only_75_is_requeued(launch, status):
    assert launch(f"exit {status}")[:2] == (status, 1)


@pytest.mark.parametrize("status", [1, 2])
def test_no_requeue_after_failed_peer(launch, status):
    """The status of srun is the highest one of all processes; its messages name the others."""
    message = f"srun: error: node1: task 0: Exited with exit code {status}"
    behaviour = f"echo '{message}' >&2; echo 'srun: error: node1: task 1: Exited with exit code 75' >&2; exit 75"
    last_status, starts, output = launch(behaviour)
    assert (last_status, starts) == (status, 1)
    assert message in output and f"not requeued: a process ended with status {status}" in output
    harmless = behaviour.replace(f"code {status}'", "code 143'")
    assert launch(harmless, UNLABELED_MAX_RETRIES="0")[:2] == (75, 1)


def test_invalid_retry_limit(launch):
    status, starts, output = launch("exit 0", UNLABELED_MAX_RETRIES="many")
    assert (status, starts) == (2, 0) and "UNLABELED_MAX_RETRIES is 'many'; set it to a whole number" in output
