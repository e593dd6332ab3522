"""Isolation of packed documents in both directions, by masks and by lengths."""

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from conftest import CAUSAL, MASKED, MODELS
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, DataCollatorWithFlattening

from unlabeled import UserError
from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
from unlabeled.data.tokenization import load_tokenizer
from unlabeled.models.attention import check_isolation, needs_flat_batches, sliding_window
from unlabeled.models.configs import scratch_config
from unlabeled.models.losses import cross_entropy_sum

LENGTH = 64
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ATTENTION = ("sdpa", "varlen")  # isolation by masks, and by the lengths of documents


def build(model_type: str, tokenizers, attn_implementation: str = "sdpa"):
    """A small random model and its collator."""
    objective = "mlm" if model_type in MASKED else "clm"
    tokenizer = load_tokenizer(tokenizers[objective])
    config = scratch_config(model_type, MODELS[model_type], tokenizer, LENGTH)
    torch.manual_seed(0)
    auto_class = AutoModelForCausalLM if objective == "clm" else AutoModelForMaskedLM
    model = auto_class.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation).eval()
    for parameter in model.parameters():  # with the usual initialization a leak would be too small to notice
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    model.config.use_cache = False
    flat = needs_flat_batches(model.config)
    if objective == "clm":
        return model, tokenizer, DataCollatorForPackedLanguageModeling(tokenizer, max_length=LENGTH, flat=flat)
    window = sliding_window(config)
    return (
        model,
        tokenizer,
        DataCollatorForPackedLanguageModeling(tokenizer, mlm=True, max_length=LENGTH, sliding_window=window, flat=flat),
    )


def documents(tokenizer, lengths, seed: int = 0) -> list[np.ndarray]:
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    rng = np.random.default_rng(seed)
    return [rng.choice(ordinary, length) for length in lengths]


def example(parts: list[np.ndarray]) -> dict:
    ids = np.concatenate(parts)
    return {
        "input_ids": ids,
        "lengths": [len(p) for p in parts],
        "word_starts": np.ones(len(ids), bool),
        "row": 0,
        "epoch": 0,
    }


@torch.no_grad()
def logits(model, collator, *rows: list[np.ndarray]) -> torch.Tensor:
    """Logits of packed rows, unmasked."""
    batch = collator([example(parts) for parts in rows])
    batch.pop("labels")
    for i, parts in enumerate(rows):
        ids = np.concatenate(parts)
        batch["input_ids"].view(len(rows), LENGTH)[i, : len(ids)] = torch.from_numpy(ids)
    return model(**batch).logits.view(len(rows), LENGTH, -1)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("model_type", MODELS)
def test_changed_neighbour(model_type, attention, tokenizers):
    model, tokenizer, collator = build(model_type, tokenizers, attention)
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
                assert difference > 0.1, "the logits of the changed document have to change"
            else:
                assert difference < 1e-5


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("model_type", CAUSAL)
def test_causality(model_type, attention, tokenizers):
    model, tokenizer, collator = build(model_type, tokenizers, attention)
    parts = documents(tokenizer, [40])
    base = logits(model, collator, parts)[0]
    parts[0] = parts[0].copy()
    parts[0][20] = documents(tokenizer, [1], seed=5)[0][0]
    moved = logits(model, collator, parts)[0]
    assert torch.equal(base[:20], moved[:20])
    assert (base[20:40] - moved[20:40]).abs().amax(-1).min() > 0


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("model_type", MODELS)
def test_packed_loss(model_type, attention, tokenizers):
    """The unpacked loss is from a plain call: without positions, with an ordinary mask."""
    model, tokenizer, collator = build(model_type, tokenizers, attention)
    parts = documents(tokenizer, [14, 25, 11, 5])
    packed = logits(model, collator, parts)[0]
    bounds = np.cumsum([0, 14, 25, 11, 5])
    shift = model_type in CAUSAL
    total_packed = total_alone = 0.0
    for part, start, end in zip(parts, bounds[:-1], bounds[1:], strict=True):
        ids = torch.from_numpy(part)[None]
        with torch.no_grad():
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        total_alone += float(cross_entropy_sum(alone, ids, shift))
        total_packed += float(cross_entropy_sum(packed[None, start:end], ids, shift))
        torch.testing.assert_close(packed[start:end], alone[0], atol=2e-5, rtol=1e-4)
    assert total_packed == pytest.approx(total_alone, rel=1e-6)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("model_type", MODELS)
def test_isolation_check(model_type, attention, tokenizers):
    model, _, collator = build(model_type, tokenizers, attention)
    assert check_isolation(model, collator).startswith("checked")


@pytest.mark.parametrize("model_type", MASKED)
def test_leak_of_eager_attention(model_type, tokenizers):
    model, _, collator = build(model_type, tokenizers, attn_implementation="eager")
    with pytest.raises(UserError, match=r"leaks between packed documents .* set attn_implementation to sdpa"):
        check_isolation(model, collator)


