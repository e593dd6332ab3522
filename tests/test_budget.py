"""Counts against published ones, FLOPs against torch's own counter, and the identities of a budget."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    EuroBertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from unlabeled import UserError
from unlabeled.planning import (
    Budget,
    ParameterCounts,
    checkpoint_bytes,
    count_parameters,
    describe_cost,
    format_count,
    memory_estimate,
    peak_flops,
    plan_steps,
    training_flops_per_token,
)

SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL_MODELS = {
    "llama": (AutoModelForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=2)),
    "qwen3": (AutoModelForCausalLM, Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)),
    "gpt2": (
        AutoModelForCausalLM,
        GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2),
    ),
    "bert": (AutoModelForMaskedLM, BertConfig(**SMALL)),
    "modernbert": (
        AutoModelForMaskedLM,
        ModernBertConfig(**SMALL | {"num_hidden_layers": 4}, local_attention=128, cls_token_id=1, sep_token_id=2),
    ),
    "eurobert": (AutoModelForMaskedLM, EuroBertConfig(**SMALL, num_key_value_heads=2, mask_token_id=3)),
}


def on_meta(auto_class: type, config: PreTrainedConfig):
    with torch.device("meta"):
        return auto_class.from_config(config)


@pytest.mark.parametrize(
    ("auto_class", "config", "total", "embedding", "matmul", "head"),
    [
        # matmul of GPT-2: 12 layers of 12 · 768², and the tied head.
        (AutoModelForCausalLM, GPT2Config(), 124_439_808, (50257 + 1024) * 768, 84_934_656 + 50257 * 768, 50257 * 768),
        # BERT's head has a 768 x 768 transform before the tied decoder.
        (
            AutoModelForMaskedLM,
            BertConfig(),
            109_514_298,
            (30522 + 512 + 2) * 768,
            84_934_656 + 768**2 + 30522 * 768,
            30522 * 768,
        ),
        # Llama-2-7B is untied: everything but the input table and the 65 norms is a matrix.
        (
            AutoModelForCausalLM,
            LlamaConfig(),
            6_738_415_616,
            32000 * 4096,
            6_738_415_616 - 32000 * 4096 - 65 * 4096,
            32000 * 4096,
        ),
        # SmolLM2 is tied: everything but the 61 norms is a matrix, the head too.
        (AutoModelForCausalLM, SMOLLM2_135M, 134_515_008, 49152 * 576, 134_515_008 - 61 * 576, 49152 * 576),
    ],
    ids=["gpt2", "bert-base", "llama-2-7b", "smollm2-135m"],
)
def test_published_parameter_counts(auto_class, config, total, embedding, matmul, head):
    assert count_parameters(on_meta(auto_class, config)) == ParameterCounts(total, embedding, matmul, head)


def test_counts_of_loaded_and_sharded_models():
    auto_class, config = SMALL_MODELS["llama"]
    model = auto_class.from_config(config)
    counts = count_parameters(model)
    assert counts == count_parameters(on_meta(auto_class, config))
    for parameter in model.parameters():  # as ZeRO-3 leaves them
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    assert count_parameters(model) == counts


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_flops_agree_with_torch_counter(name):
    auto_class, config = SMALL_MODELS[name]
    # Eager, because the counter does not know the fused attention kernel of the CPU and counts 0 for it (torch 2.13).
    model = auto_class.from_config(config, attn_implementation="eager")
    input_ids = torch.randint(3, config.vocab_size, (2, 128))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids).logits.sum().backward()
    expected = training_flops_per_token(config, count_parameters(model), 128)
    assert counter.get_total_flops() / input_ids.numel() == pytest.approx(expected, rel=0.02)


def counted(model, tokens: int, **inputs) -> float:
    """FLOPs per token of a forward and a backward pass, by torch."""
    with FlopCounterMode(display=False) as counter:
        model(**inputs).logits.sum().backward()
    return counter.get_total_flops() / tokens


def test_flops_of_an_adapter():
    """Frozen matrices have no gradient of their own; attention has all of its."""
    from peft import LoraConfig, get_peft_model

    auto_class, config = SMALL_MODELS["llama"]
    model = get_peft_model(
        auto_class.from_config(config, attn_implementation="eager"), LoraConfig(r=4, target_modules="all-linear")
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.enable_input_require_grads()  # as with checkpointing; else the first layer's input has no gradient
    ids = torch.randint(3, config.vocab_size, (2, 128))
    expected = training_flops_per_token(config, count_parameters(model), 128, trainable=trainable)
    assert counted(model, ids.numel(), input_ids=ids) == pytest.approx(expected, rel=0.02)
    assert expected < 0.8 * training_flops_per_token(config, count_parameters(model), 128)


def test_flops_of_activation_checkpointing():
    """An upper bound: torch does not compute again what no gradient needs, the head and each layer's last matrix."""
    auto_class, config = SMALL_MODELS["llama"]
    model = auto_class.from_config(config, attn_implementation="eager").train()
    model.config.use_cache = False
    model.activation_checkpointing_enable()
    ids, counts = torch.randint(3, config.vocab_size, (2, 128)), count_parameters(model)
    spared = 2 * (counts.head + config.num_hidden_layers * config.intermediate_size * config.hidden_size)
    expected = training_flops_per_token(config, counts, 128, extra_forwards=1) - spared
    assert counted(model, ids.numel(), input_ids=ids) == pytest.approx(expected, rel=0.02)


