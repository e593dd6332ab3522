"""Whole recipes as shipped, for some steps, and stock `Trainer` with the same models."""

import contextlib
import json
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.inputs import make_base_model, make_inputs
from benchmarks.gpu.models import hugging_face_model
from benchmarks.gpu.step_times import StepTimes, StopRun, add_callback, record_steps
from benchmarks.gpu.varlen import add_missing_grouped_heads
from benchmarks.settings import T5_BASE_SIZES

ROOT = Path(__file__).resolve().parents[2]
MASKED_SHARE = 0.3  # of the positions of a masked model
SPAN_TARGET_LENGTH = 114  # of a row of 512 tokens
STOCK_STEPS = 30


@dataclass(frozen=True)
class Recipe:
    """A shipped configuration in recipes/configs, which is run with random text."""

    config: str
    tokenizer: str  # algorithm
    rows: int
    steps: int
    vocabulary: int = 50304

    @property
    def script(self) -> str:
        return self.config.split("/")[1].removesuffix("_lora")

    @property
    def objective(self) -> str:
        return self.script.removeprefix("pretrain_")

    @property
    def is_pretraining(self) -> bool:
        return self.script.startswith("pretrain_")


RECIPES = {
    "gpt2-124m": Recipe("gpt2-124m/pretrain_clm", "bpe", 64, 50),
    "modernbert-base": Recipe("modernbert-base/pretrain_mlm", "wordpiece", 64, 50, 50368),
    "t5-base": Recipe("t5-base/pretrain_span", "unigram", 64, 18, 32128),
    "smollm2-135m-sft": Recipe("smollm2-135m/sft_lora", "bpe", 8, 30),
    "smollm2-135m-dpo": Recipe("smollm2-135m/dpo_lora", "bpe", 8, 30),
}
SMALL_SIZES = {
    "gpt2-124m": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "modernbert-base": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "t5-base": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.0,
    },
}


def make_arguments(
    name: str, folder: Path, output_dir: Path, small: bool, steps: int, on_gpu: bool, **changes
) -> list[str]:
    """The command line of a recipe, without the script.

    Args:
        folder: of the inputs.
        changes: options that replace those of the benchmark.
    """
    recipe = RECIPES[name]
    config = ROOT / f"recipes/configs/{recipe.config}.yaml"
    shipped = yaml.safe_load(config.read_text(encoding="utf-8"))
    max_length = 64 if small else shipped["max_length"]
    rows = 4 if small else recipe.rows
    options = {
        "output_dir": output_dir,
        "prepared_dir": folder / "prepared",
        "max_length": max_length,
        "per_device_train_batch_size": rows,
        "logging_steps": 1000,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
        "dataloader_num_workers": 0 if small else 4,
    }
    if recipe.is_pretraining:
        sizes = shipped.get("config_overrides", {}) | {"vocab_size": recipe.vocabulary}
        options |= {
            "train_data": folder / "train.jsonl",
            "eval_data": folder / "validation.jsonl",
            "eval_fraction": 0,
            "tokenizer_name_or_path": folder / recipe.tokenizer,
            "config_overrides": json.dumps(SMALL_SIZES[name] if small else sizes),
            "warmup_steps": 0,
            "max_tokens": 10**9,
        }
    else:
        data = folder / ("conversations.jsonl" if recipe.objective == "sft" else "preferences.jsonl")
        options |= {
            "train_data": data,
            "eval_data": data,
            "model_name_or_path": folder / "base",
            "chat_template": ROOT / "recipes/templates/chatml.jinja",
            "eval_on_start": "false",
        }
    if recipe.objective == "dpo":
        options |= {"train_pairs": rows * steps, "batch_pairs": rows}
    else:
        options |= {"train_tokens": rows * max_length * steps, "batch_tokens": rows * max_length}
    if not on_gpu:
        options |= {"compile": "false", "use_cpu": "true", "precision": "fp32"}
    elif recipe.is_pretraining:
        options["compile"] = "true"  # as `auto` decides for a run of real length
    options |= changes
    return ["--config", str(config), *[f"--{key}={value}" for key, value in options.items()]]


