"""Parameter groups, Muon's update against PyTorch's, and the state of the optimizers."""

import pytest
import torch
from conftest import MODELS, SPAN_MODELS
from test_isolation import build
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from unlabeled.models.optimizers import (
    MuonWithAdamW,
    OptimizerFactory,
    assert_coverage,
    describe_coverage,
    init_scale_lr_multiplier,
    orthogonalize,
    parameter_roles,
)


def make_optimizer(model: torch.nn.Module, name: str) -> torch.optim.Optimizer:
    return OptimizerFactory()(model, name, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parameter_groups(model_type, name, tokenizers):
    model, _, _ = build(model_type, tokenizers)
    optimizer = make_optimizer(model, name)
    covered = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(covered) == len(set(covered)) == len(list(model.parameters()))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for parameter_name, parameter in model.named_parameters():
        expected = parameter.dim() == 2 and id(parameter) not in embeddings
        assert (id(parameter) in decayed) == expected, parameter_name
    if name == "muon":
        by_muon = [p for group in optimizer.param_groups if group["use_muon"] for p in group["params"]]
        assert all(p.dim() == 2 and id(p) not in embeddings for p in by_muon)
        head = model.get_output_embeddings()
        assert all(p is not head.weight for p in by_muon)
        layers = sum(p.numel() for n, p in model.named_parameters() if ".layer" in n or ".h." in n if p.dim() == 2)
        assert sum(p.numel() for p in by_muon) >= layers > 0
        assert f"Muon {sum(p.numel() for p in by_muon):,}" in describe_coverage(model, "muon")


@pytest.mark.parametrize("model_type", SPAN_MODELS)
def test_t5_learning_rates(model_type):
    """`init_scale_lr_multiplier` is the scale of transformers' initialization, and of AdamW's first step."""
    torch.manual_seed(0)
    sizes = SPAN_MODELS[model_type] | {"vocab_size": 512, "tie_word_embeddings": model_type == "t5"}
    config = AutoConfig.for_model(model_type, **sizes)
    model = AutoModelForSeq2SeqLM.from_config(config)
    optimizer = make_optimizer(model, "adamw")
    assert optimizer.param_groups[0]["lr"] == 1e-3  # Trainer logs this one
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    drawn = {name: p.std().item() * model.config.d_model**0.5 for name, p in model.named_parameters() if p.dim() == 2}
    for name, parameter in model.named_parameters():
        if name.endswith((".q.weight", ".k.weight", "shared.weight", "lm_head.weight")):
            assert rates[id(parameter)] / 1e-3 == pytest.approx(drawn[name], rel=0.2), name
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = (before[name] - parameter).abs().mean().item()
        assert moved == pytest.approx(1e-3 * init_scale_lr_multiplier(model, name), rel=1e-3), name


def test_uncovered_parameter(tokenizers):
    model, _, _ = build("llama", tokenizers)
    with pytest.raises(AssertionError, match="trainable"):
        assert_coverage(torch.optim.AdamW(list(model.parameters())[1:]), model)


def test_untied_head(tokenizers):
    model, _, _ = build("llama", tokenizers)
    assert parameter_roles(model)["head"] == ["lm_head.weight"]
    assert parameter_roles(build("bert", tokenizers)[0])["head"] == []


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 16, 64), (2, 64, 16)])
def test_orthogonalize(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.min() > 0.5 and values.max() < 1.3
    # The singular vectors are kept, so the result is close to U V^T.
    x = torch.randn(shape)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    exact = u @ v
    cosine = (orthogonalize(x) * exact).sum((-2, -1)) / exact.norm(dim=(-2, -1)) / orthogonalize(x).norm(dim=(-2, -1))
    assert cosine.min() > 0.95


def test_muon_against_torch():
    """torch.optim.Muon runs the same iteration in bfloat16."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(48, 32)) for _ in range(2)]
    twins = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    ours = MuonWithAdamW([{"params": weights, "use_muon": True}], lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(twins, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = [weight.detach().clone() for weight in weights]
    for step in range(3):
        torch.manual_seed(step)
        for weight, twin in zip(weights, twins, strict=True):
            weight.grad = torch.randn_like(weight)
            twin.grad = weight.grad.clone()
        ours.step()
        theirs.step()
    for weight, twin, before in zip(weights, twins, start, strict=True):
        assert (weight - twin).norm() / (weight - before).norm() < 0.02


def test_adamw_against_torch():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(20))
    twin = torch.nn.Parameter(weight.detach().clone())
    ours = MuonWithAdamW([{"params": [weight], "weight_decay": 0.1}], lr=0.01, betas=(0.9, 0.95))
    theirs = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    for step in range(4):
        weight.grad = torch.randn(20, generator=torch.Generator().manual_seed(step))
        twin.grad = weight.grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(weight, twin)


def test_optimizer_state(tmp_path, tokenizers):
    """Saved and loaded after two steps, the third is bit for bit the same."""

    def run(reload_after):
        torch.manual_seed(0)
        model, _, _ = build("llama", tokenizers)
        optimizer = make_optimizer(model, "muon")
        for step in range(4):
            if step == reload_after:
                torch.save(optimizer.state_dict(), tmp_path / "o.pt")
                optimizer = make_optimizer(model, "muon")
                optimizer.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
            torch.manual_seed(step)
            model.zero_grad()
            model(input_ids=torch.randint(0, 300, (2, 16))).logits.square().mean().backward()
            optimizer.step()
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(run(None), run(2), strict=True))