def test_flops_of_sparse_logits():
    """ModernBERT can compute its decoder at the masked positions alone; its head's transform belongs to `matmul`."""
    _, config = SMALL_MODELS["modernbert"]
    config = ModernBertConfig(**config.to_dict() | {"sparse_prediction": True})
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="eager")
    ids = torch.randint(3, config.vocab_size, (4, 128))
    labels = torch.full_like(ids, -100)
    labels[:, :32] = ids[:, :32]  # a quarter
    counts = count_parameters(model)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=labels).loss.backward()
    # The transform before the decoder is skipped as well, which `head_share` leaves in: 6 FLOPs a weight.
    skipped = 6 * 0.75 * config.hidden_size**2
    expected = training_flops_per_token(config, counts, 128, head_share=0.25) - skipped
    assert counter.get_total_flops() / ids.numel() == pytest.approx(expected, rel=0.02)


def test_flops_of_preference_tuning():
    """A forward pass of the reference: 8 N where training takes 6 (and a third more attention)."""
    config, counts = LlamaConfig(**SMALL), ParameterCounts(total=0, embedding=0, matmul=1000, head=0)
    assert training_flops_per_token(config, counts, 100, extra_forwards=1) == 8 * 1000 + 16 * 2 * 64 * 100
    assert training_flops_per_token(config, counts, 100, trainable=0) == 4 * 1000 + 12 * 2 * 64 * 100


def test_flops_attention_term():
    counts = ParameterCounts(total=0, embedding=0, matmul=1000, head=0)
    config = LlamaConfig(**SMALL)
    assert training_flops_per_token(config, counts, 100) == 6 * 1000 + 12 * 2 * 64 * 100
    # Qwen3's heads are wider together than the model: 4 heads of 32.
    assert training_flops_per_token(SMALL_MODELS["qwen3"][1], counts, 100) == 6 * 1000 + 12 * 2 * 128 * 100


def test_flops_of_sliding_windows():
    counts = ParameterCounts(total=0, embedding=0, matmul=0, head=0)
    mistral = MistralConfig(**SMALL, sliding_window=32)  # every layer slides
    assert training_flops_per_token(mistral, counts, 16) == 12 * 64 * (2 * 16)
    assert training_flops_per_token(mistral, counts, 100) == 12 * 64 * (2 * 32)
    # ModernBERT: layers 0 and 3 of 4 are full; the others see themselves and 8 tokens to each side.
    modernbert = ModernBertConfig(**SMALL | {"num_hidden_layers": 4}, local_attention=16)
    assert training_flops_per_token(modernbert, counts, 100) == 12 * 64 * (2 * 100 + 2 * 17)
    assert training_flops_per_token(modernbert, counts, 10) == 12 * 64 * (4 * 10)
    # Qwen3 names a window and does not use it by default.
    assert training_flops_per_token(Qwen3Config(**SMALL, head_dim=16), counts, 8192) == 12 * 64 * (2 * 8192)