def test_leak_of_a_cache(tokenizers):
    model, _, collator = build("llama", tokenizers)
    model.config.use_cache = True
    with pytest.raises(UserError, match="leaks between packed documents"):
        check_isolation(model, collator)


def test_isolation_off(tokenizers):
    model, tokenizer, collator = build("llama", tokenizers)
    collator.isolate_documents = False
    parts = documents(tokenizer, [14, 25])
    base = logits(model, collator, parts)[0, 14:39]
    moved = logits(model, collator, [documents(tokenizer, [14], seed=9)[0], parts[1]])[0, 14:39]
    assert (base - moved).abs().max() > 0.1
    assert check_isolation(model, collator).startswith("off")


def test_modernbert_windows(tokenizers):
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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])])
@pytest.mark.parametrize("isolate_documents", [True, False])
@pytest.mark.parametrize("model_type", MODELS)
def test_gradients_with_lengths_and_masks(model_type, isolate_documents, device, tokenizers):
    """For two rows, the first with three documents and padding; in bfloat16 on a GPU."""
    found = {}
    for attention in ATTENTION:
        model, tokenizer, collator = build(model_type, tokenizers, attention)
        collator.isolate_documents = isolate_documents
        rows = [documents(tokenizer, [14, 25, 11]), documents(tokenizer, [64], seed=1)]
        batch = send_to_device(collator([example(parts) for parts in rows]), model.to(device).device)
        labels = batch.pop("labels")
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            nats = cross_entropy_sum(model(**batch).logits, labels, shift=model_type in CAUSAL)
        nats.backward()
        found[attention] = {
            "loss": nats,
            **{name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        }
    masks, lengths = found.values()
    assert masks.keys() == lengths.keys()
    share = 1e-4 if device == "cpu" else 5e-2
    for name, value in masks.items():
        assert (lengths[name] - value).norm() <= share * value.norm() + 1e-3, name


def test_causal_windows(tokenizers, monkeypatch):
    monkeypatch.setitem(MODELS, "mistral", MODELS["llama"] | {"sliding_window": 6, "num_key_value_heads": 2})
    found = {}
    for window, attention in ((6, "sdpa"), (6, "varlen"), (5, "varlen")):
        MODELS["mistral"]["sliding_window"] = window
        model, tokenizer, collator = build("mistral", tokenizers, attention)
        collator = DataCollatorForPackedLanguageModeling(tokenizer, max_length=LENGTH, flat=collator.flat)
        found[window, attention] = logits(model, collator, documents(tokenizer, [14, 25, 11]))
    torch.testing.assert_close(found[6, "varlen"], found[6, "sdpa"], atol=2e-5, rtol=1e-4)
    assert (found[5, "varlen"] - found[6, "sdpa"]).abs().max() > 1e-2


def test_flat_batches_against_transformers(tokenizers):
    _, tokenizer, collator = build("llama", tokenizers, "varlen")
    rows = [documents(tokenizer, [14, 25, 11]), documents(tokenizer, [64], seed=1)]
    flat = collator([example(parts) for parts in rows])
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    parts = [*rows[0], np.zeros(14, dtype=int), *rows[1]]  # the padding is a document
    theirs = theirs([{"input_ids": part.tolist()} for part in parts])
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert flat[name].dtype == theirs[name].dtype == torch.int32
        assert flat[name].tolist() == theirs[name].tolist() + [128] * (16 - len(theirs[name]))
    assert flat["max_length_q"] == flat["max_length_k"] == LENGTH >= theirs["max_length_q"]
    assert flat["position_ids"].tolist() == theirs["position_ids"].tolist()
    collator.flat = False
    padded = collator([example(parts) for parts in rows])
    assert all(torch.equal(value.view(1, -1), flat[name]) for name, value in padded.items())


def test_leak_without_lengths(tokenizers):
    model, _, collator = build("llama", tokenizers, "varlen")
    collator.flat = False
    with pytest.raises(UserError, match="leaks between packed documents"):
        check_isolation(model, collator)


def test_unsupported_varlen_inputs(tokenizers):
    model, _, _ = build("llama", tokenizers, "varlen")
    ids = torch.tensor([[5, 6, 7]])
    for call in (
        lambda: model.generate(ids, max_new_tokens=2),  # with a cache
        lambda: model(input_ids=ids.expand(2, -1)),
        lambda: model(input_ids=ids, attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool)),
    ):
        with pytest.raises(UserError, match="attn_implementation varlen reads flat batches of packed rows only"):
            call()
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(UserError, match="attn_implementation varlen has no dropout; set attention dropout to 0"):
        model.train()(input_ids=ids)
