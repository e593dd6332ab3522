"""Recommendations for a budget: the shape of the model, batch, learning rate, parallelism and checkpoint interval."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from unlabeled.errors import UserError
from unlabeled.planning.counts import ParameterCounts, training_flops_per_token
from unlabeled.planning.runs import RunSizes, step_memory
from unlabeled.planning.shapes import count_shape, lora_parameters, shape_of

# A schedule that can be stopped at any time and decayed then (Hu et al. 2024, arXiv:2404.06395); shares of the steps.
SCHEDULE = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 0.02, "decay_fraction": 0.2}
# GPU hours between failures: 419 unexpected interruptions of 16,384 GPUs in 54 days (Grattafiori et al. 2024,
# section 3.3.4).
HOURS_BETWEEN_FAILURES = 54 * 24 * 16_384 / 419
FREE_MEMORY = 0.1  # share of a device's memory that stays free
MIN_TOKENS_PER_MICRO_BATCH = 2048  # fewer leave a GPU idle


def recommend_shape(parameters: float, vocab_size: int, max_length: int) -> SimpleNamespace:
    """Return the shape of the Llama model that is closest to a number of parameters.

    The width is a whole number of heads; the depth follows from the number of parameters. Of the shapes within 5 % of
    it, the one is taken whose ratio of width to depth is closest to that of GPT-2, GPT-3 and Llama: 50 at 10M
    parameters, 64 at 100M, 128 at 10B. The loss depends little on this ratio (Kaplan et al. 2020, figure 5). Below 1B
    parameters the output head is tied to the embedding.

    Args:
        parameters: The size of the model, embeddings included.
        vocab_size: The size of the vocabulary.
        max_length: The number of positions.

    Raises:
        UserError: The vocabulary alone takes most of the parameters.
    """
    head_dim = _head_dim(parameters)
    target_ratio = min(max(64 * (parameters / 1e8) ** 0.15, 32), 128)
    best_penalty = math.inf
    best_deviation = math.inf
    best_sizes: dict[str, Any] = {}
    for heads in range(1, 256):
        width = heads * head_dim
        sizes = {
            "vocab_size": vocab_size,
            "hidden_size": width,
            "intermediate_size": -(-8 * width // 3 // head_dim) * head_dim,
            "num_attention_heads": heads,
            "max_position_embeddings": max_length,
            "tie_word_embeddings": parameters < 1e9,
        }
        layers, total = _choose_depth(sizes, parameters)
        deviation = abs(math.log(total / parameters))
        penalty = max(deviation - 0.05, 0) * 20 + deviation + abs(math.log(width / layers / target_ratio))
        if penalty < best_penalty:
            best_penalty = penalty
            best_deviation = deviation
            best_sizes = sizes | {"num_hidden_layers": layers}
    if best_deviation > 0.2:
        raise UserError(
            f"{parameters:.3g} parameters hold no model with a vocabulary of {vocab_size:,}; train a smaller tokenizer "
            "and set --vocab_size, or raise the budget"
        )
    return shape_of("llama", best_sizes)


def _head_dim(parameters: float) -> int:
    """The width of an attention head: 128 as in Llama, 64 as in GPT-2, less in tiny models."""
    if parameters >= 1e9:
        return 128
    return 64 if parameters >= 1e7 else 32


def _choose_depth(sizes: dict[str, Any], parameters: float) -> tuple[int, int]:
    """Return the number of layers that comes closest to `parameters`, and the parameters of the whole model."""
    one_layer, two_layers = (
        count_shape(shape_of("llama", sizes | {"num_hidden_layers": layers})).total for layers in (1, 2)
    )
    per_layer = two_layers - one_layer
    layers = max(2, round(1 + (parameters - one_layer) / per_layer))
    return layers, one_layer + (layers - 1) * per_layer


def recommend_batch(flops: float, max_length: int, tokens: float) -> int:
    """Return the tokens in a batch, a power of two of rows.

    0.2920 · C^0.3271 tokens for C FLOPs (DeepSeek-AI 2024, arXiv:2401.02954, section 3.1), and at most a hundredth of
    all `tokens`, so that the run has at least 100 steps.
    """
    rows = min(0.2920 * flops**0.3271, tokens / 100) / max_length
    return max_length * 2 ** max(0, round(math.log2(max(rows, 1))))


def recommend_learning_rate(flops: float) -> float:
    """Return the peak learning rate of AdamW, with two significant digits.

    0.3118 · C^-0.1250 for C FLOPs (DeepSeek-AI 2024, arXiv:2401.02954, section 3.1).
    """
    return float(f"{0.3118 * flops**-0.1250:.1e}")


def recommend_checkpoint_interval(save_seconds: float, gpus: int) -> float:
    """Return the seconds between checkpoints for which saving and lost work together cost the least.

    sqrt(2 · seconds to save · seconds between failures) (Young 1974), with the rate of failures of Llama 3's cluster.
    """
    return math.sqrt(2 * save_seconds * HOURS_BETWEEN_FAILURES * 3600 / gpus)


def equivalent_budgets(
    shape: SimpleNamespace, counts: ParameterCounts, flops: float, max_length: int, lora_rank: int = 16
) -> dict[str, float]:
    """Return the tokens that `flops` pay for in SFT and DPO, and in both with LoRA where the model has gated layers."""
    stages: dict[str, dict[str, int]] = {"SFT": {}, "DPO": {"extra_forwards": 1}}
    if shape.model_type in ("llama", "mistral", "qwen3"):
        trainable = lora_parameters(shape, lora_rank)
        stages["LoRA SFT"] = {"trainable": trainable}
        stages["LoRA DPO"] = {"trainable": trainable, "extra_forwards": 1}
    return {
        name: flops / training_flops_per_token(shape, counts, max_length, **options) for name, options in stages.items()
    }


# --- Memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryFit:
    """A configuration that fits into the memory of a device.

    Attributes:
        launch: The file of ds_configs/ to launch with, without its extension; None for a single process on a CPU.
        per_device_train_batch_size: The micro-batch.
        activation_checkpointing: Whether activations are computed again in the backward pass.
        memory: Bytes per process by the parts of `memory_estimate`.
    """

    launch: str | None
    per_device_train_batch_size: int
    activation_checkpointing: bool
    memory: dict[str, int]


def fit_into_memory(
    counts: ParameterCounts,
    config: Any,
    sizes: RunSizes,
    gigabytes: float,
    rows: int,
    micro_batch: int | None = None,
    activation_checkpointing: bool | None = None,
) -> MemoryFit:
    """Find a configuration with which a run fits into the memory of its devices.

    Tries plain data parallelism, ZeRO-1, 2, 3 and ZeRO-3 with offload, each first without and then with activation
    checkpointing, and takes the first that leaves a tenth of the memory free with micro-batches of 2,048 tokens or
    more; if there is none, the first that fits with fewer.

    Args:
        counts: The parameters of the model.
        config: Sizes of the model by the names of a Hugging Face config.
        sizes: The run. Its micro-batch, accumulation, ZeRO stage and checkpointing are replaced.
        gigabytes: The memory of a device, in GB of 1e9 bytes.
        rows: Rows, or pairs, of each process in an optimizer step.
        micro_batch: A micro-batch to use as it is, instead of searching for one.
        activation_checkpointing: Likewise.

    Raises:
        UserError: Nothing fits.
    """
    largest_total = (1 - FREE_MEMORY) * gigabytes * 1e9
    micro_batches = [micro_batch] if micro_batch else _divisors_by_powers_of_two(rows)
    checkpointing_choices = (False, True) if activation_checkpointing is None else (activation_checkpointing,)
    fallback = None
    smallest_total = math.inf
    for launch, stage in _launch_configurations(sizes.world_size):
        for checkpointing in checkpointing_choices:
            for size in micro_batches:
                changed = replace(
                    sizes,
                    per_device_train_batch_size=size,
                    gradient_accumulation_steps=max(rows // size, 1),
                    zero_stage=stage,
                    activation_checkpointing=checkpointing,
                    head_share=None if stage == 3 else sizes.head_share,
                )
                memory = step_memory(counts, config, changed, offload=launch.endswith("offload"))
                total = sum(memory.values())
                smallest_total = min(smallest_total, total)
                if total > largest_total:
                    continue
                fit = MemoryFit(launch, size, checkpointing, memory)
                if micro_batch or size * sizes.max_length >= min(MIN_TOKENS_PER_MICRO_BATCH, rows * sizes.max_length):
                    return fit
                fallback = fallback or fit
                break
    if fallback is None:
        raise UserError(
            f"a micro-batch of {micro_batches[-1]} takes at least {smallest_total / 1e9:.3g} GB, and of the "
            f"{gigabytes:g} GB of a device a tenth should stay free; take more or larger devices, or a smaller model"
        )
    return fallback


def _launch_configurations(processes: int) -> Iterator[tuple[str, int]]:
    """Yield files of ds_configs/ and their ZeRO stage, in the order in which they are tried."""
    if processes > 1:
        yield "ddp", 0
        yield "zero1", 1
        yield "zero2", 2
        yield "zero3", 3
    else:
        yield "single", 0
    yield "zero3_offload", 3


def _divisors_by_powers_of_two(rows: int) -> list[int]:
    """Return the powers of two that divide `rows`, the largest first."""
    return [2**exponent for exponent in range(20, -1, -1) if rows % 2**exponent == 0]
