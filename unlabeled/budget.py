"""What a run costs, before it starts: parameters, FLOPs, steps, memory and the peak of the device. Pure functions."""

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unlabeled import UserError


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

    def numel(parameters) -> int:
        # ZeRO-3 leaves an empty tensor on each process and keeps the true size in `ds_numel`.
        return sum(getattr(p, "ds_numel", p.numel()) for p in {id(p): p for p in parameters}.values())

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
    config: PreTrainedConfig, counts: ParameterCounts, sequence_length: int, target_length: int = 0
) -> float:
    """FLOPs to train on one token of a row of `sequence_length` tokens: forward, and twice that for backward.

    6 · matmul parameters + 12 · width · (positions attended to, summed over the layers), width = heads · head_dim
    (Chowdhery et al. 2022, appendix B). The convention is that of PaLM's MFU: a full layer attends to the whole row,
    also where a causal kernel skips half of it or packed documents cannot see each other; a sliding-window layer to
    min(window, row); the head is counted at every position; recomputation by activation checkpointing is not counted.

    An encoder-decoder's decoder reads `target_length` tokens a row; the FLOPs of the row are spread over its inputs.

    Raises `ValueError` for layers that are neither full nor sliding-window attention.
    """
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    if counts.encoder:
        targets = target_length / sequence_length
        decoder = getattr(config, "num_decoder_layers", None) or config.decoder_layers
        attended = config.num_hidden_layers * sequence_length + decoder * targets * (target_length + sequence_length)
        return float(6 * (counts.encoder + (counts.matmul - counts.encoder) * targets) + 12 * width * attended)
    window = getattr(config, "sliding_window", None)
    default = "sliding_attention" if window else "full_attention"  # Mistral has a window and no list of layers
    layers = getattr(config, "layer_types", None) or [default] * config.num_hidden_layers
    if unknown := set(layers) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"FLOPs per token are not defined for layers of type {', '.join(sorted(unknown))}")
    if window and (config.model_type == "modernbert" or getattr(config, "is_causal", True) is False):
        window = 2 * window + 1  # transformers masks by distance <= window to both sides
    attended = sum(
        min(window, sequence_length) if window and layer == "sliding_attention" else sequence_length for layer in layers
    )
    return float(6 * counts.matmul + 12 * width * attended)


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


# Dense peaks in TFLOPS with fp32 accumulation, from NVIDIA's data sheets and architecture white papers, whose figures
# "with sparsity" are halved. Names are those of `torch.cuda.get_device_name`, and match from end to end: a laptop, Ti,
# NVL or MIG variant of the same name has another peak.
_COLUMN = {"bf16": 0, "fp16": 1, "tf32": 2, "fp32": 3}
_PEAKS = {
    r"H200|H100 80GB HBM3": (989.4, 989.4, 494.7, 66.9),
    r"H100 PCIe": (756.0, 756.0, 378.0, 51.0),
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": (312.0, 312.0, 156.0, 19.5),
    r"L40S": (362.0, 362.0, 183.0, 91.6),
    r"L4": (121.0, 121.0, 60.0, 30.3),
    r"A10": (125.0, 125.0, 62.5, 31.2),
    r"GeForce RTX 4090": (165.2, 165.2, 82.6, 82.6),
    r"GeForce RTX 3090": (71.0, 71.0, 35.6, 35.6),
    r"V100-SXM2-\d+GB": (None, 125.0, None, 15.7),
    r"V100-PCIE-\d+GB": (None, 112.0, None, 14.0),
    r"T4": (None, 65.0, None, 8.1),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak, in FLOPs per second, of a GPU as `torch.cuda.get_device_name` names it; None where it is not known.

    `precision` is that of the matrix products: bf16, fp16, tf32, or fp32 without tensor cores (else `KeyError`). None
    also where the device has no unit for it (bf16 and tf32 on V100 and T4).
    """
    column = _COLUMN[precision]
    name = re.sub(r"^(NVIDIA|Tesla) ", "", device_name)
    tera = next((peaks[column] for pattern, peaks in _PEAKS.items() if re.fullmatch(pattern, name)), None)
    return None if tera is None else tera * 1e12


def human(n: float) -> str:
    """A count with three significant digits: 950, 12.3K, 124M, 6.74B, 1.2T, and 1.21e20 from a quadrillion on."""
    value, suffixes = float(f"{n:.3g}"), iter(["", "K", "M", "B", "T"])
    if abs(value) >= 1e15:
        return f"{n:.2e}".replace("e+", "e")
    suffix = next(suffixes)
    while abs(value) >= 1000:
        value, suffix = value / 1000, next(suffixes)
    return f"{value:.4g}{suffix}"
