"""Evaluation does not depend on the batch size, is repeatable, and equals an independent computation."""

import math

import numpy as np
import pytest
import torch
from conftest import CAUSAL, MODELS
from test_isolation import LENGTH, build

from unlabeled.data.preparing import load_prepared, prepare
from unlabeled.data.rows import EvaluationRows
from unlabeled.data.sources import Source
from unlabeled.training.evaluation import bits_per_byte, token_metrics, token_sums


@pytest.fixture(scope="module")
def setting(corpus, tokenizers, tmp_path_factory):
    """Returns, for a model type, (model, collator, rows of the validation split, manifest)."""
    cache = str(tmp_path_factory.mktemp("prepared"))

    def make(model_type):
        model, tokenizer, collator = build(model_type, tokenizers)
        objective = "clm" if model_type in CAUSAL else "mlm"
        sources = [Source(corpus["train"])], [Source(corpus["validation"])]
        rows, manifest = load_prepared(prepare(*sources, tokenizer, objective, LENGTH, cache))
        return model, collator, rows["validation"], manifest

    return make


@pytest.mark.parametrize("model_type", MODELS)
def test_batch_size(model_type, setting):
    model, collator, rows, _ = setting(model_type)
    losses = [token_sums(model, rows, collator, size, shift=model_type in CAUSAL).loss for size in (1, 3, 8)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[2] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_over_processes(world_size, setting):
    model, collator, rows, _ = setting("bert")
    whole = token_sums(model, rows, collator, 4, shift=False)
    shares = [
        token_sums(model, rows, collator, 4, False, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert sum(share.nats for share in shares) == pytest.approx(whole.nats, rel=1e-6)
    assert (sum(share.target_counts for share in shares) == whole.target_counts).all()


def test_causal_loss(setting):
    """Equals an independent computation: document by document, token by token, from log-probabilities."""
    model, collator, rows, manifest = setting("llama")
    nats, targets = 0.0, 0
    for row in rows:
        for piece in np.split(row["input_ids"], np.cumsum(row["lengths"])[:-1]):
            ids = torch.from_numpy(piece.astype(np.int64))
            with torch.no_grad():
                log_p = model(ids[None]).logits[0].double().log_softmax(-1)
            nats -= sum(float(log_p[i, ids[i + 1]]) for i in range(len(ids) - 1))
            targets += len(ids) - 1
    split = manifest["splits"]["validation"]
    sums = token_sums(model, rows, collator, 8, shift=True)
    assert sums.targets == targets == split["targets"] == split["text_tokens"] + split["documents"]
    assert sums.loss == pytest.approx(nats / targets, rel=1e-6)
    metrics = token_metrics(sums, "clm", split)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / targets), rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / split["bytes"], rel=1e-6)


def test_masked_loss(setting):
    model, collator, rows, _ = setting("bert")
    nats, targets = 0.0, 0
    for example in EvaluationRows(rows).__getitems__(list(range(len(rows)))):
        ids, positions = collator.mask(example)
        start = 0
        for length in example["lengths"]:
            piece = torch.from_numpy(ids[start : start + length])[None]
            with torch.no_grad():
                log_p = model(piece, attention_mask=torch.ones_like(piece)).logits[0].double().log_softmax(-1)
            inside = positions[(positions >= start) & (positions < start + length)]
            nats -= sum(float(log_p[i - start, int(example["input_ids"][i])]) for i in inside)
            targets += len(inside)
            start += length
    sums = token_sums(model, rows, collator, 8, shift=False)
    assert sums.targets == targets
    assert sums.loss == pytest.approx(nats / targets, rel=1e-6)


def test_fixed_masks_and_unchanged_random_state(setting):
    model, collator, rows, _ = setting("bert")
    state = torch.get_rng_state()
    first, second = (token_sums(model, rows, collator, 8, shift=False) for _ in range(2))
    assert first.nats == second.nats and (first.target_counts == second.target_counts).all()
    assert torch.equal(state, torch.get_rng_state())


def test_unigram_entropy(setting):
    model, collator, rows, _ = setting("llama")
    sums = token_sums(model, rows, collator, 8, shift=True)
    ids = np.concatenate([p[1:] for r in rows for p in np.split(r["input_ids"], np.cumsum(r["lengths"])[:-1])])
    _, counts = np.unique(ids, return_counts=True)
    share = counts / counts.sum()
    assert sums.unigram_entropy == pytest.approx(-(share * np.log(share)).sum(), rel=1e-9)


def test_loss_of_untrained_model(corpus, tokenizers, setting):
    from transformers import AutoModelForCausalLM

    model, collator, rows, _ = setting("llama")
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(model.config).eval()
    assert token_sums(fresh, rows, collator, 8, shift=True).loss == pytest.approx(
        math.log(model.config.vocab_size), abs=0.1
    )


def test_bits_per_byte():
    assert bits_per_byte(nats=math.log(2) * 800, text_bytes=100) == pytest.approx(8.0)
