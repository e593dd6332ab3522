"""If any process of a run fails or is killed, all end soon, the message gives the reason, and the rerun is exact."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, WORDS, recipe_arguments, run_recipe, weights
from transformers import GenerationMixin

from unlabeled import Stopped
from unlabeled.runtime.checkpoints import find_newest_checkpoint

STEPS = 12
END_SECONDS = 30  # until the last process of a disturbed run must have ended
UNDISTURBED_SECONDS = 300  # for an undisturbed run on a busy machine
RECIPES = {"clm": "pretrain_clm", "embed": "embed"}


@dataclass
class Launch:
    """A run in a session of its own."""

    server: subprocess.Popen
    pid: int
    log: Path
    status: int | None = None

    def wait(self, seconds: float = END_SECONDS) -> int:
        """Wait until all processes of the session have ended, and return the exit status of the first one.

        Raises:
            AssertionError: A process still runs after this many seconds.
        """
        started = time.monotonic()
        while running := self.processes():
            if time.monotonic() - started > seconds:
                self.end()
                raise AssertionError(f"{running} still run: {self.output[-3000:]}")
            time.sleep(0.1)
        return self.end()

    def end(self) -> int:
        """Kill the remaining processes, so that the server takes the next launch. Returns the exit status."""
        if self.status is None:
            for pid in self.processes():
                os.kill(pid, signal.SIGKILL)
            self.status = json.loads(self.server.stdout.readline())["status"]
        return self.status

    def processes(self) -> dict[int, int]:
        """The running processes of the session, `{pid: parent}`."""
        parents = {}
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    parents[process.pid] = process.ppid()
        return parents

    def children(self, parent: int | None = None) -> list[int]:
        return sorted(pid for pid, its_parent in self.processes().items() if its_parent == (parent or self.pid))

    def wait_for(self, text: str) -> None:
        """Wait until the run has printed a text."""
        deadline = time.monotonic() + 60
        is_alive = True
        while text not in self.output:
            assert is_alive and time.monotonic() < deadline, self.output[-3000:]
            time.sleep(0.02)
            is_alive = bool(self.processes())  # checked before the last output is read

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture(autouse=True)
def no_samples(monkeypatch):
    """Skip sampling, which takes longer than the rest of such runs; recipe_server.py does the same."""
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, ids, **options: ids)


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Start recipes in forks of one process (recipe_server.py), one after the other."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "recipe_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    folder = tmp_path_factory.mktemp("logs")
    count = iter(range(1000))

    launches = []

    def start(recipe: str, arguments: list[str], fault: str = "", processes: int = 1) -> Launch:
        for launch in launches[-1:]:
            launch.end()  # of a test that failed
        log = folder / f"{next(count)}.log"
        request = {"recipe": recipe, "arguments": arguments, "fault": fault, "processes": processes, "log": str(log)}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        launches.append(Launch(server, json.loads(server.stdout.readline())["pid"], log))
        return launches[-1]

    yield start
    server.stdin.close()
    server.wait(30)


@pytest.fixture(scope="module")
def arguments(corpus, tokenizers, tmp_path_factory) -> Callable[..., list[str]]:
    """Make the command line of a run of twelve steps that saves after every other one: (objective, folder, options)."""
    work = tmp_path_factory.mktemp("processes")
    saving = {"save_steps": 2, "save_total_limit": 2}

    def make(objective: str, folder: Path, **options) -> list[str]:
        if objective == "clm":
            options = {"train_tokens": STEPS * 256} | saving | options
            return recipe_arguments("clm", "llama", corpus, tokenizers, folder, **options)
        if not (work / "base").exists():
            run_recipe("pretrain_clm", recipe_arguments("clm", "llama", corpus, tokenizers, work / "base"))
            for split, first in (("train", 0), ("validation", 60)):
                rows = [
                    {"anchor": " ".join(WORDS[i : i + 3]), "positive": " ".join(WORDS[i + 3 : i + 9])}
                    for i in range(first, first + 60)
                ]
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                (work / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        options = {
            "model_name_or_path": work / "base", "output_dir": folder, "max_length": 24,
            "train_data": work / "train.jsonl", "eval_data": work / "validation.jsonl", "train_pairs": STEPS * 8,
            "batch_pairs": 8, "per_device_train_batch_size": 8, "precision": "fp32", "use_cpu": "true",
            "logging_steps": 1,
        } | saving | options  # fmt: skip
        return [word for key, value in options.items() for word in (f"--{key}", str(value))]

    return make


@pytest.fixture(scope="module")
def whole(arguments, launch, tmp_path_factory) -> Callable[[str, int], dict]:
    """The weights of an undisturbed run: (objective, number of processes)."""
    folder, known = tmp_path_factory.mktemp("whole"), {}

    def make(objective: str, processes: int) -> dict:
        name = f"{objective}-{processes}"
        if name not in known:
            words = arguments(objective, folder / name, **share(processes))
            run = launch(RECIPES[objective], words, processes=processes)
            assert run.wait(UNDISTURBED_SECONDS) == 0, run.output[-3000:]
            known[name] = weights(folder / name)
        return known[name]

    return make


def share(processes: int) -> dict:
    """Options for the same batch on any number of processes; a single process loads its data with workers."""
    return {"per_device_train_batch_size": 8 // processes, "dataloader_num_workers": 2 if processes == 1 else 0}


def assert_exact(folder: Path, expected: dict) -> None:
    tensors = weights(folder)
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].equal(expected[name]) for name in expected)


# --- Failures and their messages --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "fault", "status", "message"),
    [
        ("clm", "step", 1, "ValueError: planted in a step"),
        ("embed", "step", 1, "ValueError: planted in a step"),
        ("clm", "worker", 1, "ValueError: planted in a worker"),
        ("embed", "worker", 1, "ValueError: planted in a worker"),
        ("clm", "worker_user", 2, "error: planted, one sentence\n"),
    ],
)
def test_exception_with_workers(objective, fault, status, message, launch, arguments, whole, tmp_path):
    words = arguments(objective, tmp_path, **share(1))
    run = launch(RECIPES[objective], words, fault)
    run.wait_for("planted")
    assert run.wait() == status, run.output[-3000:]
    assert message in run.output
    assert ("Traceback" in run.output) == (status == 1)
    assert not (tmp_path / "metrics.json").exists()
    run_again(objective, arguments, tmp_path, whole(objective, 1))


def run_again(objective: str, arguments, folder: Path, expected: dict) -> None:
    """Run again in this process without workers, whose number changes nothing."""
    assert find_newest_checkpoint(str(folder)), "there is nothing to resume from"
    run_recipe(RECIPES[objective], arguments(objective, folder))
    assert_exact(folder, expected)


@pytest.mark.slow
@pytest.mark.parametrize("objective", RECIPES)
def test_killed_worker(objective, launch, arguments, whole, tmp_path):
    words = arguments(objective, tmp_path, **share(1))
    run = launch(RECIPES[objective], words, "slow")
    run.wait_for("step      3")
    workers = run.children()
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    assert run.wait() == Stopped.STATUS, run.output[-3000:]
    assert "stopped: a data-loader worker was ended from outside (Killed), as the system does" in run.output
    assert "Traceback" not in run.output
    run_again(objective, arguments, tmp_path, whole(objective, 1))


@pytest.mark.slow
@pytest.mark.parametrize("objective", RECIPES)
@pytest.mark.parametrize("victim", ["launcher", "rank"])
def test_killed_launcher_or_rank(victim, objective, launch, arguments, whole, tmp_path):
    words = arguments(objective, tmp_path, **share(2))
    run = launch(RECIPES[objective], words, "slow", processes=2)
    run.wait_for("step      3")
    os.kill(run.pid if victim == "launcher" else run.children()[1], signal.SIGKILL)
    status = run.wait()
    if victim == "launcher":
        assert status == -signal.SIGKILL
        reached = int(Path(find_newest_checkpoint(str(tmp_path))).name.removeprefix("checkpoint-"))
        assert f"stopped: the end of the launcher ended the run after step {reached} of {STEPS}" in run.output
    else:
        assert "statuses of the ranks:" in run.output and str(Stopped.STATUS) in run.output.splitlines()[-1]
        assert "has lost another one" in run.output
    assert "Traceback" not in run.output
    run = launch(RECIPES[objective], words, processes=2)
    assert run.wait(UNDISTURBED_SECONDS) == 0, run.output[-3000:]
    assert "resuming from" in run.output
    assert_exact(tmp_path, whole(objective, 2))


# --- Signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["preparation", "evaluation", "export"])
def test_signal_outside_training(phase, launch, arguments, whole, tmp_path):
    """One sentence and status 75, no unfinished files, and an exact rerun."""
    number = {"preparation": signal.SIGINT, "evaluation": signal.SIGTERM, "export": signal.SIGUSR1}[phase]
    words = arguments("clm", tmp_path / "run", prepared_dir=tmp_path / "prepared")
    run = launch("pretrain_clm", words, f"stand_in_{phase}")
    run.wait_for(f"standing in {phase}")
    os.kill(run.pid, number)
    assert run.wait() == Stopped.STATUS, run.output[-3000:]
    assert "Traceback" not in run.output
    if phase == "preparation":
        assert run.output.endswith(f"stopped: {number.name} ended the process; the same command starts again\n")
        assert not list((tmp_path / "prepared").glob("*incomplete*"))
    else:
        outcome = "the same command repeats what follows the last step"
        assert run.output.endswith(f"stopped: {number.name} ended the process; {outcome}\n")
        assert not (tmp_path / "run" / "metrics.json").exists()
    run_recipe("pretrain_clm", words)
    assert_exact(tmp_path / "run", whole("clm", 1))


@pytest.mark.slow
def test_signal_without_last_checkpoint(launch, arguments, whole, tmp_path):
    """The model is saved first, as no checkpoint has the last step."""
    run = launch("pretrain_clm", arguments("clm", tmp_path, save_strategy="no"), "stand_in_evaluation")
    run.wait_for("standing in evaluation")
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait(UNDISTURBED_SECONDS) == 0, run.output[-3000:]
    assert "SIGTERM: the last step is in no checkpoint, so the run saves its model first" in run.output
    assert_exact(tmp_path, whole("clm", 1))


@pytest.mark.slow
def test_signal_during_preparation(launch, arguments, tmp_path):
    words = arguments("clm", tmp_path / "run", prepared_dir=tmp_path / "prepared", **share(2))
    run = launch("pretrain_clm", words, "stand_in_preparation", processes=2)
    run.wait_for("standing in preparation")
    os.kill(run.children()[0], signal.SIGTERM)
    assert run.wait() == Stopped.STATUS, run.output[-3000:]
    assert "stopped: SIGTERM ended the process; the same command starts again" in run.output
    assert "Traceback" not in run.output and run.output.endswith("statuses of the ranks: 75 75\n")


@pytest.mark.slow
def test_suspended_run(launch, arguments, whole, tmp_path):
    """SIGSTOP for longer than the watchdog allows, as when a laptop is suspended."""
    run = launch("pretrain_clm", arguments("clm", tmp_path, ddp_timeout=2, **share(1)), "slow")
    run.wait_for("step      3")
    os.killpg(run.pid, signal.SIGSTOP)
    time.sleep(6)
    os.killpg(run.pid, signal.SIGCONT)
    assert run.wait(UNDISTURBED_SECONDS) == 0, run.output[-3000:]
    assert_exact(tmp_path, whole("clm", 1))


# --- Scripts ----------------------------------------------------------------------------------------------------------

LIBRARY = """
import hashlib, time
from unlabeled import exit_on_user_error
with exit_on_user_error():
    print("started", flush=True)
    {work}
