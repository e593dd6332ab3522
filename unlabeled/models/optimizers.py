"""AdamW, or Muon for the hidden matrices and AdamW for the rest; every trainable parameter in exactly one group."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.adamw import adamw

from unlabeled.errors import UserError

# Keller Jordan's quintic: five steps bring the singular values of a matrix into about [0.7, 1.2].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def parameter_roles(model: nn.Module) -> dict[str, list[str]]:
    """Names of the trainable parameters by role.

    `hidden`: matrices between hidden layers; `head`: the matrix of an output head that is not tied to the embedding;
    `embedding`: every embedding table; `vector`: norms and biases. Only the first two are decayed.
    """
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head_weight = id(head.weight) if head is not None and getattr(head, "weight", None) is not None else None
    roles: dict[str, list[str]] = {"hidden": [], "head": [], "embedding": [], "vector": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves flat shards behind
        if id(parameter) in embeddings:
            role = "embedding"
        elif len(shape) != 2:
            role = "vector"
        else:
            role = "head" if id(parameter) == head_weight else "hidden"
        roles[role].append(name)
    return roles


def init_scale_lr_multiplier(model: nn.Module, name: str) -> float:
    """How large T5 draws a matrix, compared with 1 / sqrt(d_model); 1 for all other models.

    Its queries have the 1 / sqrt(d_kv) of attention folded in; its embeddings and its head have deviation 1. Steps of
    AdamW and Muon are of one size for any matrix, so T5's are multiplied by this scale, as those of Adafactor are, with
    which it was trained: otherwise its attention saturates before it has learned anything (docs/LOG.md).
    """
    d_kv, d_model = getattr(model.config, "d_kv", None), getattr(model.config, "d_model", None)
    if not d_kv or not d_model:
        return 1.0
    if name.endswith(("shared.weight", "embed_tokens.weight", "lm_head.weight")):
        return d_model**0.5
    return d_kv**-0.5 if name.endswith(".q.weight") else 1.0


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrices, roughly, by Newton-Schulz iteration.

    bfloat16 where the device is fast with it, float32 on a CPU: without matrix units for bfloat16 it is slower there by
    two orders of magnitude, which is why torch.optim.Muon, always in bfloat16, is not used.

    Args:
        matrices: (batch, rows, columns) of one shape.
    """
    a, b, c = NEWTON_SCHULZ
    dtype = torch.float32 if matrices.device.type == "cpu" else torch.bfloat16
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # x = a x + (b gram + c gram²) x, each sum made by the product that it ends with
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def fast_bf16(use_cpu: bool) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on this device.

    A CPU without AMX or AVX512-BF16 emulates them: 0.9 against 110 GFLOP/s, measured on two cores of an AMD EPYC with
    AVX2.
    """
    if use_cpu:
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") or capabilities.get("bf16"))
    return torch.accelerator.current_accelerator().type == "cuda" and torch.cuda.is_bf16_supported(
        including_emulation=False
    )


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the groups marked `use_muon`, AdamW for the others.

    The update of a matrix is scaled by 0.2 sqrt(max(rows, columns)), so that its root mean square is that of AdamW's
    and one learning rate and weight decay serve both (Liu et al. 2025, arXiv:2502.16982).
    """

    def __init__(self, groups: Iterable[dict], lr: float, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8, momentum=0.95):
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas), "eps": eps, "momentum": momentum}
        super().__init__(groups, {"use_muon": False, **defaults})

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            (self._muon if group["use_muon"] else self._adamw)(group, parameters)
        return loss

    def _muon(self, group: dict, parameters: list[torch.Tensor]) -> None:
        by_shape: dict[torch.Size, list[torch.Tensor]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, same in by_shape.items():  # one batched product for all matrices of a shape
            for p in same:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta, gradients = [self.state[p]["momentum"] for p in same], [p.grad for p in same]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
            updates = orthogonalise(torch.stack(nesterov)).unbind()
            torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(same, list(updates), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

    def _adamw(self, group: dict, parameters: list[torch.Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p].update(step=torch.zeros((), device=p.device), **zeros)
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class BuildOptimizer:
    """An optimizer factory for `Trainer(optimizer_cls_and_kwargs=(BuildOptimizer, kwargs))`."""

    def __call__(self, model: nn.Module, optimizer: str, lr: float, weight_decay: float, betas, eps: float):
        roles = parameter_roles(model)
        parameters = dict(model.named_parameters())

        def groups(*names: str, decay: bool, **options) -> list[dict]:
            by_scale: dict[float, list] = {1.0: []}  # first, since Trainer logs the rate of the first group
            for name in (name for role in names for name in roles[role]):
                by_scale.setdefault(init_scale_lr_multiplier(model, name), []).append(parameters[name])
            options |= {"weight_decay": weight_decay if decay else 0.0}
            return [{"params": p, "lr": lr * scale, **options} for scale, p in by_scale.items() if p]

        common = {"lr": lr, "betas": betas, "eps": eps}
        rest = groups("embedding", "vector", decay=False)
        if optimizer == "muon":
            hidden = groups("hidden", decay=True, use_muon=True)
            built = MuonWithAdamW([*hidden, *groups("head", decay=True), *rest], **common)
        else:
            built = torch.optim.AdamW([*groups("hidden", "head", decay=True), *rest], fused=True, **common)
        assert_coverage(built, model)
        return built


def assert_coverage(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Every trainable parameter is in exactly one group, or training would silently leave it alone."""
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    if len(held) != len(set(held)) or set(held) != wanted:
        raise AssertionError(f"the optimizer holds {len(held)} parameters, {len(wanted)} are trainable")


def describe_coverage(model: nn.Module, optimizer: str) -> str:
    """Which parameters which rule updates, for the plan."""
    parameters = dict(model.named_parameters())
    sizes = {
        role: sum(getattr(parameters[name], "ds_numel", parameters[name].numel()) for name in names)
        for role, names in parameter_roles(model).items()
    }
    decayed = sizes["hidden"] + sizes["head"]
    undecayed = sizes["embedding"] + sizes["vector"]
    if optimizer == "muon":
        return f"Muon {sizes['hidden']:,} + AdamW {sizes['head'] + undecayed:,} parameters, {decayed:,} decayed"
    return f"AdamW {decayed + undecayed:,} parameters, {decayed:,} decayed"


def check_optimizer(optimizer: str, sharded: bool) -> None:
    """Raises UserError for an unknown optimizer, or Muon where gradients are shards and so are no matrices."""
    if optimizer not in ("adamw", "muon"):
        raise UserError(f"optimizer {optimizer!r} is unknown; set it to adamw or muon")
    if optimizer == "muon" and sharded:
        raise UserError(
            "optimizer muon needs whole matrices and DeepSpeed ZeRO shards them; set optimizer to adamw, or use DDP"
        )
