"""Packed documents do not see each other, in either direction, and the packed loss is the unpacked one."""

import numpy as np
import pytest
import torch
from conftest import CAUSAL, MASKED, MODELS
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from unlabeled import UserError
from unlabeled.collators import MaskedCollator, PackedCollator
from unlabeled.losses import token_nats
from unlabeled.modeling import scratch_config, sliding_window
from unlabeled.packing import check_isolation
from unlabeled.tokenization import load_tokenizer

LENGTH = 64


def build(model_type: str, tokenizers, attn_implementation: str = "sdpa"):
    """A small random model and its collator."""
    objective = "clm" if model_type in CAUSAL else "mlm"
    tokenizer = load_tokenizer(tokenizers[objective])
    config = scratch_config(model_type, MODELS[model_type], tokenizer, LENGTH)
    torch.manual_seed(0)
    auto_class = AutoModelForCausalLM if objective == "clm" else AutoModelForMaskedLM
    model = auto_class.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation).eval()
    for parameter in model.parameters():  # the usual initialisation is too small for a leak to show
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    model.config.use_cache = False
    if objective == "clm":
        return model, tokenizer, PackedCollator(tokenizer, max_length=LENGTH)
    return model, tokenizer, MaskedCollator(tokenizer, max_length=LENGTH, sliding_window=sliding_window(config))


def documents(tokenizer, lengths, seed: int = 0) -> list[np.ndarray]:
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    rng = np.random.default_rng(seed)
    return [rng.choice(ordinary, length) for length in lengths]


def example(parts: list[np.ndarray]) -> dict:
    ids = np.concatenate(parts)
    return {"input_ids": ids, "lengths": [len(p) for p in parts], "word_starts": np.ones(len(ids), bool), "row": 0,
            "epoch": 0}  # fmt: skip


@torch.no_grad()
def logits(model, collator, *rows: list[np.ndarray]) -> torch.Tensor:
    """Logits of packed rows, unmasked."""
    batch = collator([example(parts) for parts in rows])
    batch.pop("labels")
    for i, parts in enumerate(rows):
        ids = np.concatenate(parts)
        batch["input_ids"][i, : len(ids)] = torch.from_numpy(ids)
    return model(**batch).logits


@pytest.mark.parametrize("model_type", MODELS)
def test_changing_a_document_leaves_its_neighbours_unchanged(model_type, tokenizers):
    model, tokenizer, collator = build(model_type, tokenizers)
    parts = documents(tokenizer, [14, 25, 11])  # and 14 of padding
    base = logits(model, collator, parts)[0]
    bounds = np.cumsum([0, 14, 25, 11])
    for changed in range(3):
        others = list(parts)
        others[changed] = documents(tokenizer, [len(parts[changed])], seed=9)[0]
        moved = logits(model, collator, others)[0]
        for document in range(3):
            span = slice(bounds[document], bounds[document + 1])
            difference = (base[span] - moved[span]).abs().max()
            if document == changed:
                assert difference > 0.1, "the document itself has to change, or this test cannot fail"
            else:
                assert difference < 1e-5


@pytest.mark.parametrize("model_type", CAUSAL)
def test_the_future_is_invisible(model_type, tokenizers):
    model, tokenizer, collator = build(model_type, tokenizers)
    parts = documents(tokenizer, [40])
    base = logits(model, collator, parts)[0]
    parts[0] = parts[0].copy()
    parts[0][20] = documents(tokenizer, [1], seed=5)[0][0]
    moved = logits(model, collator, parts)[0]
    assert torch.equal(base[:20], moved[:20])
    assert (base[20:40] - moved[20:40]).abs().amax(-1).min() > 0


@pytest.mark.parametrize("model_type", MODELS)
def test_packed_loss_is_unpacked_loss(model_type, tokenizers):
    """The unpacked side is the model called plainly, as its users will: no positions, an ordinary mask."""
    model, tokenizer, collator = build(model_type, tokenizers)
    parts = documents(tokenizer, [14, 25, 11, 5])
    packed = logits(model, collator, parts)[0]
    bounds = np.cumsum([0, 14, 25, 11, 5])
    shift = model_type in CAUSAL
    total_packed = total_alone = 0.0
    for part, start, end in zip(parts, bounds[:-1], bounds[1:], strict=True):
        ids = torch.from_numpy(part)[None]
        with torch.no_grad():
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        total_alone += float(token_nats(alone, ids, shift))
        total_packed += float(token_nats(packed[None, start:end], ids, shift))
        torch.testing.assert_close(packed[start:end], alone[0], atol=2e-5, rtol=1e-4)
    assert total_packed == pytest.approx(total_alone, rel=1e-6)


@pytest.mark.parametrize("model_type", MODELS)
def test_the_check_at_the_start_of_a_run_passes_where_it_should(model_type, tokenizers):
    model, _, collator = build(model_type, tokenizers)
    assert check_isolation(model, collator).startswith("checked")


@pytest.mark.parametrize("model_type", MASKED)
def test_eager_attention_ignores_a_bool_mask_and_is_refused(model_type, tokenizers):
    model, _, collator = build(model_type, tokenizers, attn_implementation="eager")
    with pytest.raises(UserError, match=r"leaks between packed documents .* set attn_implementation to sdpa"):
        check_isolation(model, collator)


def test_a_cache_leaks_and_is_refused(tokenizers):
    model, _, collator = build("llama", tokenizers)
    model.config.use_cache = True
    with pytest.raises(UserError, match="leaks between packed documents"):
        check_isolation(model, collator)


def test_without_isolation_documents_see_each_other_and_the_plan_says_so(tokenizers):
    model, tokenizer, collator = build("llama", tokenizers)
    collator.isolate_documents = False
    parts = documents(tokenizer, [14, 25])
    base = logits(model, collator, parts)[0, 14:39]
    moved = logits(model, collator, [documents(tokenizer, [14], seed=9)[0], parts[1]])[0, 14:39]
    assert (base - moved).abs().max() > 0.1
    assert check_isolation(model, collator).startswith("off")


def test_modernbert_windows_stay_on(tokenizers):
    """A bare 4-D mask would switch the sliding layers off; the dictionary of masks keeps them."""
    model, tokenizer, collator = build("modernbert", tokenizers)
    parts = documents(tokenizer, [60])
    ids = torch.from_numpy(parts[0])[None]
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        bare = model(input_ids=ids, attention_mask=torch.ones(1, 1, 60, 60, dtype=torch.bool)).logits[0]
    packed = logits(model, collator, parts)[0, :60]
    torch.testing.assert_close(packed, plain, atol=2e-5, rtol=1e-4)
    assert (bare - plain).abs().max() > 1e-2