def test_flops_of_unknown_layers():
    linear, counts = Qwen3Config(**SMALL), ParameterCounts(total=0, embedding=0, matmul=0, head=0)
    linear.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="linear_attention"):
        training_flops_per_token(linear, counts, 128)


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_plan_steps_identities(world_size, accumulation):
    batch_tokens = accumulation * 128 * 4 * world_size
    budget = plan_steps(50 * batch_tokens, batch_tokens, 128, 4, world_size)
    assert budget == Budget(50 * batch_tokens, batch_tokens, 50, accumulation)
    assert budget.steps * budget.gradient_accumulation_steps * 128 * 4 * world_size == budget.train


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (10_000, 500, 128, 2, 2),
            "batch_tokens 500 does not divide into rows of max_length 128 x per_device_train_batch_size 2 x 2 "
            "processes; the nearest values are 512 and 1024",
        ),
        (
            (10_000, 0, 128, 2, 1),
            "batch_tokens 0 does not divide into rows of max_length 128 x per_device_train_batch_size 2 x 1 process; "
            "the nearest values are 256 and 512",
        ),
        (
            (10_000, 700, 128, 2, 1),
            "batch_tokens 700 does not divide into rows of max_length 128 x per_device_train_batch_size 2 x 1 process; "
            "the nearest values are 512 and 768",
        ),
        (
            (10_000, 512, 128, 2, 1),
            "train_tokens 10000 does not divide into steps of batch_tokens 512; the nearest values are 9728 and 10240",
        ),
        (
            (0, 512, 128, 2, 1),
            "train_tokens 0 does not divide into steps of batch_tokens 512; the nearest values are 512 and 1024",
        ),
        (
            (-512, 512, 128, 2, 1),
            "train_tokens -512 does not divide into steps of batch_tokens 512; the nearest values are 512 and 1024",
        ),
        ((512, 512, 0, 2, 1), "max_length 0 is not a size; it must be at least 1"),
        ((512, 512, 128, -1, 1), "per_device_train_batch_size -1 is not a size; it must be at least 1"),
    ],
)
def test_plan_steps_messages(arguments, message):
    with pytest.raises(UserError) as error:
        plan_steps(*arguments)
    assert str(error.value) == message


COUNTS = ParameterCounts(total=134_515_008, embedding=28_311_552, matmul=134_479_872, head=28_311_552)
ROWS = {"max_length": 1024, "per_device_train_batch_size": 8}


def states(**options) -> dict[str, int]:
    parts = memory_estimate(COUNTS, SMOLLM2_135M, **ROWS, **options)
    return {name: parts[name] for name in ("weights", "gradients", "optimizer")}


def test_sixteen_bytes_per_parameter():
    """The rule of Rajbhandari et al. 2020: 2 + 2 + 12, and the same without mixed precision as 4 + 4 + 8."""
    total = COUNTS.total
    assert states(zero_stage=1, world_size=1) == {"weights": 2 * total, "gradients": 2 * total, "optimizer": 12 * total}
    assert states(precision="fp32") == {"weights": 4 * total, "gradients": 4 * total, "optimizer": 8 * total}


