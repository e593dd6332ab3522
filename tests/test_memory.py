"""What a layer keeps for its backward pass, against torch itself; states, traffic and checkpoints by known answers."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    EuroBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    Qwen3Config,
    T5Config,
)

from benchmarks.memory import RECIPES
from unlabeled.config import PretrainingArguments
from unlabeled.data.attention_masks import block_mask
from unlabeled.models.attention import separate_cross_attention_mask
from unlabeled.planner.options import PlanOptions
from unlabeled.planner.outline import outline_model
from unlabeled.planner.recipe_config import plan_recipe_budget, read_recipe_config
from unlabeled.planning import ParameterCounts, RunSizes, count_parameters, not_calibrated, run_costs
from unlabeled.planning.memory import (
    HELD_BY_ALLOCATOR,
    LIBRARIES,
    checkpoint_bytes,
    communication_bytes,
    host_bytes,
    memory_estimate,
)

ROWS, LENGTH, TARGETS, VOCABULARY = 2, 120, 44, 96  # no number of tokens is the width of a matrix
BATCH = {"max_length": LENGTH, "per_device_train_batch_size": ROWS}
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 168, "num_hidden_layers": 6,
    "num_attention_heads": 4, "max_position_embeddings": LENGTH, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 6, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
T5 = {
    "vocab_size": VOCABULARY, "d_model": 64, "d_ff": 168, "d_kv": 16, "num_layers": 4, "num_decoder_layers": 3,
    "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 64, "encoder_ffn_dim": 168, "decoder_ffn_dim": 168, "encoder_layers": 4,
    "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0,
    "max_position_embeddings": LENGTH,
}  # fmt: skip
NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=32),
    "gpt2": GPT2Config(**GPT2, **NO_DROPOUT["gpt2"]),
    "gpt2 with dropout": GPT2Config(**GPT2),
    "bert": BertConfig(**SMALL, **NO_DROPOUT["bert"]),
    "bert with dropout": BertConfig(**SMALL),
    "modernbert": ModernBertConfig(**SMALL, local_attention=32, cls_token_id=1, sep_token_id=2),
    "eurobert": EuroBertConfig(**SMALL, num_key_value_heads=2, mask_token_id=3),
    "bart": BartConfig(**BART),
    "t5": T5Config(**T5, **NO_DROPOUT["t5"]),
    "t5 with dropout": T5Config(**T5),
    "t5 gated": T5Config(**T5, feed_forward_proj="gated-gelu", **NO_DROPOUT["t5"]),
}


def build(name: str, attention: str):
    config = CONFIGS[name]
    kinds = {"t5": AutoModelForSeq2SeqLM, "bart": AutoModelForSeq2SeqLM}
    kinds |= dict.fromkeys(("bert", "modernbert", "eurobert"), AutoModelForMaskedLM)
    model = kinds.get(config.model_type, AutoModelForCausalLM).from_config(config, attn_implementation=attention)
    if config.is_encoder_decoder:
        model.register_forward_pre_hook(separate_cross_attention_mask, with_kwargs=True)
    return model.train()


def packed(config, attention: str, dtype: torch.dtype) -> dict:
    """Rows of several documents, as the collators make them."""
    batch = {"input_ids": torch.randint(4, VOCABULARY, (ROWS, LENGTH)), "use_cache": False}
    documents = (torch.arange(LENGTH) // 50).expand(ROWS, LENGTH)
    if config.model_type in ("llama", "qwen3", "gpt2"):
        return batch | {"position_ids": (torch.arange(LENGTH) % 50).expand(ROWS, LENGTH)}

    def mask(window=None):
        seen = block_mask(documents, window)
        return seen if attention == "sdpa" else torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)

    if config.is_encoder_decoder:
        return batch | {
            "decoder_input_ids": torch.randint(4, VOCABULARY, (ROWS, TARGETS)),
            "attention_mask": mask(),
            "decoder_attention_mask": mask()[..., :TARGETS, :TARGETS].contiguous(),
            "cross_attention_mask": mask()[..., :TARGETS, :].contiguous(),
        }
    sliding = config.model_type == "modernbert"
    masks = {"full_attention": mask(), "sliding_attention": mask(config.sliding_window)} if sliding else mask()
    return batch | {"attention_mask": masks}


def kept(model, batch: dict, autocast: bool) -> int:
    """Bytes that a forward pass and the loss keep for the backward pass, weights and their copies left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {p.shape for p in model.parameters() if p.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    found, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        copy = autocast and tensor.dtype == torch.bfloat16 and tensor.shape in shapes
        if storage.data_ptr() not in weights and not copy:
            alive.append(tensor)  # so that no other tensor gets its place
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(**batch).logits
        F.cross_entropy(logits.float().flatten(0, 1), torch.zeros(logits[..., 0].numel(), dtype=torch.long))
    return sum(found.values()) - 4 * logits.numel()


CASES = [
    (name, attention, kind)
    for name in CONFIGS
    for attention in ("sdpa", "eager")
    for kind in ("fp32", "autocast", "half")
]
# On a CPU in half precision attention falls back to operations of its own where there is dropout or a bias.
CASES = [case for case in CASES if "dropout" not in case[0] or case[2] == "fp32"]
CASES = [case for case in CASES if not (case[0].startswith("t5") and case[1:] == ("sdpa", "half"))]


@pytest.mark.parametrize(("name", "attention", "kind"), CASES)
def test_activations_agree_with_torch(name, attention, kind):
    """fp32; bf16 by autocast, as without DeepSpeed; or all in bf16, as under ZeRO."""
    model = build(name, attention)
    if kind == "half":
        model.bfloat16()
    batch = packed(model.config, attention, torch.bfloat16 if kind == "half" else torch.float32)
    found = memory_estimate(
        count_parameters(model),
        model.config,
        **BATCH,
        precision="fp32" if kind == "fp32" else "bf16",
        zero_stage=2 if kind == "half" else 0,
        attn_implementation=attention,
        device="cpu",
        target_length=TARGETS if model.config.is_encoder_decoder else 0,
    )
    assert found["activations"] == pytest.approx(kept(model, batch, kind == "autocast"), rel=0.1)


def test_activations_of_korthikanti():
    """Equation 1 of Korthikanti et al. 2022, all in half precision with dropout: 34 bytes a token and width."""
    sizes = SMALL | {"intermediate_size": 4 * SMALL["hidden_size"]}
    options = {"zero_stage": 1, "attn_implementation": "flash_attention_2"}
    six, two = (
        estimate(BertConfig(**sizes | {"num_hidden_layers": layers}), **options)["activations"] for layers in (6, 2)
    )
    assert (six - two) / 4 == ROWS * LENGTH * (34 * 64 + 4 * 4)  # and a log-sum-exp for each of 4 heads


@pytest.mark.parametrize("autocast", [False, True])
def test_activations_of_an_adapter_agree_with_torch(autocast):
    """The norms are frozen: their normalized inputs, which only the gradients of their weights need, are not kept."""
    model = get_peft_model(build("llama", "sdpa"), LoraConfig(r=1, target_modules="all-linear"))
    full, adapted = (
        memory_estimate(
            count_parameters(model),
            model.config,
            **BATCH,
            precision="bf16" if autocast else "fp32",
            trainable=trainable,
            device="cpu",
        )["activations"]
        for trainable in (None, sum(p.numel() for p in model.parameters() if p.requires_grad))
    )
    assert full - adapted == SMALL["num_hidden_layers"] * 2 * 4 * ROWS * LENGTH * SMALL["hidden_size"]
    batch = packed(CONFIGS["llama"], "sdpa", torch.float32)
    assert adapted == pytest.approx(kept(model, batch, autocast), rel=0.1)


def test_sizes_without_transformers():
    """And neither transformers nor torch is loaded."""
    names = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(CONFIGS["llama"], name) for name in names} | {"num_key_value_heads": 2}
    assert estimate(SimpleNamespace(**sizes)) == estimate(CONFIGS["llama"])
    code = "import sys, unlabeled.planning.memory; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


