"""The chunked loss has the value and the gradients of the loss from all logits."""

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


@pytest.mark.parametrize("positions", [1, 7, 64])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("gather", [False, True])
def test_chunked_loss_and_gradients(positions, share, has_bias, gather, monkeypatch):
    """With chunks of 16 positions, of which the last one is shorter, or there is none."""
    monkeypatch.setattr(losses, "logits_at_a_time", lambda device: 16 * 50)
    torch.manual_seed(0)
    hidden_states = torch.randn(positions, 12, dtype=torch.float64)
    weight = torch.randn(50, 12, dtype=torch.float64)
    bias = torch.randn(50, dtype=torch.float64) if has_bias else None
    labels = torch.where(torch.rand(positions) < share, torch.randint(50, (positions,)), -100)
    inputs = [tensor.requires_grad_() for tensor in (hidden_states, weight, bias) if tensor is not None]
    expected = F.cross_entropy(F.linear(hidden_states, weight, bias), labels, ignore_index=-100, reduction="sum")
    loss = linear_cross_entropy_sum(hidden_states, labels, weight, bias, gather)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = torch.autograd.grad(3 * loss, inputs)
    expected_gradients = torch.autograd.grad(3 * expected, inputs)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


def test_large_logits():
    hidden = torch.full((2, 4), 100.0)
    weight = torch.eye(4) * 100
    labels = torch.tensor([0, 3])
    assert linear_cross_entropy_sum(hidden, labels, weight * 1e3).isfinite()
    assert linear_cross_entropy_sum(hidden, labels, weight).item() == pytest.approx(2 * torch.tensor(4.0).log().item())


