"""Parameters, FLOPs and steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unlabeled import compat
from unlabeled.errors import UserError

if TYPE_CHECKING:  # a plan is made without loading torch, which takes longer than the plan
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, by what they cost.

    `total` counts each distinct parameter once, tied or not. `embedding` is the input tables (token, position, token
    type), which are looked up. `matmul` is the weights that every token is multiplied with, output head included, also
    when the head is tied to an input table; `head` is the output head's share of it. The parts therefore overlap. Of an
    encoder-decoder `encoder` is the share of `matmul` that inputs are multiplied with, not targets: the encoder, and
    the keys and values of what the decoder sees of it.
    """

    total: int
    embedding: int
    matmul: int
    head: int
    encoder: int = 0

    @property
    def hidden(self) -> int:
        """Weights of the hidden matrices: what Muon updates, the rest falls to AdamW."""
        return self.matmul - self.head


CROSS_ATTENTION = r"(EncDecAttention|encoder_attn|cross_attn)\.([kv]|[kv]_proj)$"  # of T5, of BART, of T5Gemma 2


def count_parameters(model: PreTrainedModel) -> ParameterCounts:
    """Count a dense model's parameters, on any device, the meta device included, and under DeepSpeed ZeRO-3.

    Matrices are the weights of `nn.Linear` (adapters too) and GPT-2's `Conv1D`; mixture-of-experts weights are neither.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    def numel(parameters) -> int:
        return sum(compat.whole_numel(parameter) for parameter in {id(p): p for p in parameters}.values())

    modules, matrices = list(model.modules()), (nn.Linear, Conv1D)
    head, inputs = model.get_output_embeddings(), []
    if getattr(model.config, "is_encoder_decoder", False):
        seen = [module for name, module in model.named_modules() if re.search(CROSS_ATTENTION, name)]
        inputs = [module for module in [*model.get_encoder().modules(), *seen] if isinstance(module, matrices)]
    return ParameterCounts(
        total=numel(model.parameters()),
        embedding=numel(module.weight for module in modules if isinstance(module, nn.Embedding)),
        matmul=numel(module.weight for module in modules if isinstance(module, matrices)),
        head=numel([] if head is None else [head.weight]),
        encoder=numel(module.weight for module in inputs),
    )


def training_flops_per_token(
    config: PreTrainedConfig,
    counts: ParameterCounts,
    sequence_length: int,
    target_length: int = 0,
    *,
    trainable: int | None = None,
    extra_forwards: int = 0,
    head_share: float = 1.0,
) -> float:
    """FLOPs to train on one token of a row of `sequence_length` tokens: forward, and twice that for backward.

    6 · matmul parameters + 12 · width · (positions attended to, summed over the layers), width = heads · head_dim
    (Chowdhery et al. 2022, appendix B). The convention is that of PaLM's MFU: a full layer attends to the whole row,
    also where a causal kernel skips half of it or packed documents cannot see each other; a sliding-window layer to
    min(window, row).

    Args:
        config: sizes by the names of a Hugging Face config; any object that has them.
        target_length: tokens that an encoder-decoder's decoder reads a row; the FLOPs are spread over its inputs.
        trainable: parameters that are trained, where an adapter freezes the rest: frozen matrices have no gradient,
            which leaves 4 FLOPs a weight.
        extra_forwards: 1 for the reference of preference tuning (2 FLOPs a weight, and a third of the attention's), for
            activation checkpointing, which MFU leaves out, or for a batch that is embedded twice.
        head_share: share of the positions at which the output head is computed; the rate of masking where a masked
            model's logits are sparse.

    Raises `ValueError` for layers that are neither full nor sliding-window attention.
    """
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    matmul = counts.matmul - (1 - head_share) * counts.head
    if counts.encoder:
        targets = target_length / sequence_length
        decoder = getattr(config, "num_decoder_layers", None) or config.decoder_layers
        attended = config.num_hidden_layers * sequence_length + decoder * targets * (target_length + sequence_length)
        matmul = counts.encoder + (matmul - counts.encoder) * targets
    else:
        attended = _attended(config, sequence_length)
    trained = 1 if trainable is None else min(1, trainable / counts.matmul)
    return matmul * (4 + 2 * trained + 2 * extra_forwards) + width * attended * (12 + 4 * extra_forwards)


def _attended(config: PreTrainedConfig, sequence_length: int) -> int:
    """Positions that one token attends to, summed over the layers."""
    window = getattr(config, "sliding_window", None)
    default = "sliding_attention" if window else "full_attention"  # Mistral has a window and no list of layers
    layers = getattr(config, "layer_types", None) or [default] * config.num_hidden_layers
    if unknown := set(layers) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"FLOPs per token are not defined for layers of type {', '.join(sorted(unknown))}")
    if window and (config.model_type == "modernbert" or getattr(config, "is_causal", True) is False):
        window = 2 * window + 1  # transformers masks by distance <= window to both sides
    return sum(
        min(window, sequence_length) if window and layer == "sliding_attention" else sequence_length for layer in layers
    )


@dataclass(frozen=True)
class Budget:
    """A budget, resolved: `steps` × `batch` = `train`, and in tokens a batch is
    `world_size` × `per_device_train_batch_size` × `gradient_accumulation_steps` rows of `max_length` tokens."""

    train: int
    batch: int
    steps: int
    gradient_accumulation_steps: int


def plan_steps(
    train: int, batch: int, max_length: int, per_device_train_batch_size: int, world_size: int, unit: str = "tokens"
) -> Budget:
    """Steps and gradient accumulation for a budget on `world_size` processes.

    `train` and `batch` are in tokens, or in another `unit` of which a row has `max_length`.

    Raises `UserError` where a value is not positive or does not divide, with the nearest values that do.
    """
    sizes = {"max_length": max_length, "per_device_train_batch_size": per_device_train_batch_size}
    for key, value in sizes.items():
        if value < 1:
            raise UserError(f"{key} {value} is not a size; it must be at least 1")
    if unit != "tokens":
        del sizes["max_length"]
    processes = f"{world_size} process" + ("" if world_size == 1 else "es")
    accumulation = _divide(
        f"batch_{unit}",
        batch,
        max_length * per_device_train_batch_size * world_size,
        f"rows of {' x '.join(f'{key} {value}' for key, value in sizes.items())} x {processes}",
    )
    steps = _divide(f"train_{unit}", train, batch, f"steps of batch_{unit} {batch}")
    return Budget(train, batch, steps, accumulation)


def _divide(key: str, value: int, unit: int, into: str) -> int:
    if value > 0 and value % unit == 0:
        return value // unit
    below = max(value // unit, 1) * unit  # 0 divides, but trains on nothing
    raise UserError(f"{key} {value} does not divide into {into}; the nearest values are {below} and {below + unit}")