COUNTS = ParameterCounts(total=1_000_000, embedding=100_000, matmul=990_000, head=100_000)


def estimate(config=CONFIGS["llama"], **options) -> dict[str, int]:
    return memory_estimate(COUNTS, config, **BATCH | options)


def test_parts_add_up_to_the_peak():
    """Gradients take the place of activations that the backward pass frees, unless they are there before it."""
    one = estimate(precision="fp32")
    live = one["activations"] + one["logits"]
    assert live > one["gradients"] == 4_000_000
    assert sum(one.values()) == one["weights"] + one["optimizer"] + live
    assert sum(estimate(precision="fp32", gradient_accumulation_steps=2).values()) == sum(one.values()) + 4_000_000
    few = estimate(precision="fp32", max_length=16)
    assert few["activations"] + few["logits"] < 4_000_000
    assert sum(few.values()) == 16_000_000
    assert sum(estimate(precision="bf16", max_length=16).values()) == 16_000_000  # autocast's copies are gone by then


def test_states_of_frozen_parameters():
    parts = estimate(precision="fp32", trainable=10_000)
    assert [parts[part] for part in ("weights", "gradients", "optimizer")] == [4_000_000, 40_000, 80_000]
    # Under ZeRO also no master weights.
    parts = estimate(trainable=10_000, zero_stage=2, world_size=4)
    assert [parts[part] for part in ("weights", "gradients", "optimizer")] == [2_000_000, 5_000, 30_000]
    assert checkpoint_bytes(COUNTS, trainable=10_000) == 120_000


