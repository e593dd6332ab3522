"""What a run costs, from its sizes: the one computation behind a recipe's plan and `scripts/plan.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from unlabeled.planning.counts import ParameterCounts, training_flops_per_token
from unlabeled.planning.memory import checkpoint_bytes, memory_estimate, resident_parts


@dataclass(frozen=True)
class RunSizes:
    """What the cost of a run follows from, apart from its model.

    Attributes:
        train_tokens: tokens that are read, over all processes; of an encoder-decoder its inputs.
        max_length: tokens of a row.
        per_device_train_batch_size: rows at a time; of preference tuning and embeddings pairs, which are two rows.
        trainable: parameters that are trained.
        target_length: tokens that an encoder-decoder's decoder reads a row.
        pairs: a unit of the batch is two rows.
        reference: a second model runs forward only, as in preference tuning without precomputed log-probabilities.
        embeds_twice: every batch is embedded once more, so that gradients can be taken in pieces.
        adapted: an adapter is trained, so that the reference is the same model without it.
        head_share: share of the positions at which the output head is computed, None where all logits are there.
        device: cpu or cuda.
        objective: clm, mlm, span, sft, dpo, classify, tag or embed.
        streamed: the text is read while the model trains.
    """

    train_tokens: float
    max_length: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    trainable: int
    optimizer: str = "adamw"
    precision: str = "bf16"
    world_size: int = 1
    zero_stage: int = 0
    attn_implementation: str = "sdpa"
    activation_checkpointing: bool = False
    target_length: int = 0
    pairs: bool = False
    reference: bool = False
    embeds_twice: bool = False
    adapted: bool = False
    head_share: float | None = None
    device: str = "cuda"
    objective: str = "clm"
    streamed: bool = False

    @property
    def extra_forwards(self) -> int:
        """Forward passes beside that of training."""
        return int(self.reference or self.embeds_twice)


@dataclass(frozen=True)
class RunCosts:
    """FLOPs, and bytes of memory and disk.

    Attributes:
        memory: by the parts of `memory_estimate`, and on a CPU of `resident_parts`.
        memory_by_micro_batch: the same for every micro-batch that divides the rows.
    """

    flops_per_token: float
    flops: float
    memory: dict[str, int]
    memory_by_micro_batch: dict[int, dict[str, int]]
    checkpoint_bytes: int


def not_calibrated(sizes: RunSizes, compiled: bool = False) -> str | None:
    """Why the memory of a run on a CPU may be over 15 % away from what is predicted, or None where it was measured.

    See benchmarks/results/memory_recipes_cpu.md: 0.69 of the peak with activation checkpointing in fp32, 0.66 in
    supervised fine-tuning, 1.16 in preference tuning, 0.76 with streamed text.
    """
    if sizes.device != "cpu":
        return None
    if sys.platform != "linux":
        return "not calibrated for this system"
    if sizes.activation_checkpointing:
        return "not calibrated for activation checkpointing on a CPU"
    if compiled:
        return "not calibrated for a compiled model on a CPU"
    if sizes.objective in ("sft", "dpo"):
        return "not calibrated for fine-tuning on conversations on a CPU"
    if sizes.streamed:
        return "not calibrated for streamed text on a CPU"
    if sizes.zero_stage and sizes.precision == "bf16":
        return "not calibrated for DeepSpeed in bf16 on a CPU"
    return None


def run_costs(counts: ParameterCounts, config: Any, sizes: RunSizes) -> RunCosts:
    """What a run of a model costs.

    Args:
        config: sizes of the model by the names of a Hugging Face config; any object that has them.

    Raises `ValueError` or `AttributeError` for an architecture whose FLOPs are not defined.
    """
    per_token = training_flops_per_token(
        config, counts, sizes.max_length, sizes.target_length, trainable=sizes.trainable,
        extra_forwards=sizes.extra_forwards, head_share=1.0 if sizes.head_share is None else sizes.head_share,
    )  # fmt: skip
    micro = sizes.per_device_train_batch_size
    rows = micro * sizes.gradient_accumulation_steps
    memory = {
        size: memory_estimate(
            counts, config, max_length=sizes.max_length,
            per_device_train_batch_size=2 * size if sizes.pairs else size,
            gradient_accumulation_steps=rows // size, precision=sizes.precision, optimizer=sizes.optimizer,
            zero_stage=sizes.zero_stage, world_size=sizes.world_size, attn_implementation=sizes.attn_implementation,
            activation_checkpointing=sizes.activation_checkpointing, target_length=sizes.target_length,
            trainable=sizes.trainable, reference=sizes.reference and not sizes.adapted, head_share=sizes.head_share,
            device=sizes.device,
        )
        for size in range(1, micro + 1)
        if rows % size == 0
    }  # fmt: skip
    if sizes.device == "cpu":
        memory = {size: parts | resident_parts(parts, sizes.precision) for size, parts in memory.items()}
    disk = checkpoint_bytes(
        counts, sizes.optimizer, trainable=sizes.trainable, zero_stage=sizes.zero_stage, precision=sizes.precision
    )
    return RunCosts(per_token, per_token * sizes.train_tokens, memory[micro], memory, disk)
