"""Parameters of a model, FLOPs of its training, and the steps of a budget."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unlabeled import compat
from unlabeled.errors import UserError

if TYPE_CHECKING:  # importing torch takes longer than a plan
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

# Names of the modules of T5, BART and T5Gemma 2 that make keys and values of the encoder's output.
CROSS_ATTENTION = r"(EncDecAttention|encoder_attn|cross_attn)\.([kv]|[kv]_proj)$"


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, by what they cost. The parts overlap.

    Attributes:
        total: All parameters. Tied parameters count once.
        embedding: The input tables (token, position, token type), which are looked up.
        matmul: The weights that every token is multiplied with, including the output head, also if it is tied to an
            input table.
        head: The share of the output head in `matmul`.
        encoder: Of an encoder-decoder, the share of `matmul` that the inputs are multiplied with: the encoder, and the
            keys and values of cross-attention. The targets are multiplied with the rest.
    """

    total: int
    embedding: int
    matmul: int
    head: int
    encoder: int = 0

    @property
    def hidden(self) -> int:
        """Weights of the hidden matrices. Muon updates these, AdamW the rest."""
        return self.matmul - self.head


def count_parameters(model: PreTrainedModel) -> ParameterCounts:
    """Count the parameters of a dense model on any device, including meta, and with DeepSpeed ZeRO-3.

    Matrices are the weights of `nn.Linear`, adapters included, and of GPT-2's `Conv1D`. The weights of a mixture of
    experts are neither, so such models are not supported.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    matrix_types = (nn.Linear, Conv1D)
    modules = list(model.modules())
    head = model.get_output_embeddings()
    encoder_matrices: list[nn.Module] = []
    if getattr(model.config, "is_encoder_decoder", False):
        cross_attention = [module for name, module in model.named_modules() if re.search(CROSS_ATTENTION, name)]
        candidates = [*model.get_encoder().modules(), *cross_attention]
        encoder_matrices = [module for module in candidates if isinstance(module, matrix_types)]
    return ParameterCounts(
        total=_count_values(model.parameters()),
        embedding=_count_values(module.weight for module in modules if isinstance(module, nn.Embedding)),
        matmul=_count_values(module.weight for module in modules if isinstance(module, matrix_types)),
        head=0 if head is None else _count_values([head.weight]),
        encoder=_count_values(module.weight for module in encoder_matrices),
    )


def _count_values(parameters: Iterable[nn.Parameter]) -> int:
    """Count the values of distinct parameters, whole ones where ZeRO-3 has sharded them."""
    distinct = {id(parameter): parameter for parameter in parameters}
    return sum(compat.whole_numel(parameter) for parameter in distinct.values())


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
    """Return the FLOPs of training on one token: a forward pass, and twice as many for the backward pass.

    6 · matmul parameters + 12 · width · (attended positions, summed over the layers), where width = heads · head_dim
    (Chowdhery et al. 2022, appendix B). As in PaLM's MFU, a full-attention layer attends to the whole row, even if a
    causal kernel skips half of it or packed documents are masked from each other; a sliding-window layer attends to
    min(window, row).

    Args:
        config: Sizes of the model by the names of a Hugging Face config; any object that has them.
        counts: The parameters of the model.
        sequence_length: Tokens in a row.
        target_length: Tokens in a row of an encoder-decoder's decoder. Their FLOPs are counted per input token.
        trainable: The parameters that are trained, if an adapter leaves the others frozen. Frozen matrices have no
            gradient, which leaves 4 FLOPs per weight.
        extra_forwards: Further forward passes, of 2 FLOPs per weight: 1 for the reference model of preference tuning
            and for batches that are embedded twice. (MFU leaves out those of activation checkpointing.)
        head_share: The share of the positions at which the output head is computed, such as the masking rate of a
            masked language model.

    Raises:
        ValueError: A layer has neither full nor sliding-window attention.
    """
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    matmul = counts.matmul - (1 - head_share) * counts.head
    if counts.encoder:
        targets_per_input = target_length / sequence_length
        matmul = counts.encoder + (matmul - counts.encoder) * targets_per_input
        decoder_layers = getattr(config, "num_decoder_layers", None) or config.decoder_layers
        encoder_positions = config.num_hidden_layers * sequence_length
        decoder_positions = decoder_layers * targets_per_input * (target_length + sequence_length)
        attended_positions = encoder_positions + decoder_positions
    else:
        attended_positions = _attended_positions(config, sequence_length)
    trained_share = 1 if trainable is None else min(1, trainable / counts.matmul)
    matmul_flops = matmul * (4 + 2 * trained_share + 2 * extra_forwards)
    attention_flops = width * attended_positions * (12 + 4 * extra_forwards)
    return matmul_flops + attention_flops


def _attended_positions(config: PreTrainedConfig, sequence_length: int) -> int:
    """Return the positions that one token attends to, summed over the layers."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if not layer_types:  # Mistral has a window, and no list of layers
        layer_types = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"FLOPs per token are not defined for layers of type {', '.join(sorted(unknown))}")
    if window and (config.model_type == "modernbert" or getattr(config, "is_causal", True) is False):
        window = 2 * window + 1  # transformers allows a distance of `window` to both sides
    positions = 0
    for layer_type in layer_types:
        if window and layer_type == "sliding_attention":
            positions += min(window, sequence_length)
        else:
            positions += sequence_length
    return positions


@dataclass(frozen=True)
class Budget:
    """The budget of a run, with the steps that follow from it.

    Attributes:
        train: The training budget, `steps` · `batch`, in tokens or another unit.
        batch: The size of a step in the same unit: in tokens, `world_size` · `per_device_train_batch_size` ·
            `gradient_accumulation_steps` rows of `max_length`.
        steps: Optimizer steps.
        gradient_accumulation_steps: Micro-batches of a process in a step.
    """

    train: int
    batch: int
    steps: int
    gradient_accumulation_steps: int


def plan_steps(
    train: int, batch: int, max_length: int, per_device_train_batch_size: int, world_size: int, unit: str = "tokens"
) -> Budget:
    """Divide a budget into steps and micro-batches.

    Args:
        train: The training budget, in `unit`.
        batch: The size of a step over all processes, in `unit`.
        max_length: How much of the unit a row has: its tokens, or 1 if the unit is a row.
        per_device_train_batch_size: Rows in a micro-batch.
        world_size: The number of processes.
        unit: tokens, pairs or examples.

    Raises:
        UserError: A value is not positive or does not divide. The message has the nearest values that do.
    """
    sizes = {"max_length": max_length, "per_device_train_batch_size": per_device_train_batch_size}
    for key, value in sizes.items():
        if value < 1:
            raise UserError(f"{key} {value} is not a size; it must be at least 1")
    if unit != "tokens":
        del sizes["max_length"]
    factors = " x ".join(f"{key} {value}" for key, value in sizes.items())
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    accumulation = _divide(
        f"batch_{unit}",
        batch,
        max_length * per_device_train_batch_size * world_size,
        f"rows of {factors} x {processes}",
    )
    steps = _divide(f"train_{unit}", train, batch, f"steps of batch_{unit} {batch}")
    return Budget(train, batch, steps, accumulation)


def _divide(key: str, value: int, divisor: int, description: str) -> int:
    """Divide a value without remainder; `description` says in a message what the parts are."""
    if value > 0 and value % divisor == 0:
        return value // divisor
    below = max(value // divisor, 1) * divisor  # 0 divides, but trains on nothing
    raise UserError(
        f"{key} {value} does not divide into {description}; the nearest values are {below} and {below + divisor}"
    )