def recipe(bench: Bench, name: str, folder: Path, small: bool, **changes) -> None:
    """Run a recipe for some steps."""
    make_inputs(folder, small)
    recipe = RECIPES[name]
    if not recipe.is_pretraining:
        make_base_model(folder, small)
    set_seed(0)
    steps = recipe.steps
    if small:
        steps = 20 if bench.on_gpu else 4
    label = ", ".join([name, *[f"{key} {value}" for key, value in changes.items()]])
    note = add_missing_grouped_heads()
    if note:
        bench.record(f"{label}: note", note=note)
    times = StepTimes(bench.on_gpu, steps, bench.seconds)
    times.batch_tokens = recipe.rows  # DPO has no number of tokens; its speed is in pairs
    add_callback(times)
    output_dir = folder / "runs" / label.replace(", ", "_").replace(" ", "_")
    shutil.rmtree(output_dir, ignore_errors=True)  # or the recipe would resume
    script = str(ROOT / "recipes" / f"{recipe.script}.py")
    arguments = make_arguments(name, folder, output_dir, small, steps, bench.on_gpu, **changes)
    sys.argv = [script, *arguments]
    print("command:", *sys.argv, flush=True)
    with contextlib.suppress(StopRun):
        runpy.run_path(script, run_name="__main__")
    max_length = next(int(word.split("=")[1]) for word in arguments if word.startswith("--max_length="))
    head_share = MASKED_SHARE if recipe.objective == "mlm" else 1.0
    target_length = SPAN_TARGET_LENGTH if recipe.objective == "span" else 0
    record_steps(bench, label, times, max_length, head_share, target_length)


class RandomBlocks(Dataset):
    """Whole rows of random tokens, with labels for an encoder-decoder."""

    def __init__(self, rows: int, length: int, vocabulary: int, target_length: int):
        generator = torch.Generator().manual_seed(0)
        self.input_ids = torch.randint(8, vocabulary, (rows, length), generator=generator)
        self.labels = torch.randint(8, 500, (rows, target_length), generator=generator) if target_length else None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict:
        input_ids = self.input_ids[index].tolist()
        example = {"input_ids": input_ids, "attention_mask": [1] * len(input_ids)}
        if self.labels is not None:
            example["labels"] = self.labels[index].tolist()
        return example


def stock(bench: Bench, name: str, folder: Path, small: bool) -> None:
    """Train the model of a recipe with stock `Trainer`, bf16 and torch_compile, on rows without documents."""
    recipe = RECIPES[name]
    shape = bench.shape
    steps = 4 if small else min(recipe.steps, STOCK_STEPS)
    max_length = shape.length
    target_length = 0
    head_share = 1.0
    if recipe.objective == "span":
        max_length = shape.length // 2
        target_length = 16 if small else SPAN_TARGET_LENGTH
        model = make_t5(small)
        collator = default_data_collator
    else:
        make_inputs(folder, small)
        model = hugging_face_model(name.split("-")[0], shape)
        tokenizer = AutoTokenizer.from_pretrained(folder / recipe.tokenizer, trust_remote_code=False)
        if recipe.objective == "mlm":
            head_share = MASKED_SHARE
            collator = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=MASKED_SHARE)
        else:
            collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    times = StepTimes(bench.on_gpu, steps, bench.seconds)
    times.batch_tokens = shape.rows * max_length
    add_callback(times)
    args = TrainingArguments(
        output_dir=str(folder / "runs" / f"stock-{name}"),
        per_device_train_batch_size=shape.rows,
        max_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1000,
        dataloader_num_workers=0 if small else 4,
        bf16=bench.on_gpu,
        torch_compile=bench.on_gpu,
        use_cpu=not bench.on_gpu,
    )
    dataset = RandomBlocks(shape.rows * steps, max_length, 500 if small else 4000, target_length)
    trainer = Trainer(model=model, args=args, train_dataset=dataset, data_collator=collator)
    with contextlib.suppress(StopRun):
        trainer.train()
    # Trainer computes the output head everywhere. MFU counts only the FLOPs that our trainer needs.
    record_steps(bench, f"{name}, stock Trainer, bf16, torch_compile", times, max_length, head_share, target_length)


def make_t5(small: bool) -> PreTrainedModel:
    """T5-base with random weights."""
    sizes = SMALL_SIZES["t5-base"] if small else T5_BASE_SIZES
    vocabulary = RECIPES["t5-base"].vocabulary
    config = AutoConfig.for_model("t5", vocab_size=vocabulary, decoder_start_token_id=0, **sizes)
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.config.use_cache = False
    return model
