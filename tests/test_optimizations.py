"""Optimizations do not change the losses: fifty steps with and without each, to a stated tolerance."""

import json

import pytest
from conftest import recipe_arguments, run_recipe

from unlabeled.models.losses import ChunkedLinearCrossEntropy

STEPS = 50
OBJECTIVES = {"clm": "llama", "mlm": "modernbert", "span": "t5"}


@pytest.fixture(scope="module")
def run(corpus, tokenizers, tmp_path_factory):
    """Returns the training losses and the held-out loss of fifty steps."""

    def make(objective: str, **options) -> list[float]:
        folder = tmp_path_factory.mktemp(objective)
        options = {"train_tokens": STEPS * 256, "learning_rate": 0.003, "save_strategy": "no"} | options
        words = recipe_arguments(objective, OBJECTIVES[objective], corpus, tokenizers, folder, **options)
        run_recipe(f"pretrain_{objective}", words)
        losses = [entry["loss"] for entry in json.loads((folder / "history.json").read_text()) if "loss" in entry]
        assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5, "the model has to learn"
        return [*losses, json.loads((folder / "metrics.json").read_text())["eval_loss"]]

    return make


@pytest.fixture(scope="module")
def plain(run):
    """The baseline of an objective, run once: fp32, not compiled, the head computed at the targets."""
    found: dict[str, list[float]] = {}
    return lambda objective: found[objective] if objective in found else found.setdefault(objective, run(objective))


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_chunked_head(objective, run, plain, monkeypatch):
    with_chunked_head = plain(objective)
    monkeypatch.setattr(ChunkedLinearCrossEntropy, "_head_is_last", lambda self, model: False)
    without = run(objective)
    assert without != with_chunked_head, "sums have another order, so equal losses would mean no change"
    assert without == pytest.approx(with_chunked_head, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_compilation(objective, run, plain):
    assert run(objective, compile="true") == pytest.approx(plain(objective), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_varlen_attention(objective, run, plain):
    without = run(objective, attn_implementation="varlen")
    assert without != plain(objective), "sums have another order, so equal losses would mean no change"
    assert without == pytest.approx(plain(objective), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_bf16(objective, run, plain):
    """bfloat16 has three significant digits; the losses agree to 1 %."""
    found = run(objective, precision="bf16")
    assert found == pytest.approx(plain(objective), rel=1e-2)
    assert found != pytest.approx(plain(objective), rel=1e-6), "equal losses would mean that it trained in fp32"


@pytest.mark.slow
def test_data_loader_workers(run, plain):
    assert run("clm", dataloader_num_workers=1) == plain("clm")
