"""Runs recipes in forks of one process, each with a fault, so that none of them has to import everything again.

    python tests/recipe_server.py

Reads a line of JSON for each launch: {"recipe": NAME, "arguments": [...], "processes": 2, "fault": NAME, "log": PATH}.
Answers with {"pid": N}, the process id of the launch, which leads a session of its own, and with {"status": N} when it
has ended.
With several processes it is a launcher: it starts the ranks, waits for all of them, and has the status of the first
that failed. A fault happens in the fifth step, or in the fifth batch of a data-loader worker; "stand_in_PHASE" makes a
phase before or after training take some seconds.
"""

import json
import os
import runpy
import sys
import time

from conftest import ROOT, free_ports
from transformers import GenerationMixin

from unlabeled import UserError
from unlabeled.data import preparing as prepare
from unlabeled.reporting import plots
from unlabeled.training.trainer import ExactTrainerMixin

FAULTY_STEP = 4  # counted from 0
STANDING = 4.0  # seconds
SLOW = 0.2  # seconds for a step, so that there is time to send a signal in the middle of a run


class FaultyCollator:
    """Raises at the fifth batch of a data-loader worker."""

    def __init__(self, collator, error: Exception):
        self.collator = collator
        self.error = error
        self.batches = 0

    def __call__(self, rows):
        if self.batches == FAULTY_STEP:
            raise self.error
        self.batches += 1
        return self.collator(rows)


def plant(fault: str) -> None:
    """Make the recipes of this process fail."""
    errors = {"worker": ValueError("planted in a worker"), "worker_user": UserError("planted, one sentence")}
    train_loader, step = ExactTrainerMixin.get_train_dataloader, ExactTrainerMixin.training_step

    def get_train_dataloader(self):
        loader = train_loader(self)
        inner = getattr(loader, "base_dataloader", loader)
        inner.collate_fn = FaultyCollator(inner.collate_fn, errors[fault])
        return loader

    def training_step(self, *args, **kwargs):
        if fault == "step" and self.state.global_step == FAULTY_STEP and self.args.process_index == 0:
            raise ValueError("planted in a step")
        if fault == "slow":
            time.sleep(SLOW)
        return step(self, *args, **kwargs)

    if fault in errors:
        ExactTrainerMixin.get_train_dataloader = get_train_dataloader
    ExactTrainerMixin.training_step = training_step
    phase = fault.removeprefix("stand_in_")
    if phase == "preparation":
        stand_in(phase, prepare.Split, "close")
    elif phase == "evaluation":
        stand_in(phase, ExactTrainerMixin, "held_out_metrics")
    elif phase == "export":
        stand_in(phase, plots, "plot_loss")


def stand_in(phase: str, owner, name: str) -> None:
    """Let the first call of a function of a class or module take some seconds, in which a signal can be sent."""
    method = getattr(owner, name)

    def slow(*args, **kwargs):
        setattr(owner, name, method)
        print(f"standing in {phase}", flush=True)
        time.sleep(STANDING)
        return method(*args, **kwargs)

    setattr(owner, name, slow)


def run(launch: dict) -> None:
    """Run the recipe as `python recipes/NAME.py` does, up to the end of the process."""
    plant(launch["fault"])
    sys.argv = [launch["recipe"], *launch["arguments"]]
    runpy.run_path(str(ROOT / "recipes" / f"{launch['recipe']}.py"), run_name="__main__")


def run_ranks(launch: dict) -> None:
    """As a launcher does: start a process for each rank, wait for all of them, and fail where one has failed."""
    (port,) = free_ports(1)
    count = launch["processes"]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    address |= {"LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "test"}
    for rank in range(count):
        if not os.fork():
            os.environ.update(address | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            return run(launch)
    statuses = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(count)]
    print("statuses of the ranks:", *statuses, flush=True)
    raise SystemExit(next((status for status in statuses if status), 0))


def serve() -> None:
    """Every fork leaves by returning, or by its exception, so that it ends as any Python process does."""
    for line in sys.stdin:
        launch = json.loads(line)
        process = os.fork()
        if not process:
            os.setsid()
            log = os.open(launch["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            return run_ranks(launch) if launch["processes"] > 1 else run(launch)
        while os.getsid(process) != process:
            time.sleep(0.001)
        print(json.dumps({"pid": process}), flush=True)
        print(json.dumps({"status": os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}), flush=True)


if __name__ == "__main__":
    GenerationMixin.generate = lambda self, ids, **options: ids  # sampling takes longer than all the rest
    serve()