def test_reference_model():
    assert "reference" not in estimate()
    assert estimate(reference=True)["reference"] == 4_000_000  # no gradient, so autocast keeps no copies
    assert estimate(reference=True, zero_stage=3, world_size=4)["reference"] == 500_000


def test_buffers_and_steps():
    assert estimate(world_size=2)["buffers"] == 4_000_000  # DDP's buckets
    assert estimate(zero_stage=3, world_size=4)["buffers"] == 2_000_000  # all weights, gathered
    large = ParameterCounts(total=7 * 10**9, embedding=0, matmul=7 * 10**9, head=1)
    gathered = memory_estimate(large, CONFIGS["llama"], **BATCH, zero_stage=3, world_size=8)["buffers"]
    assert gathered == 4 * 7 * 10**9 // 8  # more than 1e9 weights in bf16: gradients in fp32, while it steps
    # fp32 gradients of the process's share, which stage 1 makes in the place of the others.
    assert estimate(zero_stage=2, world_size=4)["step"] == 1_000_000
    assert estimate(zero_stage=1, world_size=4)["step"] == 0
    assert estimate(zero_stage=1, world_size=1)["step"] == 4_000_000


@pytest.mark.parametrize(("device", "size"), [("cpu", 4), ("cuda", 2)])
def test_copies_of_muon(device, size):
    # The largest are gate and up of 6 layers: 64 x 168 each.
    matrix, gram = 64 * 168, 64**2
    assert estimate(optimizer="muon", device=device)["step"] == 12 * (8 * matrix + 2 * size * (matrix + gram))


def test_offload():
    parts = estimate(zero_stage=3, world_size=4, offload=True)
    assert [parts[part] for part in ("weights", "gradients", "optimizer")] == [0, 0, 0]
    assert host_bytes(COUNTS, 3, 4) == (18 + 2) * 250_000
    parts = estimate(zero_stage=2, world_size=4, offload=True)
    assert [parts[part] for part in ("weights", "gradients", "optimizer")] == [2_000_000, 0, 0]
    assert host_bytes(COUNTS, 2, 4) == 18 * 250_000


@pytest.mark.parametrize(
    ("options", "megabytes"),
    [
        ({"zero_stage": 0, "world_size": 1}, 0),
        ({"zero_stage": 0, "world_size": 4}, 2 * 0.75 * 4),  # fp32
        ({"zero_stage": 0, "world_size": 4, "gradient_accumulation_steps": 8}, 2 * 0.75 * 4),
        ({"zero_stage": 0, "world_size": 4, "trainable": 10_000}, 2 * 0.75 * 0.04),
        ({"zero_stage": 1, "world_size": 4}, 3 * 0.75 * 2),
        ({"zero_stage": 1, "world_size": 4, "gradient_accumulation_steps": 8}, 3 * 0.75 * 2),
        ({"zero_stage": 2, "world_size": 4}, 3 * 0.75 * 2),
        ({"zero_stage": 2, "world_size": 4, "gradient_accumulation_steps": 8}, 17 * 0.75 * 2),
        ({"zero_stage": 3, "world_size": 4}, 2 * 0.75 * 2),  # all weights stay gathered between the passes
        ({"zero_stage": 3, "world_size": 4, "gradient_accumulation_steps": 8}, 16 * 0.75 * 2),
        ({"zero_stage": 3, "world_size": 4, "trainable": 0}, 0.75 * 2),
        ({"zero_stage": 2, "world_size": 2, "precision": "fp32"}, 3 * 0.5 * 4),
    ],
)
def test_communication(options, megabytes):
    assert communication_bytes(COUNTS, **options) == round(megabytes * 1e6)


def test_communication_of_a_large_model():
    """Rajbhandari et al. 2020, section 7.2.2: 1.5 times what plain data parallelism sends, less what stays."""
    large = ParameterCounts(total=100 * 10**9, embedding=0, matmul=0, head=0)
    plain = 2 * 2 * large.total * 7 // 8
    assert communication_bytes(large, 3, 8) == pytest.approx(1.5 * plain, rel=0.01)


@pytest.mark.parametrize(
    ("stage", "precision", "measured"),
    [  # a Llama of 2,722,048 parameters on two processes: all files of checkpoint-2 above 100 kB
        (1, "fp32", 16_339_263 + 16_338_623 + 10_900_837 + 10_892_248),
        (2, "bf16", 16_338_693 + 16_339_333 + 5_456_805 + 5_448_176),
        (3, "bf16", 16_337_605 + 16_337_605 + 5_448_176),
    ],
)
def test_checkpoint_bytes_under_zero(stage, precision, measured):
    counts = ParameterCounts(total=2_722_048, embedding=98_304, matmul=2_719_744, head=98_304)
    assert checkpoint_bytes(counts, zero_stage=stage, precision=precision) == pytest.approx(measured, rel=1e-3)


