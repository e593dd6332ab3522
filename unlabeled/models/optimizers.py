"""AdamW, or Muon for hidden matrices and AdamW for the rest; each trainable parameter is in exactly one group."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from unlabeled import compat

# Coefficients a, b, c of Keller Jordan's quintic iteration (https://kellerjordan.github.io/posts/muon): five steps
# bring the singular values of a matrix into about [0.7, 1.2].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MUON_SCALE = 0.2  # times sqrt(max(rows, columns)): the root mean square of AdamW's updates (arXiv:2502.16982, eq. 4)


# --- Parameter groups -------------------------------------------------------------------------------------------------


def parameter_roles(model: nn.Module) -> dict[str, list[str]]:
    """Names of the trainable parameters by role.

    Args:
        model: may be sharded by ZeRO-3.

    Returns:
        A dictionary with these keys:

        - `hidden`: matrices between hidden layers
        - `head`: the matrix of an output head that is not tied to the embedding
        - `embedding`: embedding tables
        - `vector`: norms, biases and everything else that is not a matrix

        Weight decay applies to the first two.
    """
    embeddings = _embedding_parameters(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head_weight = getattr(head, "weight", None)
    roles: dict[str, list[str]] = {"hidden": [], "head": [], "embedding": [], "vector": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in embeddings:
            role = "embedding"
        elif len(compat.whole_shape(parameter)) != 2:
            role = "vector"
        elif parameter is head_weight:
            role = "head"
        else:
            role = "hidden"
        roles[role].append(name)
    return roles


def _embedding_parameters(model: nn.Module) -> set[int]:
    """`id`s of the parameters of all embedding tables."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return {id(parameter) for table in tables for parameter in table.parameters()}


def init_scale_lr_multiplier(model: nn.Module, name: str) -> float:
    """Factor of the learning rate of a T5 parameter; 1 for all other models.

    It is the standard deviation of the parameter's initialization, relative to 1 / sqrt(d_model). T5 folds the
    1 / sqrt(d_kv) of attention into its queries, and draws its embeddings and its head with standard deviation 1. The
    updates of AdamW and Muon have one size for any matrix, so T5's are multiplied by this scale, as by Adafactor, with
    which T5 was trained: otherwise its attention saturates before it has learned anything (docs/LOG.md).

    Args:
        model: a model with a transformers configuration.
        name: of one of its parameters.
    """
    d_kv = getattr(model.config, "d_kv", None)
    d_model = getattr(model.config, "d_model", None)
    if not d_kv or not d_model:
        return 1.0
    if name.endswith(("shared.weight", "embed_tokens.weight", "lm_head.weight")):
        return d_model**0.5
    if name.endswith(".q.weight"):
        return d_kv**-0.5
    return 1.0


