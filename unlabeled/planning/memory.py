"""Memory of a training step by part, bytes sent between processes, and the size of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unlabeled.planning.activations import SavedActivations, first_of, inner_sizes
from unlabeled.planning.counts import ParameterCounts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VALUE_BYTES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}  # by precision
# Of a process on a CPU, measured: benchmarks/results/memory_recipes_cpu.md.
HELD_BY_ALLOCATOR = 0.45  # share of activations and logits: freed blocks that the C library keeps and cannot reuse
LIBRARIES = {2: 65_000_000, 4: 40_000_000}  # code and tables that the first step loads; in bf16 compiled kernels
# Parameters that ZeRO-3 keeps gathered: DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance.
ZERO3_LIVE_PARAMETERS = 10**9


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
    """Estimate the peak memory of a training step, in bytes per process by part. The parts add up to the peak.

    Holds for encoders, decoders and encoder-decoders. Within 15 % of what was measured on a CPU, libraries aside
    (benchmarks/results/memory_cpu.md). Left out are loaded libraries and what the allocator keeps (for a CPU see
    `resident_parts`), the CUDA context, fragmentation of a GPU's memory, and what a compiled model saves.

    - `weights`: In fp32, plus the half-precision copies that autocast makes of the matrices. With ZeRO in the working
      precision (Rajbhandari et al. 2020, sections 3.1 and 5), sharded by stage 3.
    - `gradients`: Of the parameters that are trained, in the precision of the weights; sharded from stage 2 on.
    - `optimizer`: Two moments in fp32, one for Muon's matrices. With ZeRO the fp32 master weights as well, which
      DeepSpeed 0.19.8 keeps even for a model in fp32; sharded from stage 1 on.
    - `activations`: What layers, embeddings, last norm and output head save for the backward pass (`activations.py`).
      With activation checkpointing the input of each layer, and what one layer saves in full together with the
      gradients of its widest values, as far as that exceeds the logits, whose memory it takes over (Korthikanti et al.
      2022, section 5).
    - `logits`: tokens · vocabulary · 12 bytes: log-softmax, its gradient and that of the logits, in fp32. With
      `losses.linear_cross_entropy_sum` those of some positions at a time, the inputs of the head and both gradients
      of its product.
    - `buffers`: DDP's copy of the gradients; the parameters that ZeRO-3 keeps gathered, all of a model up to 1e9.
    - `step`: Copies that the optimizer step makes. ZeRO-1 and 2 copy the gradients of the process's share to fp32
      (stage 1 frees those of other shares first). Muon copies all matrices of one shape, see `_muon_bytes`.
    - `reference`, if asked for: The weights once more, for preference tuning of all weights.
    - `reused`, negative: The memory of activations, logits and autocast's copies, which the backward pass frees, is
      used again for gradients and the copies of the step. Not for the gradients if earlier micro-batches of the step
      have left theirs, or with ZeRO-3, which has separate buffers for them.

    Args:
        counts: The parameters of the model.
        config: Sizes of the model by the names of a Hugging Face config; any object that has them.
        max_length: Tokens in a row.
        per_device_train_batch_size: Rows in a micro-batch.
        precision: bf16, fp16, tf32 or fp32.
        optimizer: adamw or muon.
        zero_stage: The ZeRO stage; 0 is Trainer without DeepSpeed.
        world_size: The number of processes.
        attn_implementation: sdpa (with a mask, as packed or padded rows have it), eager, flash_attention_2 or varlen.
        activation_checkpointing: Whether layers are computed again in the backward pass.
        target_length: Tokens in a row of an encoder-decoder's decoder.
        gradient_accumulation_steps: Micro-batches in an optimizer step.
        trainable: The parameters that are trained, if an adapter leaves the others frozen.
        offload: As in ds_configs/zero3_offload.json: optimizer, sharded gradients and weights are in main memory, see
            `host_bytes`. From the source of DeepSpeed, not measured.
        reference: Whether a reference model is in memory.
        head_share: The share of the positions at which `losses.linear_cross_entropy_sum` computes the output head; None
            if the logits of all positions are kept.
        device: On "cpu" dropout saves its mask as values and not as bytes, and attention with dropout all scores.

    Returns:
        Bytes by part. Only `reused` is negative.
    """
    value_bytes = VALUE_BYTES[precision]
    trained = counts.total if trainable is None else trainable
    autocast = value_bytes == 2 and not zero_stage
    saved = SavedActivations(
        config,
        value_bytes,
        autocast,
        attn_implementation,
        norms_are_frozen=trained < counts.total,
        on_cpu=device == "cpu",
    )
    tokens = per_device_train_batch_size * max_length
    decoder_tokens = per_device_train_batch_size * target_length
    states = _state_bytes(counts, optimizer, trained, value_bytes, zero_stage, world_size, offload)
    logits, freed_before_backward = _logit_bytes(
        counts, config, decoder_tokens or tokens, value_bytes, head_share, device
    )
    activations = _activation_bytes(
        saved,
        tokens,
        max_length,
        decoder_tokens,
        target_length,
        recomputed_in=freed_before_backward if activation_checkpointing else None,
    )
    buffers, step = _step_bytes(counts, saved, optimizer, trained, zero_stage, world_size, offload, bool(target_length))
    weight_copies = value_bytes * counts.matmul if autocast else 0
    gradients_exist_before = gradient_accumulation_steps > 1 or zero_stage == 3
    reusing = step if gradients_exist_before else step + states["gradients"]
    parts = {
        "weights": states["weights"] + weight_copies,
        "gradients": states["gradients"],
        "optimizer": states["optimizer"],
        "activations": activations,
        "logits": logits,
        "buffers": buffers,
        "step": step,
    }
    if reference:
        parts["reference"] = states["weights"]
    parts["reused"] = -min(weight_copies + activations + logits, reusing)
    return parts


def _state_bytes(
    counts: ParameterCounts,
    optimizer: str,
    trained: int,
    value_bytes: int,
    zero_stage: int,
    world_size: int,
    offload: bool,
) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state per process: its shares of what ZeRO shards."""
    parameter_bytes = value_bytes if zero_stage else 4
    master_weights = 4 * trained if zero_stage else 0
    states = {
        "weights": parameter_bytes * counts.total,
        "gradients": parameter_bytes * trained,
        "optimizer": _optimizer_bytes(counts, optimizer, trained) + master_weights,
    }
    for part, sharded_from_stage in (("optimizer", 1), ("gradients", 2), ("weights", 3)):
        if zero_stage >= sharded_from_stage:
            states[part] = 0 if offload else _share(states[part], world_size)
    return states


