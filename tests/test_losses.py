"""The head at the targets: the same loss and the same gradients as from logits, for less work and memory."""

import pytest
import torch
import torch.nn.functional as F
from conftest import CAUSAL, MODELS, SPAN_MODELS
from test_isolation import build
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BartConfig, Gemma2Config

from unlabeled.data.tokenization import load_tokenizer
from unlabeled.models import losses
from unlabeled.models.configs import scratch_config
from unlabeled.models.loading import init_model
from unlabeled.models.losses import ChunkedLinearCrossEntropy, cross_entropy_sum, linear_cross_entropy_sum

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {
    "vocab_size": 96, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("places", [1, 7, 64])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gather", [False, True])
def test_head_nats_are_those_of_all_logits(places, share, biased, gather, monkeypatch):
    """Chunks of 16 positions, so that the last one is shorter, or there is none."""
    monkeypatch.setattr(losses, "logits_at_a_time", lambda device: 16 * 50)
    torch.manual_seed(0)
    hidden, weight = torch.randn(places, 12, dtype=torch.float64), torch.randn(50, 12, dtype=torch.float64)
    bias = torch.randn(50, dtype=torch.float64) if biased else None
    labels = torch.where(torch.rand(places) < share, torch.randint(50, (places,)), -100)
    given = [tensor.requires_grad_() for tensor in (hidden, weight, bias) if tensor is not None]
    expected = F.cross_entropy(F.linear(hidden, weight, bias), labels, ignore_index=-100, reduction="sum")
    found = linear_cross_entropy_sum(hidden, labels, weight, bias, gather)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = (torch.autograd.grad(3 * nats, given) for nats in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_large_scores_do_not_overflow():
    hidden, weight = torch.full((2, 4), 100.0), torch.eye(4) * 100
    labels = torch.tensor([0, 3])
    assert linear_cross_entropy_sum(hidden, labels, weight * 1e3).isfinite()
    assert linear_cross_entropy_sum(hidden, labels, weight).item() == pytest.approx(2 * torch.tensor(4.0).log().item())


@pytest.mark.parametrize("targets", [0, 1, 127, 128, 129, 300])
def test_half_precision_on_a_cpu_has_few_numbers_of_rows(targets, monkeypatch):
    """Positions without a target fill up to a multiple, for oneDNN compiles a kernel for each number; the sum and
    the gradients stay the same."""
    rows = []
    apply = losses.LinearCrossEntropySum.apply
    monkeypatch.setattr(
        losses.LinearCrossEntropySum, "apply", lambda hidden, *rest: rows.append(len(hidden)) or apply(hidden, *rest)
    )
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 12).bfloat16(), torch.randn(50, 12)
    labels = torch.full((300,), -100)
    labels[torch.randperm(300)[:targets]] = 7
    given = [hidden.requires_grad_(), weight.requires_grad_()]
    found = linear_cross_entropy_sum(hidden, labels, weight)
    assert rows == [min(-(-targets // losses.ROW_MULTIPLE) * losses.ROW_MULTIPLE, 300)]
    expected = F.cross_entropy((hidden @ weight.bfloat16().T).float(), labels, ignore_index=-100, reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    for ours, theirs in zip(torch.autograd.grad(found, given), torch.autograd.grad(expected, given), strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.05)


def test_half_precision_sums_in_float32(monkeypatch):
    """The mean over 4,096 targets in chunks is as near to the truth as from logits at once."""
    monkeypatch.setattr(losses, "logits_at_a_time", lambda device: 64 * 128)
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(4096, 32), 0.3 * torch.randn(128, 32), torch.randint(128, (4096,))
    own = weight.double().requires_grad_()
    exact = cross_entropy_sum((hidden.double() @ own.T)[None], labels[None], shift=False)
    (true,) = torch.autograd.grad(exact, own)
    found = []
    for way in (
        linear_cross_entropy_sum,
        lambda h, y, w: cross_entropy_sum((h @ w.to(h.dtype).T)[None], y[None], shift=False),
    ):
        own = weight.clone().requires_grad_()
        nats = way(hidden.bfloat16(), labels, own)
        (gradient,) = torch.autograd.grad(nats, own)
        assert nats.item() == pytest.approx(exact.item(), rel=1e-3)
        found.append((gradient - true).norm() / true.norm())
    assert found[0] < 1.1 * found[1] < 0.02


def step(model, inputs: dict, labels: torch.Tensor, loss) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    value = loss(model(**inputs), labels, 7)
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def made(name: str, tokenizers):
    if name == "bart":
        return AutoModelForSeq2SeqLM.from_config(BartConfig(**BART))
    if name == "gemma2":
        return AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=4))
    if name in SPAN_MODELS:
        tokenizer = load_tokenizer(tokenizers["span"])
        return init_model(AutoModelForSeq2SeqLM, scratch_config(name, SPAN_MODELS[name], tokenizer, 64), "sdpa")
    return build(name, tokenizers)[0]


def inputs_of(model) -> tuple[dict, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(5, 90, (3, 20))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    return inputs, torch.where(torch.rand(ids.shape) < 0.4, ids, -100)


COMPILED = [pytest.param(name, True, marks=pytest.mark.slow) for name in ("llama", "modernbert", "t5")]


@pytest.mark.parametrize(
    ("name", "compiled"), [*((name, False) for name in (*MODELS, *SPAN_MODELS, "bart", "gemma2")), *COMPILED]
)
def test_loss_and_gradients_of_every_architecture(name, compiled, tokenizers):
    """BART adds a bias to its logits and Gemma 2 caps them: there, the head is left to the model."""
    torch.manual_seed(0)
    model, shift = made(name, tokenizers).train(), name in (*CAUSAL, "gemma2")
    inputs, labels = inputs_of(model)
    with torch.no_grad():
        before = model.eval()(**inputs).logits
    model.train()
    expected = step(
        model, inputs, labels, lambda outputs, labels, n: cross_entropy_sum(outputs.logits, labels, shift) / n
    )
    loss = ChunkedLinearCrossEntropy(model, shift, target_share=0.4)
    assert loss.fused == (name not in ("bart", "gemma2"))
    assert loss.head_share == (0.4 if loss.fused else None)
    found = step(torch.compile(model) if compiled else model, inputs, labels, loss)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    names = {key.removeprefix("_orig_mod."): gradient for key, gradient in found[1].items()}
    assert names.keys() == expected[1].keys()
    for key, gradient in expected[1].items():
        torch.testing.assert_close(names[key], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-7)
    with torch.no_grad():  # a model in evaluation mode has its logits, but for those who ask for the loss
        assert torch.equal(model.eval()(**inputs).logits, before)
        with loss.in_evaluation():
            assert loss(model(**inputs), labels).item() == pytest.approx(7 * expected[0], rel=1e-6)
        loss.remove()
        assert torch.equal(model.train()(**inputs).logits, before)


def test_autocast_is_seen(tokenizers):
    """What trains in bfloat16 makes the head's product in it, whatever the precision of what comes out."""
    model, _, _ = build("llama", tokenizers)
    inputs, labels = inputs_of(model)
    loss = ChunkedLinearCrossEntropy(model.train(), shift=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**inputs)
    assert loss.product_dtype == torch.bfloat16
    exact = loss(model(**inputs), labels, 7)
    assert loss.product_dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**inputs)
    assert 0 < abs(loss(outputs, labels, 7) - exact).item() < 0.02 * exact