def test_resident_memory_on_cpu():
    """What the allocator keeps, and what the first step loads; neither is counted on a GPU."""
    sizes = RunSizes(1000, LENGTH, 4, 2, COUNTS.total, precision="bf16", head_share=1.0, device="cpu")
    costs = run_costs(COUNTS, CONFIGS["llama"], sizes)
    assert set(costs.memory_by_micro_batch) == {1, 2, 4} and costs.memory == costs.memory_by_micro_batch[4]
    live = costs.memory["activations"] + costs.memory["logits"]
    assert costs.memory["allocator"] == round(HELD_BY_ALLOCATOR * live)
    assert costs.memory["libraries"] == LIBRARIES[2]
    on_gpu = run_costs(COUNTS, CONFIGS["llama"], replace(sizes, device="cuda")).memory
    assert not {"allocator", "libraries"} & on_gpu.keys()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_cpu_kernel_caches(precision, tmp_path, monkeypatch):
    """Else rows of many lengths in bf16 on a CPU would leave half a gigabyte of kernels behind."""
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    monkeypatch.setenv(names[0], "7")  # of the user
    monkeypatch.delenv(names[1], raising=False)
    PretrainingArguments(
        output_dir=str(tmp_path), train_tokens=64, batch_tokens=64, max_length=8, precision=precision, use_cpu=True
    )
    assert [os.environ.get(name) for name in names] == ["7", "64" if precision == "bf16" else None]
    os.environ.pop(names[1], None)


def measured_recipes() -> list[dict[str, str]]:
    """The rows of benchmarks/results/memory_recipes_cpu.md by the names of their columns."""
    page = (ROOT / "benchmarks" / "results" / "memory_recipes_cpu.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def test_accuracy_of_measured_runs():
    """15 %, for every run of the table, in both precisions, but for those of which the plan says otherwise."""
    rows = measured_recipes()
    assert {row["precision"] for row in rows} == {"bf16", "fp32"} and len(rows) >= 10
    for row in rows:
        predicted, measured = (float(row[key].replace(",", "")) for key in ("predicted", "measured"))
        assert float(row["ratio"]) == pytest.approx(predicted / measured, abs=0.006), row
        checkpointing = "activation_checkpointing" in RECIPES[row["run"]][-1]
        assert checkpointing or 0.85 <= predicted / measured <= 1.15, row


def test_not_calibrated(monkeypatch):
    sizes = RunSizes(1000, LENGTH, 4, 2, COUNTS.total, precision="bf16", device="cpu")
    assert not_calibrated(sizes) is None
    assert "compiled" in not_calibrated(sizes, compiled=True)
    assert "checkpointing" in not_calibrated(replace(sizes, activation_checkpointing=True))
    assert "DeepSpeed in bf16" in not_calibrated(replace(sizes, zero_stage=2))
    assert not_calibrated(replace(sizes, zero_stage=2, precision="fp32")) is None
    assert "conversations" in not_calibrated(replace(sizes, objective="sft"))
    assert "streamed" in not_calibrated(replace(sizes, streamed=True))
    assert not_calibrated(replace(sizes, activation_checkpointing=True, device="cuda"), compiled=True) is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "this system" in not_calibrated(sizes)


@pytest.mark.parametrize("row", measured_recipes(), ids=lambda row: f"{row['run']} {row['precision']}")
def test_predictions_of_measured_runs(row):
    """The column `model` is what the code says today; where it is not, measure again (benchmarks/memory.py)."""
    _, config, _, options = RECIPES[row["run"]]
    file = str(ROOT / "recipes" / "configs" / f"{config}.yaml")
    recipe, values = read_recipe_config(file)
    values |= {key: json.loads(value) if key == "config_overrides" else value for key, value in options.items()}
    vocabulary = {"pretrain_clm": 2048, "pretrain_mlm": 1024, "pretrain_span": 1024}[recipe]
    values["config_overrides"] = {"vocab_size": vocabulary} | values["config_overrides"]
    values |= {"train_tokens": values["batch_tokens"], "tokenizer_name_or_path": None}
    outline = outline_model(recipe, values, labels=2)
    budget = plan_recipe_budget(
        recipe,
        values,
        PlanOptions(config=file),
        trainable=outline.trainable,
        is_encoder_decoder=recipe == "pretrain_span",
        precision=row["precision"],
        device="cpu",
    )
    predicted = sum(run_costs(outline.counts, outline.config, budget.sizes).memory.values())
    assert f"{predicted / 1e6:,.0f}" == row["model"]
    assert f"{outline.counts.total / 1e6:.1f} M" == row["parameters"]