"""


@pytest.mark.parametrize(
    "work", ["time.sleep(60)", "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"], ids=["python", "library"]
)
def test_signal_in_a_script(work):
    """One line and status 75, even while a library keeps Python from running a handler."""
    script = subprocess.Popen(
        [sys.executable, "-c", LIBRARY.format(work=work)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert script.stdout.readline() == "started\n"
    time.sleep(0.5)  # until it is inside the library
    script.send_signal(signal.SIGTERM)
    _, errors = script.communicate(timeout=20)
    assert script.returncode == Stopped.STATUS
    assert errors == "stopped: SIGTERM ended the process; the same command starts again\n"


RANK = """
import atexit, os, signal
import torch.distributed as dist
from unlabeled import Stopped, UserError, exit_on_user_error

class Last:
    def __del__(self, write=os.write):
        write(1, b"finalized")

last = Last()
atexit.register(print, "exit functions have run")
with exit_on_user_error():
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    {end}
"""


@pytest.mark.parametrize(
    ("end", "status", "message"),
    [
        ("pass", 0, ""),
        ("raise UserError('bad')", 2, "error: bad\n"),
        ("raise Stopped('cut short')", 75, "stopped: cut short\n"),
        (
            "os.kill(os.getpid(), signal.SIGTERM)",
            75,
            "stopped: SIGTERM ended the process; the same command starts again\n",
        ),
        ("raise RuntimeError('Connection reset by peer')", 75, "stopped: process 0 has lost another one (Connection"),
        ("raise KeyError('bug')", 1, "KeyError: 'bug'\n"),
    ],
    ids=["finished", "user error", "stopped", "signal", "lost peer", "bug"],
)
def test_end_of_a_rank(end, status, message):
    """Its exit functions run, and the interpreter is not finalized: a thread of the process group may abort then."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", RANK.format(end=end)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert process.returncode == status, process.stderr
    assert process.stdout == "exit functions have run\n"
    assert message in process.stderr
    assert ("Traceback" in process.stderr) == (status == 1)