def _logit_bytes(
    counts: ParameterCounts,
    config: Any,
    tokens: int,
    value_bytes: int,
    head_share: float | None,
    device: str,
) -> tuple[int, int]:
    """Bytes of the logits, and how many of them are free again before the layers' backward pass begins."""
    if not counts.head:  # the logits of a classifier are negligible
        return 0, 0
    if head_share is None:
        logits = 12 * tokens * config.vocab_size
        return logits, logits
    positions = round(head_share * tokens)
    chunk = min(positions * config.vocab_size, logits_at_a_time(device))
    freed = chunk * (4 if value_bytes == 4 else 8) + 2 * value_bytes * positions * config.hidden_size
    return freed + 4 * counts.head, freed


def _activation_bytes(
    saved: SavedActivations,
    tokens: int,
    max_length: int,
    decoder_tokens: int,
    target_length: int,
    recomputed_in: int | None,
) -> int:
    """Bytes of the activations of all layers.

    Args:
        decoder_tokens: Tokens that the decoder of an encoder-decoder reads, else 0.
        recomputed_in: With activation checkpointing, the free bytes in which a layer is computed again; else None.
    """
    layers = saved.config.num_hidden_layers
    outside = saved.outside_bytes(tokens)
    layer_bytes = saved.layer_bytes(tokens, max_length)
    total = layers * layer_bytes
    checkpoints = layers * saved.checkpoint_bytes(tokens)
    largest_layer = layer_bytes
    last_tokens = tokens
    if decoder_tokens:
        decoder_layers = _decoder_layers(saved.config)
        outside += saved.outside_bytes(decoder_tokens)
        layer_bytes = saved.layer_bytes(decoder_tokens, target_length, encoder_length=max_length)
        total += decoder_layers * layer_bytes
        checkpoints += decoder_layers * saved.checkpoint_bytes(decoder_tokens)
        largest_layer = max(largest_layer, layer_bytes)
        last_tokens = decoder_tokens
    if recomputed_in is None:
        return total + outside
    recomputed = largest_layer + saved.widest_gradient_bytes(last_tokens)
    return checkpoints + max(0, recomputed - recomputed_in) + outside


