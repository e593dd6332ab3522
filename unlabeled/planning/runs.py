"""FLOPs, memory and disk space of a run: the computation behind the plan of a recipe and `scripts/plan.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

from unlabeled.planning.counts import ParameterCounts, training_flops_per_token
from unlabeled.planning.memory import checkpoint_bytes, memory_estimate, resident_parts


@dataclass(frozen=True)
class RunSizes:
    """What the cost of a run follows from, apart from its model.

    Attributes:
        train_tokens: Tokens that all processes read; of an encoder-decoder those of its inputs.
        max_length: Tokens in a row.
        per_device_train_batch_size: Rows in a micro-batch. In preference tuning and for embeddings pairs, of two rows.
        gradient_accumulation_steps: Micro-batches of a process in an optimizer step.
        trainable: The parameters that are trained.
        optimizer: adamw or muon.
        precision: bf16, fp16, tf32 or fp32.
        world_size: The number of processes.
        zero_stage: The ZeRO stage, 0 without DeepSpeed.
        attn_implementation: sdpa, eager, flash_attention_2 or varlen.
        activation_checkpointing: Whether layers are computed again in the backward pass.
        target_length: Tokens in a row of an encoder-decoder's decoder.
        pairs: Whether a unit of the batch is two rows.
        reference: Whether a reference model runs forward, as in DPO without precomputed log-probabilities.
        embeds_twice: Whether each batch is embedded twice, so that gradients can be computed in pieces.
        adapted: Whether an adapter is trained, so that the reference is the same model without it.
        head_share: The share of the positions at which the output head is computed; None if all logits are kept.
        device: cpu or cuda.
        objective: clm, mlm, span, sft, dpo, classify, tag or embed.
        streamed: Whether the text is read during training.
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
        """Forward passes besides that of training."""
        return int(self.reference or self.embeds_twice)


@dataclass(frozen=True)
class RunCosts:
    """The costs of a run.

    Attributes:
        flops_per_token: FLOPs of training on one token.
        flops: FLOPs of the whole run.
        memory: Peak bytes per process by the parts of `memory_estimate`, and on a CPU of `resident_parts`.
        memory_by_micro_batch: The same for every micro-batch that divides the rows of a step.
        checkpoint_bytes: Bytes of a checkpoint.
    """

    flops_per_token: float
    flops: float
    memory: dict[str, int]
    memory_by_micro_batch: dict[int, dict[str, int]]
    checkpoint_bytes: int


def not_calibrated(sizes: RunSizes, compiled: bool = False) -> str | None:
    """Return why the memory of a run on a CPU may be over 15 % away from its prediction, or None if it was measured.

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
    """Compute the FLOPs, memory and disk space of a run.

    Args:
        counts: The parameters of the model.
        config: Sizes of the model by the names of a Hugging Face config; any object that has them.
        sizes: What else the costs follow from.

    Raises:
        ValueError, AttributeError: The FLOPs of the architecture are not defined.
    """
    flops_per_token = training_flops_per_token(
        config,
        counts,
        sizes.max_length,
        sizes.target_length,
        trainable=sizes.trainable,
        extra_forwards=sizes.extra_forwards,
        head_share=1.0 if sizes.head_share is None else sizes.head_share,
    )
    rows = sizes.per_device_train_batch_size * sizes.gradient_accumulation_steps
    memory_by_micro_batch = {}
    for micro_batch in range(1, sizes.per_device_train_batch_size + 1):
        if rows % micro_batch == 0:
            changed = replace(
                sizes, per_device_train_batch_size=micro_batch, gradient_accumulation_steps=rows // micro_batch
            )
            memory_by_micro_batch[micro_batch] = process_memory(counts, config, changed)
    return RunCosts(
        flops_per_token=flops_per_token,
        flops=flops_per_token * sizes.train_tokens,
        memory=memory_by_micro_batch[sizes.per_device_train_batch_size],
        memory_by_micro_batch=memory_by_micro_batch,
        checkpoint_bytes=checkpoint_bytes(
            counts,
            sizes.optimizer,
            trainable=sizes.trainable,
            zero_stage=sizes.zero_stage,
            precision=sizes.precision,
        ),
    )


def step_memory(counts: ParameterCounts, config: Any, sizes: RunSizes, offload: bool = False) -> dict[str, int]:
    """Return the peak memory of a training step, in bytes per process by part, as `memory_estimate` computes it.

    Args:
        offload: Whether ZeRO keeps optimizer, gradients and weights in main memory.
    """
    return memory_estimate(
        counts,
        config,
        max_length=sizes.max_length,
        per_device_train_batch_size=sizes.per_device_train_batch_size * (2 if sizes.pairs else 1),
        precision=sizes.precision,
        optimizer=sizes.optimizer,
        zero_stage=sizes.zero_stage,
        world_size=sizes.world_size,
        attn_implementation=sizes.attn_implementation,
        activation_checkpointing=sizes.activation_checkpointing,
        target_length=sizes.target_length,
        gradient_accumulation_steps=sizes.gradient_accumulation_steps,
        trainable=sizes.trainable,
        offload=offload,
        reference=sizes.reference and not sizes.adapted,
        head_share=sizes.head_share,
        device=sizes.device,
    )


def process_memory(counts: ParameterCounts, config: Any, sizes: RunSizes) -> dict[str, int]:
    """Return the peak memory of a process, in bytes by part: on a CPU with the parts of `resident_parts`."""
    memory = step_memory(counts, config, sizes)
    if sizes.device == "cpu":
        memory |= resident_parts(memory, sizes.precision)
    return memory
