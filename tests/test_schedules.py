"""The learning rate of every step, and evaluation, saving and logging at the end of epochs."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import history, recipe_arguments, run_recipe
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, TrainerControl, TrainerState, get_scheduler

from unlabeled import UserError
from unlabeled.config import PretrainingArguments
from unlabeled.config.training import METRIC_SCHEDULES
from unlabeled.models.schedules import learning_rate_factor
from unlabeled.training.epochs import EpochEnds

WARMUP, STEPS = 4, 12
KWARGS = {
    "warmup_stable_decay": {"num_decay_steps": 3},
    "cosine_with_min_lr": {"min_lr": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 0.1},
}
# Schedules with a linear warm-up; the others are constant or warm up in another way.
LINEAR = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup", "inverse_sqrt",
    "warmup_stable_decay", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
)  # fmt: skip


def arguments(kind: str, warmup: int = WARMUP) -> SimpleNamespace:
    return SimpleNamespace(
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=KWARGS.get(kind),
        learning_rate=1.0,
        get_warmup_steps=lambda steps: warmup,
    )


def learning_rates(factor) -> list[float]:
    """The learning rate of each step, with optimizer and scheduler called as Trainer calls them."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = LambdaLR(optimizer, factor)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def rates_of_transformers(kind: str, warmup: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    (factor,) = get_scheduler(kind, optimizer, warmup, STEPS, KWARGS.get(kind)).lr_lambdas
    return [factor(step) for step in range(STEPS)]


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType if kind.value not in METRIC_SCHEDULES])
def test_rates_of_all_schedules(kind):
    found, theirs = learning_rates(learning_rate_factor(arguments(kind), STEPS)), rates_of_transformers(kind, WARMUP)
    assert found[WARMUP:] == pytest.approx(theirs[WARMUP:]), "after the warm-up, rates are those of transformers"
    if kind in LINEAR:
        assert found[:WARMUP] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    if kind == "constant":
        assert found == [1.0] * STEPS
    assert found[0] > 0, "the first step learns something"
    assert found[:WARMUP] == sorted(found[:WARMUP]) and found[WARMUP - 1] == pytest.approx(max(found))
    assert learning_rates(learning_rate_factor(arguments(kind, warmup=0), STEPS)) == pytest.approx(
        rates_of_transformers(kind, 0)
    )


def test_rates_by_hand():
    assert learning_rates(learning_rate_factor(arguments("linear"), STEPS)) == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    assert learning_rates(learning_rate_factor(arguments("warmup_stable_decay"), STEPS))[-4:-2] == [1, 1]
    cosine = learning_rates(learning_rate_factor(arguments("cosine"), STEPS))
    assert cosine[8] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert learning_rates(learning_rate_factor(arguments("linear", warmup=1), STEPS))[:2] == [1, 1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rates_of_a_run(optimizer, corpus, tokenizers, tmp_path):
    options = {"train_tokens": 6 * 256, "warmup_steps": 3, "lr_scheduler_type": "linear", "learning_rate": 0.01}
    words = recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path, optimizer=optimizer, **options)
    run_recipe("pretrain_clm", words)
    logged = [entry["learning_rate"] for entry in history(tmp_path) if "loss" in entry]
    assert logged == pytest.approx([0.01 * rate for rate in (1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3)])


def test_constant_has_no_warmup(tmp_path):
    budget = {"train_tokens": 6 * 256, "batch_tokens": 256, "max_length": 32, "per_device_train_batch_size": 8}
    args = PretrainingArguments(str(tmp_path), lr_scheduler_type="constant", use_cpu=True, **budget)
    assert args.get_warmup_steps(args.max_steps) == 0
    for kind in METRIC_SCHEDULES:
        with pytest.raises(UserError, match=f"lr_scheduler_type {kind} follows evaluations"):
            PretrainingArguments(str(tmp_path), lr_scheduler_type=kind, use_cpu=True, **budget)


# --- Epochs -----------------------------------------------------------------------------------------------------------


def evaluation_steps(rows: int, rows_per_step: int, steps: int, eval_delay: float = 0) -> list[int]:
    """The steps after which an evaluation is due, as Trainer asks its callbacks."""
    callback, found = EpochEnds(rows, rows_per_step), []
    args = SimpleNamespace(
        logging_strategy="epoch", eval_strategy="epoch", save_strategy="epoch", eval_delay=eval_delay
    )
    for step in range(1, steps + 1):
        control = TrainerControl()
        callback.on_step_end(args, TrainerState(global_step=step, max_steps=steps), control)
        if control.should_evaluate:
            found.append(step)
        if not eval_delay:
            assert control.should_evaluate == control.should_save == control.should_log
    control = TrainerControl(should_evaluate=True, should_save=True, should_log=True)
    callback.on_epoch_end(args, TrainerState(global_step=steps, max_steps=steps), control)
    assert not (control.should_evaluate or control.should_save or control.should_log), "this was done in the last step"
    return found


def test_epoch_ends():
    assert evaluation_steps(rows=8, rows_per_step=4, steps=6) == [2, 4, 6]
    assert evaluation_steps(rows=10, rows_per_step=4, steps=8) == [3, 5, 8], "in the step that takes the last row"
    assert evaluation_steps(rows=10, rows_per_step=4, steps=7) == [3, 5, 7], "and after the last step"
    assert evaluation_steps(rows=3, rows_per_step=8, steps=2) == [1, 2], "a step of several epochs"
    assert evaluation_steps(rows=8, rows_per_step=4, steps=6, eval_delay=1.5) == [4, 6]


def test_strategies_by_epoch(corpus, tokenizers, tmp_path):
    few = tmp_path / "few.jsonl"
    with open(corpus["train"]) as lines:
        few.write_text("".join(line for line, _ in zip(lines, range(7), strict=False)))
    words = recipe_arguments(
        "clm",
        "llama",
        corpus,
        tokenizers,
        tmp_path / "run",
        train_data=few,
        train_tokens=10 * 256,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        eval_on_start="true",
    )
    run_recipe("pretrain_clm", words)
    rows = json.loads((tmp_path / "run" / "lineage.json").read_text())["data"]["splits"]["train"]["rows"]
    steps = [step for step in range(1, 11) if step * 8 // rows > (step - 1) * 8 // rows or step == 10]
    assert 1 < len(steps) < 10, "more than one epoch, of more than one step"
    log = history(tmp_path / "run")
    assert [entry["step"] for entry in log if "loss" in entry] == steps
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [0, *steps]
    saved = {int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*")}
    assert saved == set(steps)


def test_epochs_of_a_stream(corpus, tokenizers, tmp_path):
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        words = recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "run", stream="true", **{name: "epoch"})
        with pytest.raises(UserError, match=f"{name}: epoch needs epochs of a known length"):
            run_recipe("pretrain_clm", words)
    assert not (tmp_path / "run").exists()
