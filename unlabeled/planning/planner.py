"""What to train with a budget: a shape, a batch, a rate, a way to fit it into memory, and what else it buys."""

import math
from types import SimpleNamespace

from unlabeled.errors import UserError
from unlabeled.planning.counts import ParameterCounts, training_flops_per_token
from unlabeled.planning.memory import memory_estimate
from unlabeled.planning.shapes import count_shape, lora_parameters, shape_of

HEAD = 64  # width of an attention head, from GPT-2 on; 128 from 1 B parameters on, as in Llama
# Stop when you like, then decay (Hu et al. 2024, arXiv:2404.06395); shares of the steps.
SCHEDULE = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 0.02, "decay_fraction": 0.2}
# 419 unexpected interruptions of 16,384 GPUs in 54 days (Grattafiori et al. 2024, section 3.3.4): hours a GPU.
HOURS_BETWEEN_FAILURES = 54 * 24 * 16_384 / 419


def recommend_shape(parameters: float, vocab_size: int, max_length: int) -> SimpleNamespace:
    """The Llama nearest to `parameters`, all of them counted, whose width and depth are in proportion.

    Widths are whole heads. Depth follows from the size; of the shapes within 5 % of it the one is taken whose
    width : depth is nearest to 50 at 10 M parameters, 64 at 100 M and 128 at 10 B, which GPT-2, GPT-3 and Llama have
    (loss is flat around it: Kaplan et al. 2020, figure 5). Below 1 B parameters the head is tied to the embedding.

    Raises:
        UserError: the vocabulary alone takes most of `parameters`.
    """
    head = 128 if parameters >= 1e9 else HEAD if parameters >= 1e7 else 32
    aspect = min(max(64 * (parameters / 1e8) ** 0.15, 32), 128)
    best = None
    for heads in range(1, 256):
        width = heads * head
        inner = -(-8 * width // 3 // head) * head
        sizes = {"vocab_size": vocab_size, "hidden_size": width, "intermediate_size": inner,
                 "num_attention_heads": heads, "max_position_embeddings": max_length,
                 "tie_word_embeddings": parameters < 1e9}  # fmt: skip
        one, two = (count_shape(shape_of("llama", sizes | {"num_hidden_layers": n})).total for n in (1, 2))
        layers = max(2, round(1 + (parameters - one) / (two - one)))
        total = one + (layers - 1) * (two - one)
        off = abs(math.log(total / parameters))
        cost = max(off - 0.05, 0) * 20 + off + abs(math.log(width / layers / aspect))
        if best is None or cost < best[0]:
            best = (cost, off, sizes | {"num_hidden_layers": layers})
    if best[1] > 0.2:
        raise UserError(
            f"{parameters:.3g} parameters hold no model with a vocabulary of {vocab_size:,}; train a smaller tokenizer "
            "and set --vocab_size, or raise the budget"
        )
    return shape_of("llama", best[2])


def recommend_batch(flops: float, max_length: int, tokens: float) -> int:
    """Tokens in a batch, a power of two of rows: 0.2920 · C^0.3271 (DeepSeek-AI 2024, arXiv:2401.02954, section 3.1).

    At most a hundredth of `tokens`, so that there are steps to take.
    """
    rows = min(0.2920 * flops**0.3271, tokens / 100) / max_length
    return max_length * 2 ** max(0, round(math.log2(max(rows, 1))))


def recommend_learning_rate(flops: float) -> float:
    """Peak rate of AdamW: 0.3118 · C^-0.1250 (DeepSeek-AI 2024, section 3.1), with two digits."""
    return float(f"{0.3118 * flops**-0.1250:.1e}")


def fit_into_memory(
    shape: SimpleNamespace,
    gigabytes: float,
    rows: int,
    processes: int,
    max_length: int,
    precision: str,
    micro: int | None = None,
    checkpointing: bool | None = None,
    counts: ParameterCounts | None = None,
    head_share: float | None = 1.0,
    rows_of_a_unit: int = 1,
    **options,
) -> dict:
    """How `rows` a process and step fit: the file of ds_configs/, micro-batch, checkpointing, and memory by part.

    The first of plain, ZeRO-1, 2, 3 and offload, each without and then with checkpointing, that leaves a tenth of the
    memory free with a micro-batch of 2,048 tokens or more; if none does, the first that fits with fewer. `micro` and
    `checkpointing` are taken as they are where they are given, `counts` are those of `shape` where they are not;
    `rows_of_a_unit` is 2 where `rows` and `micro` count pairs, and `head_share` and `options` go to `memory_estimate`.

    Raises:
        UserError: nothing fits.
    """
    counts = counts or count_shape(shape)
    ways = {"zero1": 1, "zero2": 2, "zero3": 3} if processes > 1 else {}
    ways = {"ddp" if processes > 1 else "single": 0, **ways, "zero3_offload": 3}
    micros = [micro] if micro else [size for size in (2**n for n in range(20, -1, -1)) if rows % size == 0]
    fitting, least = [], math.inf
    for launch, stage in ways.items():
        for checkpoints in (False, True) if checkpointing is None else (checkpointing,):
            for size in micros:
                memory = memory_estimate(
                    counts, shape, max_length=max_length, per_device_train_batch_size=size * rows_of_a_unit,
                    precision=precision, zero_stage=stage, world_size=processes, activation_checkpointing=checkpoints,
                    gradient_accumulation_steps=max(rows // size, 1), offload=launch.endswith("offload"),
                    head_share=None if stage == 3 else head_share, **options,
                )  # fmt: skip
                least = min(least, sum(memory.values()) / 1e9)
                if sum(memory.values()) <= 0.9 * gigabytes * 1e9:
                    found = {"launch": launch, "per_device_train_batch_size": size,
                             "activation_checkpointing": checkpoints, "memory": memory}  # fmt: skip
                    if micro or size * max_length >= min(2048, rows * max_length):
                        return found
                    fitting.append(found)
                    break
    if not fitting:
        raise UserError(
            f"a micro-batch of {micros[-1]} takes {least:.3g} GB at the least, and of the {gigabytes:g} GB of a device "
            "a tenth should stay free; take more or larger ones, or a smaller model"
        )
    return fitting[0]


def checkpoint_seconds(save_seconds: float, gpus: int) -> float:
    """Seconds between checkpoints at which saving and lost work cost least: sqrt(2 · save · time between failures)
    (Young 1974), with the rate of failures of Llama 3's cluster."""
    return math.sqrt(2 * save_seconds * HOURS_BETWEEN_FAILURES * 3600 / gpus)


def equivalent_budgets(
    shape: SimpleNamespace, counts: ParameterCounts, flops: float, max_length: int, rank: int = 16
) -> dict[str, float]:
    """Tokens that `flops` pay for in each stage after pretraining, with the same model."""
    kinds = {"SFT": {}, "DPO": {"extra_forwards": 1}}
    if shape.model_type in ("llama", "mistral", "qwen3"):
        adapter = lora_parameters(shape, rank)
        kinds |= {"LoRA SFT": {"trainable": adapter}, "LoRA DPO": {"trainable": adapter, "extra_forwards": 1}}
    return {
        name: flops / training_flops_per_token(shape, counts, max_length, **options) for name, options in kinds.items()
    }