def _decoder_layers(config: Any) -> int:
    return first_of(config, "num_decoder_layers", "decoder_layers") or config.num_hidden_layers


def _step_bytes(
    counts: ParameterCounts,
    saved: SavedActivations,
    optimizer: str,
    trained: int,
    zero_stage: int,
    world_size: int,
    offload: bool,
    is_encoder_decoder: bool,
) -> tuple[int, int]:
    """Bytes of the buffers of data parallelism, and of the copies that the optimizer step makes."""
    gradients = (saved.value_bytes if zero_stage else 4) * trained
    own_gradients_in_fp32 = _share(4 * trained, world_size)
    if zero_stage == 3:
        gathered = saved.value_bytes * min(counts.total, ZERO3_LIVE_PARAMETERS)
        stepping = 0 if offload else min(own_gradients_in_fp32, 4 * ZERO3_LIVE_PARAMETERS)
        return max(gathered, stepping), 0
    if zero_stage:
        freed_first = gradients - _share(gradients, world_size) if zero_stage == 1 else 0
        return 0, 0 if offload else max(0, own_gradients_in_fp32 - freed_first)
    ddp_buckets = gradients if world_size > 1 else 0
    return ddp_buckets, _muon_bytes(saved, is_encoder_decoder) if optimizer == "muon" else 0


def resident_parts(memory: dict[str, int], precision: str) -> dict[str, int]:
    """Estimate the main memory that a process on a CPU takes besides the parts of `memory_estimate`, in bytes by part.

    - `allocator`: glibc keeps most of what is freed in blocks below 32 MB, and activations of many sizes leave holes.
    - `libraries`: What the first step loads or compiles.

    Both are fitted to whole runs of recipes with one or two threads (benchmarks/results/memory_recipes_cpu.md).

    Args:
        memory: The result of `memory_estimate`.
        precision: bf16, fp16, tf32 or fp32.
    """
    return {
        "allocator": round(HELD_BY_ALLOCATOR * (memory["activations"] + memory["logits"])),
        "libraries": LIBRARIES[VALUE_BYTES[precision]],
    }


def logits_at_a_time(device: str) -> int:
    """Return the number of logits that `losses.linear_cross_entropy_sum` computes at a time.

    On a CPU as many as stay in its cache.
    """
    return 1 << 21 if device == "cpu" else 1 << 27


def host_bytes(
    counts: ParameterCounts, zero_stage: int, world_size: int, precision: str = "bf16", trainable: int | None = None
) -> int:
    """Return the main memory that ZeRO offload takes, in bytes per process.

    Weights, two moments and gradients of the process's share in fp32 (16 bytes per parameter), a buffer for them in the
    working precision, and with stage 3 its share of the weights. From the source of DeepSpeed, not measured.
    """
    trained = counts.total if trainable is None else trainable
    weights = VALUE_BYTES[precision] * counts.total if zero_stage == 3 else 0
    return _share((16 + VALUE_BYTES[precision]) * trained + weights, world_size)