# --- Muon -------------------------------------------------------------------------------------------------------------


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximate the nearest (semi-)orthogonal matrices by Newton-Schulz iteration.

    Each step is X <- a X + b (X X^T) X + c (X X^T)^2 X with the coefficients `NEWTON_SCHULZ`. It runs in float32 on a
    CPU and in bfloat16 on other devices: on a CPU without matrix units for bfloat16 that would be slower by two orders
    of magnitude, which is why `torch.optim.Muon`, which always uses bfloat16, is not used.

    Args:
        matrices: (batch, rows, columns).
        steps: iterations.

    Returns:
        (batch, rows, columns), in the dtype of `matrices`.
    """
    a, b, c = NEWTON_SCHULZ
    dtype = torch.float32 if matrices.device.type == "cpu" else torch.bfloat16
    x = matrices.to(dtype)
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    if is_tall:
        x = x.mT
    return x.to(matrices.dtype)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for parameter groups with `use_muon`, AdamW for the others.

    With gradient g, momentum m and learning rate lr, the update of a matrix W is

        m <- momentum m + (1 - momentum) g
        W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(rows, columns)) orthogonalize(momentum m + (1 - momentum) g)

    The factor makes the root mean square of the update that of AdamW, so that one learning rate and one weight decay
    serve both (Liu et al. 2025, arXiv:2502.16982).

    Args:
        groups: parameter groups; those with `use_muon: True` hold matrices only.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        betas: of AdamW.
        eps: of AdamW.
        momentum: of Muon.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ) -> None:
        defaults = {
            "use_muon": False,
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": tuple(betas),
            "eps": eps,
            "momentum": momentum,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["use_muon"]:
                self._muon_step(group, parameters)
            else:
                self._adamw_step(group, parameters)
        return loss

    def _muon_step(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        matrices_by_shape: dict[torch.Size, list[torch.Tensor]] = {}
        for parameter in parameters:
            matrices_by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, matrices in matrices_by_shape.items():  # one batched product for all matrices of a shape
            for matrix in matrices:
                if "momentum" not in self.state[matrix]:
                    self.state[matrix]["momentum"] = torch.zeros_like(matrix)
            momenta = [self.state[matrix]["momentum"] for matrix in matrices]
            gradients = [matrix.grad for matrix in matrices]
            compat.lerp_all_(momenta, gradients, 1 - group["momentum"])
            nesterov = compat.lerp_all(gradients, momenta, group["momentum"])
            updates = orthogonalize(torch.stack(nesterov)).unbind()
            compat.mul_all_(matrices, 1 - group["lr"] * group["weight_decay"])
            compat.add_all_(matrices, updates, alpha=-group["lr"] * MUON_SCALE * max(shape) ** 0.5)

    def _adamw_step(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],  # max_exp_avg_sqs, for amsgrad
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


# --- For Trainer ------------------------------------------------------------------------------------------------------


class OptimizerFactory:
    """For `Trainer(optimizer_cls_and_kwargs=(OptimizerFactory, training_args.optimizer_kwargs))`.

    Trainer calls an instance with the model and the keyword arguments.
    """

    def __call__(
        self,
        model: nn.Module,
        optimizer: str,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> torch.optim.Optimizer:
        """Create the optimizer of a model.

        Args:
            model: the model to train.
            optimizer: "adamw", or "muon" for the hidden matrices and AdamW for the rest.
            lr: peak learning rate.
            weight_decay: applies to hidden matrices and the head.
            betas: of AdamW.
            eps: of AdamW.
        """
        roles = parameter_roles(model)
        embeddings_and_vectors = roles["embedding"] + roles["vector"]
        if optimizer == "muon":
            groups = [
                *_parameter_groups(model, roles["hidden"], lr, weight_decay, use_muon=True),
                *_parameter_groups(model, roles["head"], lr, weight_decay),
                *_parameter_groups(model, embeddings_and_vectors, lr, 0.0),
            ]
            created = MuonWithAdamW(groups, lr=lr, betas=betas, eps=eps)
        else:
            groups = [
                *_parameter_groups(model, roles["hidden"] + roles["head"], lr, weight_decay),
                *_parameter_groups(model, embeddings_and_vectors, lr, 0.0),
            ]
            created = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
        assert_coverage(created, model)
        return created


def _parameter_groups(
    model: nn.Module, names: list[str], lr: float, weight_decay: float, **options: Any
) -> list[dict[str, Any]]:
    """One parameter group for each learning rate; that with the multiplier 1 is first, as Trainer logs its rate."""
    parameters = dict(model.named_parameters())
    by_multiplier: dict[float, list[torch.Tensor]] = {1.0: []}
    for name in names:
        by_multiplier.setdefault(init_scale_lr_multiplier(model, name), []).append(parameters[name])
    groups = []
    for multiplier, members in by_multiplier.items():
        if members:
            groups.append({"params": members, "lr": lr * multiplier, "weight_decay": weight_decay, **options})
    return groups


def assert_coverage(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Check that every trainable parameter is in exactly one group; otherwise it would silently not be trained.

    Raises:
        AssertionError: a parameter is in no group or in several, or is not trainable.
    """
    covered = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if len(covered) != len(set(covered)) or set(covered) != trainable:
        raise AssertionError(f"the optimizer holds {len(covered)} parameters, {len(trainable)} are trainable")


def describe_coverage(model: nn.Module, optimizer: str) -> str:
    """How many parameters each optimizer updates and how many are decayed, for the run plan."""
    parameters = dict(model.named_parameters())
    sizes: dict[str, int] = {}
    for role, names in parameter_roles(model).items():
        sizes[role] = sum(compat.whole_numel(parameters[name]) for name in names)
    decayed = sizes["hidden"] + sizes["head"]
    not_decayed = sizes["embedding"] + sizes["vector"]
    if optimizer == "muon":
        return f"Muon {sizes['hidden']:,} + AdamW {sizes['head'] + not_decayed:,} parameters, {decayed:,} decayed"
    return f"AdamW {decayed + not_decayed:,} parameters, {decayed:,} decayed"


# --- Settings ---------------------------------------------------------------------------------------------------------