@pytest.mark.parametrize("targets", [0, 1, 127, 128, 129, 300])
def test_row_counts_in_half_precision(targets, monkeypatch):
    """On a CPU the rows are filled up to a multiple, as oneDNN compiles a kernel for each number of rows."""
    rows = []
    apply = losses.LinearCrossEntropySum.apply

    def record_rows(hidden_states, *args):
        rows.append(len(hidden_states))
        return apply(hidden_states, *args)

    monkeypatch.setattr(losses.LinearCrossEntropySum, "apply", record_rows)
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 12).bfloat16(), torch.randn(50, 12)
    labels = torch.full((300,), -100)
    labels[torch.randperm(300)[:targets]] = 7
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = linear_cross_entropy_sum(hidden, labels, weight)
    assert rows == [min(-(-targets // losses.ROW_MULTIPLE) * losses.ROW_MULTIPLE, 300)]
    expected = F.cross_entropy((hidden @ weight.bfloat16().T).float(), labels, ignore_index=-100, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    gradients = torch.autograd.grad(loss, inputs)
    expected_gradients = torch.autograd.grad(expected, inputs)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.float(), expected_gradient.float(), rtol=0.05, atol=0.05)


def test_accuracy_in_half_precision(monkeypatch):
    """Over 4,096 targets, the chunked loss in bfloat16 is as accurate as the loss from all logits."""
    monkeypatch.setattr(losses, "logits_at_a_time", lambda device: 64 * 128)
    torch.manual_seed(0)
    hidden = torch.randn(4096, 32)
    weight = 0.3 * torch.randn(128, 32)
    labels = torch.randint(128, (4096,))

    def loss_from_logits(hidden: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = hidden @ weight.to(hidden.dtype).T
        return cross_entropy_sum(logits[None], labels[None], shift=False)

    exact_weight = weight.double().requires_grad_()
    exact = loss_from_logits(hidden.double(), labels, exact_weight)
    (exact_gradient,) = torch.autograd.grad(exact, exact_weight)

    def gradient_error(loss_function) -> float:
        parameter = weight.clone().requires_grad_()
        loss = loss_function(hidden.bfloat16(), labels, parameter)
        assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
        (gradient,) = torch.autograd.grad(loss, parameter)
        return float((gradient - exact_gradient).norm() / exact_gradient.norm())

    assert gradient_error(linear_cross_entropy_sum) < 1.1 * gradient_error(loss_from_logits) < 0.02


def loss_and_gradients(model, inputs: dict, labels: torch.Tensor, loss) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    value = loss(model(**inputs), labels, 7)
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def make_model(name: str, tokenizers):
    if name == "bart":
        return AutoModelForSeq2SeqLM.from_config(BartConfig(**BART))
    if name == "gemma2":
        return AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=4))
    if name in SPAN_MODELS:
        tokenizer = load_tokenizer(tokenizers["span"])
        return init_model(AutoModelForSeq2SeqLM, scratch_config(name, SPAN_MODELS[name], tokenizer, 64), "sdpa")
    return build(name, tokenizers)[0]


def make_inputs(model) -> tuple[dict, torch.Tensor]:
    """Model inputs for three rows, and labels with 40 % targets."""
    torch.manual_seed(1)
    ids = torch.randint(5, 90, (3, 20))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    return inputs, torch.where(torch.rand(ids.shape) < 0.4, ids, -100)


COMPILED = [pytest.param(name, True, marks=pytest.mark.slow) for name in ("llama", "modernbert", "t5")]


@pytest.mark.parametrize(
    ("name", "compiled"), [*((name, False) for name in (*MODELS, *SPAN_MODELS, "bart", "gemma2")), *COMPILED]
)
def test_loss_and_gradients_by_architecture(name, compiled, tokenizers):
    """BART adds a bias to its logits and Gemma 2 caps them, so their heads are left to the model."""
    torch.manual_seed(0)
    model = make_model(name, tokenizers).train()
    shift = name in (*CAUSAL, "gemma2")
    inputs, labels = make_inputs(model)
    with torch.no_grad():
        before = model.eval()(**inputs).logits
    model.train()

    def loss_from_logits(outputs, labels, num_items_in_batch):
        return cross_entropy_sum(outputs.logits, labels, shift) / num_items_in_batch

    expected_loss, expected_gradients = loss_and_gradients(model, inputs, labels, loss_from_logits)
    loss = ChunkedLinearCrossEntropy(model, shift, target_share=0.4)
    assert loss.fused == (name not in ("bart", "gemma2"))
    assert loss.head_share == (0.4 if loss.fused else None)
    trained = torch.compile(model) if compiled else model
    value, gradients = loss_and_gradients(trained, inputs, labels, loss)
    assert value == pytest.approx(expected_loss, rel=1e-6)
    gradients = {key.removeprefix("_orig_mod."): gradient for key, gradient in gradients.items()}
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        tolerance = 1e-6 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=tolerance)
    with torch.no_grad():  # in evaluation mode a model returns logits, except in `in_evaluation`
        assert torch.equal(model.eval()(**inputs).logits, before)
        with loss.in_evaluation():
            assert loss(model(**inputs), labels).item() == pytest.approx(7 * expected_loss, rel=1e-6)
        loss.remove()
        assert torch.equal(model.train()(**inputs).logits, before)


def test_autocast(tokenizers):
    """Under autocast the head's product is computed in bfloat16, whatever the dtype of the outputs."""
    model, _, _ = build("llama", tokenizers)
    inputs, labels = make_inputs(model)
    loss = ChunkedLinearCrossEntropy(model.train(), shift=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**inputs)
    assert loss.product_dtype == torch.bfloat16
    exact = loss(model(**inputs), labels, 7)
    assert loss.product_dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**inputs)
    assert 0 < abs(loss(outputs, labels, 7) - exact).item() < 0.02 * exact


def test_output_of_a_training_model(tokenizers):
    """The model returns hidden states under their own name, and logits again in evaluation mode."""
    model, _, _ = build("llama", tokenizers)
    inputs, _ = make_inputs(model)
    loss = ChunkedLinearCrossEntropy(model.train(), shift=True)
    outputs = model(**inputs)
    assert outputs.keys() == {"last_hidden_state"}
    assert outputs.last_hidden_state.shape == (3, 20, MODELS["llama"]["hidden_size"])
    assert model.eval()(**inputs).logits.shape == (3, 20, model.config.vocab_size)
    loss.remove()
    assert model.train()(**inputs).logits.shape == (3, 20, model.config.vocab_size)
