"""Whole runs of the recipes: what they leave behind, what can be continued, and what an option must not change."""

import hashlib
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import CAUSAL, MODELS, history, recipe_arguments, run_recipe, weights
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from unlabeled.reporting.lineage import weights_sha256
from unlabeled.training.evaluation import token_sums

METRICS = {
    "eval_loss",
    "perplexity",
    "bits_per_byte",
    "train_tokens",
    "train_seconds",
    "tokens_per_second",
    "steps",
    "parameters",
}


def train(objective, model_type, corpus, tokenizers, folder, **options) -> dict:
    """Run a recipe and return its metrics."""
    run_recipe(f"pretrain_{objective}", recipe_arguments(objective, model_type, corpus, tokenizers, folder, **options))
    return json.loads(Path(folder, "metrics.json").read_text())


def objective_of(model_type: str) -> str:
    return "clm" if model_type in CAUSAL else "mlm"


@pytest.fixture(scope="module")
def finished(corpus, tokenizers, tmp_path_factory):
    """A short run of each objective: objective -> (folder, metrics)."""
    folders = {objective: tmp_path_factory.mktemp(f"run_{objective}") for objective in ("clm", "mlm")}
    return {
        "clm": (folders["clm"], train("clm", "llama", corpus, tokenizers, folders["clm"])),
        "mlm": (folders["mlm"], train("mlm", "modernbert", corpus, tokenizers, folders["mlm"])),
    }


