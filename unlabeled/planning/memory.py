"""Memory of a training step by part, what a process sends to the others, and the size of what a run leaves on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unlabeled.planning.activations import SavedActivations, block_of, first_of, inner_sizes, layer_bytes
from unlabeled.planning.counts import ParameterCounts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SIZES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}  # bytes of a value
SHARDED_FROM = {"optimizer": 1, "gradients": 2, "weights": 3}  # the ZeRO stage that shards it
# Of a process on a CPU, measured: benchmarks/results/memory_recipes_cpu.md.
HELD_BY_ALLOCATOR = 0.45  # of activations and logits: freed blocks that the C library keeps and cannot use again
LIBRARIES = {2: 65_000_000, 4: 40_000_000}  # code and tables that the first step loads; in bf16 kernels it compiles
LIVE = 10**9  # DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance


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
    gradient_accumulation_steps: int = 1,
    trainable: int | None = None,
    offload: bool = False,
    reference: bool = False,
    head_share: float | None = None,
    device: str = "cuda",
) -> dict[str, int]:
    """Peak memory of a training step of an encoder, a decoder or both, in bytes per process by part; they add up.

    Within 15 % of what was measured on a CPU, most of it libraries: benchmarks/results/memory_cpu.md. Left out: loaded
    libraries and what the allocator keeps (on a CPU see `resident_parts`), the CUDA context, fragmentation of a GPU's
    memory, and that a compiled model keeps less.

    - `weights`: fp32, plus the half-precision copies that autocast makes of the matrices. Under ZeRO in the working
      precision (Rajbhandari et al. 2020, sections 3.1 and 5), sharded by stage 3.
    - `gradients`: of what is trained, as the weights; sharded from stage 2 on.
    - `optimizer`: fp32, two moments (Muon: one momentum). Under ZeRO the fp32 master weights as well, which DeepSpeed
      0.19.8 keeps even when the model is in fp32; sharded from stage 1 on.
    - `activations`: what the layers keep for the backward pass (unlabeled/planning/activations.py); with checkpointing
      the input of each, and one layer in full, with the gradients of its widest values, as far as that is more than the
      logits, in whose place it is computed again (Korthikanti et al. 2022, section 5). And what embeddings, last norm
      and the head's own layers keep.
    - `logits`: tokens · vocabulary · 12 bytes: log-softmax, its gradient and that of the logits, in fp32. By
      `losses.linear_cross_entropy_sum` of some positions at a time, with the inputs of the head and both gradients of
      its product.
    - `buffers`: DDP's copy of the gradients; the parameters that ZeRO-3 holds gathered, whole models up to 1e9.
    - `step`: copies that the optimizer step makes. ZeRO-1 and 2 copy the process's share of the gradients to fp32
      (stage 1 frees the other shares first), Muon all matrices of one shape, see `_muon_bytes`.
    - `reference`, if asked for: the weights once more, for preference tuning of all weights.
    - `reused`, negative: gradients and the copies of the step take the place of activations, logits and autocast's
      copies, which the backward pass frees. Not the gradients where earlier rows of the step have left theirs, or
      ZeRO-3 has a place of its own for them.

    Args:
        config: sizes by the names of a Hugging Face config; any object that has them.
        precision: bf16, fp16, tf32 or fp32.
        zero_stage: 0 is Trainer without DeepSpeed.
        attn_implementation: sdpa (with a mask, as packed or padded rows have it), eager, flash_attention_2 or varlen.
        target_length: tokens that an encoder-decoder's decoder reads a row.
        trainable: parameters that are trained, where an adapter leaves the others as they are.
        offload: as ds_configs/zero3_offload.json: optimizer, sharded gradients and weights are in main memory, see
            `host_bytes`. From DeepSpeed's source, not measured.
        head_share: share of the positions at which `losses.linear_cross_entropy_sum` computes the head; None for the
            logits of all positions.
        device: "cpu" keeps a dropout mask as values and not as bytes, and all scores where attention has dropout.
    """
    size, rows, processes = SIZES[precision], per_device_train_batch_size, world_size
    trained = counts.total if trainable is None else trainable
    autocast = size == 2 and not zero_stage
    kept = SavedActivations(
        block_of(config), size, autocast, attn_implementation, trained < counts.total, device == "cpu"
    )
    states = {
        "weights": (size if zero_stage else 4) * counts.total,
        "gradients": (size if zero_stage else 4) * trained,
        "optimizer": _optimizer_bytes(counts, optimizer, trained) + (4 * trained if zero_stage else 0),
    }
    whole = states["gradients"]
    for part, stage in SHARDED_FROM.items():
        if zero_stage >= stage:
            states[part] = 0 if offload else _share(states[part], processes)
    own = _share(4 * trained, processes)  # gradients in fp32
    copies = size * counts.matmul if autocast else 0

    tokens, layers = rows * max_length, config.num_hidden_layers
    full, inputs = [layer_bytes(config, kept, tokens, max_length)] * layers, [tokens] * layers
    ends, crossed = [tokens], 0
    if target_length:
        tokens, crossed = rows * target_length, first_of(config, "num_decoder_layers", "decoder_layers") or layers
        full += [layer_bytes(config, kept, tokens, target_length, max_length)] * crossed
        inputs += [tokens] * crossed
        ends.append(tokens)
    step = buffers = 0
    if zero_stage == 3:
        buffers = max(size * min(counts.total, LIVE), 0 if offload else min(own, 4 * LIVE))
    elif zero_stage and not offload:
        step = max(0, own - (whole - _share(whole, processes) if zero_stage == 1 else 0))
    elif not zero_stage:
        buffers = whole if processes > 1 else 0
        step = _muon_bytes(config, kept, len(full), crossed) if optimizer == "muon" else 0  # which goes without ZeRO

    logits = freed = 12 * tokens * config.vocab_size if counts.head else 0  # a classifier's are next to nothing
    if counts.head and head_share is not None:
        places = round(head_share * tokens)
        chunk = min(places * config.vocab_size, logits_at_a_time(device))
        freed = chunk * (4 if size == 4 else 8) + 2 * size * places * config.hidden_size
        logits = freed + 4 * counts.head
    outside = kept.block.outside * (4 if kept.block.norm == 2 else kept.stream) * config.hidden_size * sum(ends)
    if activation_checkpointing:
        again = max(full) + (2 + kept.block.gated) * size * tokens * inner_sizes(config)[2]
        full = [kept.stream * config.hidden_size * sum(inputs), max(0, again - freed)]
    activations = sum(full) + outside
    early = gradient_accumulation_steps > 1 or zero_stage == 3
    return {
        "weights": states["weights"] + copies,
        "gradients": states["gradients"],
        "optimizer": states["optimizer"],
        "activations": activations,
        "logits": logits,
        "buffers": buffers,
        "step": step,
        **({"reference": states["weights"]} if reference else {}),
        "reused": -min(copies + activations + logits, step + (0 if early else states["gradients"])),
    }


def resident_parts(memory: dict[str, int], precision: str) -> dict[str, int]:
    """What a process on a CPU takes of RAM beside the parts of `memory_estimate`, in bytes by part.

    - `allocator`: glibc keeps most of what is freed in blocks below 32 MB, and activations of many sizes leave holes.
    - `libraries`: what the first step loads or compiles.

    Both are fitted to whole runs of recipes with one or two threads (benchmarks/results/memory_recipes_cpu.md).
    """
    return {
        "allocator": round(HELD_BY_ALLOCATOR * (memory["activations"] + memory["logits"])),
        "libraries": LIBRARIES[SIZES[precision]],
    }


def logits_at_a_time(device: str) -> int:
    """Values that `losses.linear_cross_entropy_sum` computes at a time: on a CPU as many as stay in its cache."""
    return 1 << 21 if device == "cpu" else 1 << 27


def host_bytes(
    counts: ParameterCounts, zero_stage: int, world_size: int, precision: str = "bf16", trainable: int | None = None
) -> int:
    """Main memory that ZeRO offload takes, in bytes per process.

    fp32 weights, two moments and the gradients of the process's share (16 bytes a parameter), a buffer for them in the
    working precision, and at stage 3 its share of the weights. From DeepSpeed's source, not measured.
    """
    trained = counts.total if trainable is None else trainable
    weights = SIZES[precision] * counts.total if zero_stage == 3 else 0
    return _share((16 + SIZES[precision]) * trained + weights, world_size)


def communication_bytes(
    counts: ParameterCounts,
    zero_stage: int,
    world_size: int,
    precision: str = "bf16",
    trainable: int | None = None,
    gradient_accumulation_steps: int = 1,
) -> int:
    """Bytes that each process sends for one optimizer step, with rings, which send (n - 1) / n of what they reduce.

    - Stage 0, DDP: an all-reduce of fp32 gradients, twice a ring, once a step.
    - Stages 1 and 2: as Rajbhandari et al. 2020 (section 7) need no more than a reduce-scatter of gradients and an
      all-gather of weights, 2 rings. But DeepSpeed 0.19.8 all-reduces (`use_multi_rank_bucket_allreduce`), 3 rings.
      Stage 1 reduces once a step, stage 2 for each micro-batch.
    - Stage 3: for each micro-batch a reduce-scatter of gradients, an all-gather of weights for the forward pass, and
      for the backward pass another one (3 rings, 1.5 times DDP's) of those that are not still there: DeepSpeed keeps up
      to 1e9 parameters, after a first step without.

    Measured on two processes: benchmarks/results/memory_cpu.md. (gloo's reduce-scatter sends twice what is said here.)
    """
    trained = counts.total if trainable is None else trainable
    size, steps = SIZES[precision], gradient_accumulation_steps
    if zero_stage == 3:
        values = (counts.total + max(0, counts.total - LIVE) + trained) * steps
    else:
        values = {0: 2, 1: 3, 2: 2 * steps + 1}[zero_stage] * trained
    return (size if zero_stage else 4) * values * (world_size - 1) // world_size


def checkpoint_bytes(
    counts: ParameterCounts,
    optimizer: str = "adamw",
    *,
    trainable: int | None = None,
    zero_stage: int = 0,
    precision: str = "fp32",
) -> int:
    """Bytes of a `checkpoint-*` folder, of all processes together: weights and optimizer state of what is trained.

    Without DeepSpeed in fp32. DeepSpeed 0.19.8 writes fp32 master weights with the state of the optimizer, and the
    weights in the working precision: below stage 3 in a file of its own beside model.safetensors. Measured for Llama on
    two processes: to 0.1 %.
    """
    trained = counts.total if trainable is None else trainable
    states = 4 * trained + _optimizer_bytes(counts, optimizer, trained)
    return states + {0: 0, 3: 1}.get(zero_stage, 2) * SIZES[precision] * trained


def _muon_bytes(config: Any, kept: SavedActivations, layers: int, crossed: int) -> int:
    """Bytes of the copies that `optimizers.orthogonalize` makes, of all matrices of one shape at a time.

    Two in fp32 (Nesterov's gradients, and stacked), two in its own precision (x and the next x) and two Gram matrices
    (the first, and the polynomial in it); fp32 on a CPU, bf16 elsewhere.
    """
    q, kv, inner, width, size = *inner_sizes(config), config.hidden_size, 4 if kept.cpu else 2
    fused = kept.block.inputs == 2
    apart = kept.block.gated and not fused
    shapes = {  # rows, columns: how many; `crossed` layers have attention twice
        (width, 2 * inner if kept.block.gated and fused else inner): layers * (2 if apart else 1),
        (width, q): (layers + crossed) * (1 if fused or q != width else 4 if kv == q else 2),
    }

    def copies(rows: int, columns: int) -> int:
        return 8 * rows * columns + 2 * size * (rows * columns + min(rows, columns) ** 2)

    return max(count * copies(*shape) for shape, count in shapes.items())


def _optimizer_bytes(counts: ParameterCounts, optimizer: str, trained: int) -> int:
    # fp32: AdamW keeps two moments, Muon one momentum for each hidden matrix and AdamW's two for the rest.
    return 8 * trained - {"adamw": 0, "muon": 4}[optimizer] * min(counts.hidden, trained)


def _share(size: int, processes: int) -> int:
    return -(-size // processes)
