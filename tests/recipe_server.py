"""Runs recipes with faults in forks of one process, so that everything is imported only once.

    python tests/recipe_server.py

Reads a line of JSON for each launch: {"recipe": NAME, "arguments": [...], "processes": 2, "fault": NAME, "log": PATH}.
Answers with {"pid": N}, the process id of the launch, a session leader, and with {"status": N} when it has ended.
With several processes, the launch is a launcher: it starts the ranks, waits for all of them, and ends with the status
of the first that failed.

Faults: "step" raises in the fifth step, "worker" and "worker_user" in the fifth batch of a data-loader worker; "slow"
makes steps slow, and "stand_in_PHASE" a phase before or after training, so that a signal can be sent in it.
"""

import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from types import ModuleType

from conftest import ROOT, free_ports
from transformers import GenerationMixin

from unlabeled import UserError
from unlabeled.data.row_writer import SplitWriter
from unlabeled.reporting import plots
from unlabeled.training.trainer import ExactTrainerMixin

FAULTY_STEP = 4  # counted from 0
PHASE_SECONDS = 4.0
STEP_SECONDS = 0.2


class FaultyCollator:
    """Raises at the fifth batch of a data-loader worker."""

    def __init__(self, collator: Callable, error: Exception):
        self.collator = collator
        self.error = error
        self.batches = 0

    def __call__(self, rows: list) -> dict:
        if self.batches == FAULTY_STEP:
            raise self.error
        self.batches += 1
        return self.collator(rows)


def plant_fault(fault: str) -> None:
    """Make the recipes of this process fail or slow down."""
    errors = {"worker": ValueError("planted in a worker"), "worker_user": UserError("planted, one sentence")}
    original_get_train_dataloader = ExactTrainerMixin.get_train_dataloader
    original_training_step = ExactTrainerMixin.training_step

    def get_train_dataloader(self):
        loader = original_get_train_dataloader(self)
        inner = getattr(loader, "base_dataloader", loader)
        inner.collate_fn = FaultyCollator(inner.collate_fn, errors[fault])
        return loader

    def training_step(self, *args, **kwargs):
        if fault == "step" and self.state.global_step == FAULTY_STEP and self.args.process_index == 0:
            raise ValueError("planted in a step")
        if fault == "slow":
            time.sleep(STEP_SECONDS)
        return original_training_step(self, *args, **kwargs)

    if fault in errors:
        ExactTrainerMixin.get_train_dataloader = get_train_dataloader
    ExactTrainerMixin.training_step = training_step
    phase = fault.removeprefix("stand_in_")
    if phase == "preparation":
        slow_down(phase, SplitWriter, "close")
    elif phase == "evaluation":
        slow_down(phase, ExactTrainerMixin, "held_out_metrics")
    elif phase == "export":
        slow_down(phase, plots, "plot_loss")


def slow_down(phase: str, owner: type | ModuleType, name: str) -> None:
    """Make the first call of a function of a class or module take some seconds."""
    original = getattr(owner, name)

    def slow(*args, **kwargs):
        setattr(owner, name, original)
        print(f"standing in {phase}", flush=True)
        time.sleep(PHASE_SECONDS)
        return original(*args, **kwargs)

    setattr(owner, name, slow)


def run(launch: dict) -> None:
    """Run a recipe as `python recipes/NAME.py` does."""
    plant_fault(launch["fault"])
    sys.argv = [launch["recipe"], *launch["arguments"]]
    runpy.run_path(str(ROOT / "recipes" / f"{launch['recipe']}.py"), run_name="__main__")


def run_ranks(launch: dict) -> None:
    """Start a process for each rank, wait for all of them, and fail with the status of the first that failed."""
    (port,) = free_ports(1)
    count = launch["processes"]
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "TORCHELASTIC_RUN_ID": "test",
    }
    for rank in range(count):
        if os.fork() == 0:
            os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            run(launch)
            return
    statuses = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(count)]
    print("statuses of the ranks:", *statuses, flush=True)
    raise SystemExit(next((status for status in statuses if status), 0))


def serve() -> None:
    """Answer launches until stdin is closed. A fork returns or raises, so that it ends like any Python process."""
    for line in sys.stdin:
        launch = json.loads(line)
        process = os.fork()
        if process == 0:
            os.setsid()
            log = os.open(launch["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if launch["processes"] > 1:
                run_ranks(launch)
            else:
                run(launch)
            return
        while os.getsid(process) != process:
            time.sleep(0.001)
        print(json.dumps({"pid": process}), flush=True)
        _, wait_status = os.waitpid(process, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(wait_status)}), flush=True)


if __name__ == "__main__":
    GenerationMixin.generate = lambda self, ids, **options: ids  # samples would take longer than the rest of a run
    serve()