def assert_complete(folder: Path, metrics: dict) -> None:
    """Everything that a finished run leaves is there, and the card has no blanks."""
    assert metrics.keys() >= METRICS - ({"bits_per_byte"} if "restored_spans" in metrics else set())
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
        "lineage.json",
        "loss.png",
        "samples.md",
    }
    assert "training_args.bin" not in names and "incomplete" not in names
    assert json.loads((folder / "config.json").read_text()).get("use_cache", True) is True
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (folder / "samples.md").read_text()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and f"{metrics['eval_loss']:.4f}" in card
    assert not any(blank in card for blank in ("None", "nan", "[]", "TODO", "More information needed", "{", "}"))


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_what_is_left_behind(objective, finished):
    folder, metrics = finished[objective]
    assert_complete(folder, metrics)
    assert metrics["train_tokens"] == 1024 and metrics["steps"] == 4
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    if objective == "mlm":
        assert metrics["mlm_probability"] == 0.3 and math.isfinite(metrics["eval_loss_at_training_rate"])
    lineage = json.loads((folder / "lineage.json").read_text())
    assert lineage["parent"] is None and lineage["plan"]["world_size"] == 1
    assert lineage["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in lineage["versions"]["torch"]
    assert len(lineage["git"]["commit"]) == 40
    assert all(len(digest) == 64 for source in lineage["data"]["train"] for digest in source["files"].values())


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_the_saved_model_scores_what_the_run_says(objective, finished, corpus, tokenizers):
    """Loaded by name as anyone would, and evaluated afresh."""
    from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
    from unlabeled.data.preparing import load_prepared, prepare
    from unlabeled.data.sources import Source
    from unlabeled.models.attention import sliding_window

    folder, metrics = finished[objective]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    auto_class = AutoModelForCausalLM if objective == "clm" else AutoModelForMaskedLM
    model = auto_class.from_pretrained(folder)
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    sources = [Source(corpus["train"])], [Source(corpus["validation"])]
    rows, _ = load_prepared(prepare(*sources, tokenizer, objective, 32, str(Path(corpus["train"]).parent / "prepared")))
    if objective == "clm":
        model.config.use_cache = False
        collator = DataCollatorForPackedLanguageModeling(tokenizer, max_length=32)
    else:
        collator = DataCollatorForPackedLanguageModeling(
            tokenizer, mlm=True, mlm_probability=0.15, max_length=32, sliding_window=sliding_window(model.config)
        )
    sums = token_sums(model, rows["validation"], collator, 5, shift=objective == "clm")
    assert sums.loss == pytest.approx(metrics["eval_loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODELS)
def test_a_run_learns(model_type, corpus, tokenizers, tmp_path):
    steps = 60 if model_type in CAUSAL else 300  # fewer targets in a step
    options = {"train_tokens": 256 * steps, "learning_rate": 0.01, "optimizer": "muon", "logging_steps": 10}
    metrics = train(objective_of(model_type), model_type, corpus, tokenizers, tmp_path, **options)
    log = [entry["loss"] for entry in history(tmp_path) if "loss" in entry]
    assert log[-1] < log[0] - 0.5
    assert metrics["eval_loss"] < metrics["unigram_entropy"], "better than a predictor that ignores the context"


def test_a_finished_run_is_not_trained_again(finished, corpus, tokenizers, capsys):
    folder, _ = finished["clm"]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    train("clm", "llama", corpus, tokenizers, folder)
    assert "finished" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_a_run_can_be_continued(objective, finished, corpus, tokenizers, tmp_path, capsys):
    """With a learning rate of 0 the child is its parent, whose weights and lineage it names."""
    parent, metrics = finished[objective]
    options = {"model_name_or_path": str(parent), "learning_rate": 0.0, "weight_decay": 0.0, "train_tokens": 256}
    arguments = recipe_arguments(objective, "llama", corpus, tokenizers, tmp_path, **options)
    for key in ("--model_type", "--config_overrides", "--tokenizer_name_or_path"):
        del arguments[arguments.index(key) : arguments.index(key) + 2]
    run_recipe(f"pretrain_{objective}", arguments)
    child = json.loads((tmp_path / "metrics.json").read_text())
    assert child["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    lineage = json.loads((tmp_path / "lineage.json").read_text())
    assert lineage["parent"]["weights"] == weights_sha256(str(parent))
    assert lineage["parent"]["lineage"]["metrics"]["eval_loss"] == metrics["eval_loss"]
    assert f"continued from {parent}" in capsys.readouterr().out


def test_schedules_follow_from_the_budget(corpus, tokenizers, tmp_path):
    options = {
        "train_tokens": 256 * 20, "lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 0.2,
        "decay_fraction": 0.5, "learning_rate": 1.0, "max_grad_norm": 1e-9, "loss_spike_threshold": 0,
    }  # fmt: skip
    train("clm", "llama", corpus, tokenizers, tmp_path, **options)
    rates = [entry["learning_rate"] for entry in history(tmp_path) if "loss" in entry]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:11] == pytest.approx([1.0] * 7)
    assert all(later < earlier for earlier, later in pairwise(rates[10:])) and rates[-1] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_activation_checkpointing_and_workers_change_nothing(objective, corpus, tokenizers, tmp_path, finished):
    options = {"activation_checkpointing": "true", "dataloader_num_workers": 2}
    model_type = "llama" if objective == "clm" else "modernbert"
    train(objective, model_type, corpus, tokenizers, tmp_path / "other", **options)
    plain, other = weights(finished[objective][0]), weights(tmp_path / "other")
    for name in plain:
        torch.testing.assert_close(plain[name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_trackers(corpus, tokenizers, tmp_path, monkeypatch):
    """TensorBoard and trackio get loss, tokens and held-out figures; neither needs a network."""
    import sqlite3

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    config = tmp_path / "config.yaml"
    config.write_text(
        "report_to: [tensorboard, trackio]\nproject: unlabeled-test\neval_strategy: steps\neval_steps: 2\n"
    )
    train("clm", "llama", corpus, tokenizers, tmp_path / "run", config=config)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = next(path for path in (tmp_path / "run").rglob("events.out.tfevents*"))
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    assert {"train/loss", "train/tokens", "eval/loss", "train/grad_norm"} <= set(accumulator.Tags()["scalars"])
    database = next((tmp_path / "trackio").glob("*.db"))
    rows = sqlite3.connect(database).execute("select metrics from metrics").fetchall()
    assert any(b"train/loss" in bytes(row[0]) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "modernbert"])
def test_compiling_changes_nothing(model_type, corpus, tokenizers, tmp_path):
    objective = objective_of(model_type)
    plain = train(objective, model_type, corpus, tokenizers, tmp_path / "plain")
    compiled = train(objective, model_type, corpus, tokenizers, tmp_path / "compiled", compile="true")
    assert json.loads((tmp_path / "compiled" / "lineage.json").read_text())["plan"]["compiled"] is True
    assert compiled["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-4)


@pytest.mark.slow
def test_bf16_is_close_to_fp32(corpus, tokenizers, tmp_path, finished):
    metrics = train("clm", "llama", corpus, tokenizers, tmp_path / "bf16", precision="bf16")
    assert metrics["eval_loss"] == pytest.approx(finished["clm"][1]["eval_loss"], rel=5e-3)
    assert metrics["eval_loss"] != finished["clm"][1]["eval_loss"]
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16").values()} == {torch.float32}


def test_the_seed_is_the_whole_difference(corpus, tokenizers, tmp_path, finished):
    def digest(folder) -> str:
        return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()

    train("mlm", "modernbert", corpus, tokenizers, tmp_path / "same")
    train("mlm", "modernbert", corpus, tokenizers, tmp_path / "other", seed=1)
    assert digest(tmp_path / "same") == digest(finished["mlm"][0]) != digest(tmp_path / "other")
