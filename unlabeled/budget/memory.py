"""Memory of a training step by part, and the size of what it leaves on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unlabeled.budget.counts import ParameterCounts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def memory_estimate(
    counts: ParameterCounts,
    config: PreTrainedConfig,
    *,
    max_length: int,
    per_device_train_batch_size: int,
    precision: str = "bf16",
    optimizer: str = "adamw",
    zero_stage: int = 0,
    world_size: int = 1,
    attn_implementation: str = "sdpa",
    activation_checkpointing: bool = False,
    target_length: int = 0,
) -> dict[str, int]:
    """Peak memory of a training step of an encoder or a decoder, in bytes per process, by part; they add up.

    **An estimate; its accuracy has not been measured yet.** Left out: the CUDA context, fragmentation, communication
    buffers other than DDP's, and the temporary copies of the optimizer step.

    `precision` is bf16, fp16, tf32 or fp32, `optimizer` adamw or muon (all parameters trained), `zero_stage` 0 is
    Trainer without DeepSpeed.

    - `weights`, `gradients`, `optimizer`: without DeepSpeed fp32 each, plus the half-precision copies that autocast
      makes of the matrices, plus DDP's gradient buckets. Under ZeRO the model and its gradients are in the working
      precision, the fp32 master weights belong to the optimizer, and stage 1 shards the optimizer, 2 the gradients
      as well, 3 the weights as well (Rajbhandari et al. 2020, sections 3.1 and 5).
    - `activations`: tokens · width · 34 bytes a layer in half precision, plus 5 · heads · row² · rows where eager
      attention keeps its scores; with checkpointing the input of each layer and one layer in full (Korthikanti et al.
      2022, equation 1 and section 5). Derived for GPT's block: rougher for gated or grouped-query blocks.
    - `logits`: the head's output, its fp32 copy, the log-softmax and its gradient, tokens · vocabulary each.
    """
    size = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}[precision]
    half = size == 2
    copies = 4 * counts.total
    states = _optimizer_bytes(counts, optimizer)
    if zero_stage == 0:
        weights = copies + (size * counts.matmul if half else 0)
        gradients = copies * (2 if world_size > 1 else 1)
    else:
        weights = _share(size * counts.total, world_size if zero_stage >= 3 else 1)
        gradients = _share(size * counts.total, world_size if zero_stage >= 2 else 1)
        states = _share(copies + states, world_size)

    tokens = per_device_train_batch_size * max_length
    layer_input = size * tokens * config.hidden_size
    # Of the 34 bytes 32 are 16 values in the working precision and 2 are dropout masks; of the 5, 4 and 1.
    layer = 16 * layer_input + 2 * tokens * config.hidden_size
    if attn_implementation == "eager":
        layer += (2 * size + 1) * config.num_attention_heads * tokens * max_length
    layers = config.num_hidden_layers
    if target_length:  # as many layers again, of targets, each with half as much again for what it sees of the inputs
        layers += round(1.5 * layers * target_length / max_length)
        tokens = per_device_train_batch_size * target_length
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": states,
        "activations": layers * layer_input + layer if activation_checkpointing else layers * layer,
        "logits": tokens * config.vocab_size * (14 if half else 12),
    }


def checkpoint_bytes(counts: ParameterCounts, optimizer: str = "adamw") -> int:
    """Bytes of a `checkpoint-*` folder without DeepSpeed: fp32 weights and optimizer state, all parameters trained."""
    return 4 * counts.total + _optimizer_bytes(counts, optimizer)


def _optimizer_bytes(counts: ParameterCounts, optimizer: str) -> int:
    # fp32: AdamW keeps two moments, Muon one momentum for each hidden matrix and AdamW's two for the rest.
    return 8 * counts.total - {"adamw": 0, "muon": 4}[optimizer] * counts.hidden


def _share(size: int, processes: int) -> int:
    return -(-size // processes)