def test_sharding_by_zero_stage():
    one = states(zero_stage=1, world_size=1)
    for stage, sharded in ((1, {"optimizer"}), (2, {"optimizer", "gradients"}), (3, set(one))):
        assert states(zero_stage=stage, world_size=1) == one
        eight = states(zero_stage=stage, world_size=8)
        for part, size in one.items():
            assert eight[part] == (-(-size // 8) if part in sharded else size), (stage, part)


def test_activations_and_logits():
    def parts(**options):
        return memory_estimate(COUNTS, SMOLLM2_135M, **ROWS, **options)

    tokens, width, inner, heads = 8 * 1024, 576, 1536, 9
    # By autocast: each norm keeps two fp32 values, seven linear layers their inputs in half precision, attention keys,
    # values, output and queries of all heads, and besides them the mask and a log-sum-exp.
    layer = tokens * (2 * 8 * width + 5 * 2 * width + 4 * 2 * width + 4 * 2 * inner + 4 * heads + 2 * 1024)
    outside = tokens * 3 * 4 * width
    plain = parts()
    assert plain["activations"] == 30 * layer + outside
    eager = parts(attn_implementation="eager")  # the softmax in fp32 and its copy, and no mask
    assert eager["activations"] - plain["activations"] == 30 * tokens * (6 * heads * 1024 - 4 * heads - 2 * 1024)
    flash = parts(attn_implementation="flash_attention_2")  # 3 heads of keys and values, not repeated, and no mask
    assert plain["activations"] - flash["activations"] == 30 * tokens * (2 * 2 * 6 * 64 + 2 * 1024)
    # The layer that is computed again is smaller than the logits, and takes their place.
    assert parts(activation_checkpointing=True)["activations"] == 30 * 4 * tokens * width + outside
    assert plain["logits"] == 12 * tokens * 49152
    # Under ZeRO all is in half precision but the inputs of the norms. Rows are not sharded.
    zero = parts(zero_stage=3, world_size=8)["activations"]
    assert zero == 30 * (layer - tokens * (2 * 2 * width + 3 * 2 * width)) + outside
    assert zero == parts(zero_stage=2, world_size=1)["activations"]


def test_checkpoint_bytes():
    assert checkpoint_bytes(COUNTS) == 12 * COUNTS.total
    # Muon keeps one momentum for the hidden matrices: here everything but the tied table and the norms.
    hidden = COUNTS.total - 61 * 576 - 49152 * 576
    assert checkpoint_bytes(COUNTS, "muon") == 12 * COUNTS.total - 4 * hidden
    assert states(optimizer="muon")["optimizer"] == 8 * COUNTS.total - 4 * hidden


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.7),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA A100-SXM4-40GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA A10", "fp16", 125),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 3090", "bf16", 71),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla T4", "fp16", 65),
    ],
)
def test_peak_flops(name, precision, tera):
    assert peak_flops(name, precision) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "",
        "AMD Instinct MI300X",
        "NVIDIA A10G",
        "NVIDIA L40",
        "NVIDIA H100 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "Tesla T40",
    ],
)
def test_no_peak_for_an_unknown_device(name):
    assert peak_flops(name, "bf16") is None


def test_no_peak_for_a_precision_without_a_unit():
    assert peak_flops("Tesla T4", "bf16") is None
    with pytest.raises(KeyError):
        peak_flops("NVIDIA H200", "bfloat16")


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.6, "1K"),
        (12_345, "12.3K"),
        (124_439_808, "124M"),
        (999_999, "1M"),
        (6_738_415_616, "6.74B"),
        (2_000_000_000, "2B"),
        (1.2e12, "1.2T"),
        (9.999e14, "1.00e15"),
        (1.21e20, "1.21e20"),
        (-1500, "-1.5K"),
    ],
)
def test_format_count(n, text):
    assert format_count(n) == text


def test_describe_cost():
    metrics = {
        "train_seconds": 110.6, "expected_seconds": 114.2, "flops": 6.12e12, "expected_flops": 6.12e12,
        "flops_per_second": 5.54e10, "mfu": 0.4, "peak_memory_bytes": 0.93e9, "expected_memory_bytes": 0.71e9,
    }  # fmt: skip
    assert describe_cost(metrics) == (
        "110.6 s of training (expected 114.2 s), 6.12T FLOPs, 55.4B FLOP/s, MFU 40.0%, "
        "peak memory 0.93 GB (expected 0.71 GB in training)"
    )
    stopped = {"train_seconds": 50.0, "expected_seconds": None, "flops": 3e12, "expected_flops": 6e12}
    assert describe_cost(stopped) == "50.0 s of training, 3T FLOPs (expected 6T)"
    assert describe_cost({"parameters": 5}) == ""