def communication_bytes(
    counts: ParameterCounts,
    zero_stage: int,
    world_size: int,
    precision: str = "bf16",
    trainable: int | None = None,
    gradient_accumulation_steps: int = 1,
) -> int:
    """Return the bytes that each process sends in an optimizer step.

    Collectives are rings: an all-gather or a reduce-scatter sends (n - 1) / n of its values on n processes, an
    all-reduce twice as many.

    - Stage 0, DDP: an all-reduce of the gradients in fp32, once a step.
    - Stages 1 and 2: a reduce-scatter of the gradients and an all-gather of the weights would do (Rajbhandari et al.
      2020, section 7), 2 rings. DeepSpeed 0.19.8 all-reduces the gradients (`use_multi_rank_bucket_allreduce`), which
      makes 3. Stage 1 reduces once a step, stage 2 for each micro-batch.
    - Stage 3: for each micro-batch a reduce-scatter of the gradients, an all-gather of the weights for the forward
      pass, and another one for the backward pass (3 rings, 1.5 times DDP's) of those that are not gathered any more:
      DeepSpeed keeps up to 1e9 parameters, except in the first step.

    Measured on two processes: benchmarks/results/memory_cpu.md. (gloo's reduce-scatter sends twice as much.)
    """
    trained = counts.total if trainable is None else trainable
    if zero_stage == 3:
        gathered_again = max(0, counts.total - ZERO3_LIVE_PARAMETERS)
        values = (counts.total + gathered_again + trained) * gradient_accumulation_steps
    else:
        rings = {0: 2, 1: 3, 2: 2 * gradient_accumulation_steps + 1}[zero_stage]
        values = rings * trained
    value_bytes = VALUE_BYTES[precision] if zero_stage else 4
    return value_bytes * values * (world_size - 1) // world_size


def checkpoint_bytes(
    counts: ParameterCounts,
    optimizer: str = "adamw",
    *,
    trainable: int | None = None,
    zero_stage: int = 0,
    precision: str = "fp32",
) -> int:
    """Return the bytes of a `checkpoint-*` folder: weights and optimizer state of what is trained, of all processes.

    Without DeepSpeed all is in fp32. DeepSpeed 0.19.8 writes fp32 master weights with the state of the optimizer, and
    the weights in the working precision, below stage 3 twice: in a file of its own and in model.safetensors. Within
    0.1 % of what was measured for Llama on two processes.
    """
    trained = counts.total if trainable is None else trainable
    states = 4 * trained + _optimizer_bytes(counts, optimizer, trained)
    copies_of_weights = {0: 0, 3: 1}.get(zero_stage, 2)
    return states + copies_of_weights * VALUE_BYTES[precision] * trained


def _muon_bytes(saved: SavedActivations, is_encoder_decoder: bool) -> int:
    """Bytes of the copies that `optimizers.orthogonalize` makes, of all matrices of one shape at a time.

    Two in fp32 (Nesterov's gradients, and stacked), two in its own precision (x and the next x) and two Gram matrices
    (the first, and the polynomial in it). Its precision is fp32 on a CPU, bf16 elsewhere.
    """
    config = saved.config
    block = saved.block
    width = config.hidden_size
    query_width, key_width, inner = inner_sizes(config)
    cross_attentions = _decoder_layers(config) if is_encoder_decoder else 0
    layers = config.num_hidden_layers + cross_attentions

    if block.has_fused_matrices:
        feed_forward_columns = 2 * inner if block.has_gate else inner
        feed_forward_matrices = 1
        attention_matrices = 1
    else:
        feed_forward_columns = inner
        feed_forward_matrices = 2 if block.has_gate else 1
        has_square_matrices = query_width == width  # of queries and output, and of keys and values without groups
        square_matrices = 4 if key_width == query_width else 2
        attention_matrices = square_matrices if has_square_matrices else 1

    value_bytes = 4 if saved.on_cpu else 2
    largest = 0
    for rows, columns, matrices in (
        (width, feed_forward_columns, layers * feed_forward_matrices),
        (width, query_width, (layers + cross_attentions) * attention_matrices),
    ):
        gram = min(rows, columns) ** 2
        largest = max(largest, matrices * (8 * rows * columns + 2 * value_bytes * (rows * columns + gram)))
    return largest


def _optimizer_bytes(counts: ParameterCounts, optimizer: str, trained: int) -> int:
    """Bytes of the optimizer state in fp32.

    AdamW keeps two moments. Muon keeps one momentum for each hidden matrix, and AdamW's two for the rest.
    """
    hidden = min(counts.hidden, trained)
    return {"adamw": 8 * trained, "muon": 8 * trained - 4 * hidden}[optimizer]


def _share(total: int, processes: int) -> int:
    """The share of a process, rounded up."""
    return -(-total // processes)
