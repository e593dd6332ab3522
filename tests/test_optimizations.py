"""What makes a run fast leaves its losses as they were: fifty steps with and without, to a stated tolerance."""

import json

import pytest
from conftest import recipe_arguments, run_recipe

from unlabeled.models.losses import ChunkedLinearCrossEntropy

STEPS = 50
OBJECTIVES = {"clm": "llama", "mlm": "modernbert", "span": "t5"}


@pytest.fixture(scope="module")
def run(corpus, tokenizers, tmp_path_factory):
    """Makes the training losses and the held-out loss of fifty steps."""

    def make(objective: str, **options) -> list[float]:
        folder = tmp_path_factory.mktemp(objective)
        options = {"train_tokens": STEPS * 256, "learning_rate": 0.003, "save_strategy": "no"} | options
        words = recipe_arguments(objective, OBJECTIVES[objective], corpus, tokenizers, folder, **options)
        run_recipe(f"pretrain_{objective}", words)
        losses = [entry["loss"] for entry in json.loads((folder / "history.json").read_text()) if "loss" in entry]
        assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5, "it has to learn, or this test cannot fail"
        return [*losses, json.loads((folder / "metrics.json").read_text())["eval_loss"]]

    return make


@pytest.fixture(scope="module")
def plain(run):
    """The run to compare with, made when it is first asked for: fp32, not compiled, the head at the targets."""
    found: dict[str, list[float]] = {}
    return lambda objective: found[objective] if objective in found else found.setdefault(objective, run(objective))


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_chunked_head(objective, run, plain, monkeypatch):
    with_it = plain(objective)
    monkeypatch.setattr(ChunkedLinearCrossEntropy, "_head_is_last", lambda self, model: False)
    without = run(objective)
    assert without != with_it, "the sums are made in another order, or the lever was not off"
    assert without == pytest.approx(with_it, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_compilation(objective, run, plain):
    assert run(objective, compile="true") == pytest.approx(plain(objective), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_varlen_attention(objective, run, plain):
    without = run(objective, attn_implementation="varlen")
    assert without != plain(objective), "sums are made in another order, or the lever was not off"
    assert without == pytest.approx(plain(objective), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_bf16(objective, run, plain):
    """Half precision rounds to three digits; the losses agree to one in a hundred."""
    found = run(objective, precision="bf16")
    assert found == pytest.approx(plain(objective), rel=1e-2)
    assert found != pytest.approx(plain(objective), rel=1e-6), "or it did not train in it"


@pytest.mark.slow
def test_data_loader_workers(run, plain):
    assert run("clm", dataloader_num_workers=1) == plain("clm")
