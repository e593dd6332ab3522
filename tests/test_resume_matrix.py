"""Stopped in the middle and run again, every recipe sees the same rows, logs the same losses, ends in the same weights.

Every kind of data set and trainer, in this process, with dropout and over more than one epoch; the stop is neither at a
checkpoint nor where an epoch ends. `test_resume.py` kills real processes.
"""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from conftest import MODELS, ROOT, SPAN_MODELS, WORDS, recipe_arguments, run_recipe
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from unlabeled.checkpoints import newest_complete
from unlabeled.tokenization import load_tokenizer
from unlabeled.training import ExactMixin

STEPS, BATCH = 10, 8
STOP = 6  # the step that does not end
SAVED = 4  # the checkpoint before it
NOT_COMPARED = {"train_seconds", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


class Interrupted(Exception):
    """Stands for a kill in the middle of a step."""


def with_dropout(model_type: str) -> dict:
    return {name: 0.1 if "drop" in name else value for name, value in (MODELS | SPAN_MODELS)[model_type].items()}


@pytest.fixture(scope="module")
def work(tokenizers, tmp_path_factory) -> Path:
    """A folder with data of every stage, fewer rows than a run takes, and untrained models with dropout."""
    folder, draw = tmp_path_factory.mktemp("matrix"), random.Random(0)

    def phrase(least: int, most: int) -> str:
        start = draw.randrange(len(WORDS))
        return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(draw.randint(least, most)))

    rows = {"sft": [], "dpo": [], "classify": [], "tag": [], "embed": []}
    for number in range(44):
        turns = [{"role": "user", "content": phrase(1, 4)}, {"role": "assistant", "content": phrase(2, 30)}]
        rows["sft"].append({"messages": turns})
        rows["dpo"].append({"prompt": phrase(1, 4), "chosen": phrase(2, 6), "rejected": phrase(1, 6)})
        words = phrase(2, 14).split()
        rows["classify"].append({"text": " ".join(words), "label": "many" if len(words) > 7 else "few"})
        rows["tag"].append({"tokens": words, "ner_tags": ["B-LOC" if "o" in word else "O" for word in words]})
        rows["embed"].append({"anchor": f"{number} {phrase(2, 6)}", "positive": f"{number} {phrase(3, 9)} x"})
    for stage, examples in rows.items():
        for split, part in (("train", examples[:30]), ("validation", examples[30:])):
            lines = [json.dumps(example) + "\n" for example in part]
            (folder / f"{stage}_{split}.jsonl").write_text("".join(lines))
    for model_type, objective, auto_class in (
        ("gpt2", "clm", AutoModelForCausalLM),
        ("bert", "mlm", AutoModelForMaskedLM),
    ):
        tokenizer = load_tokenizer(tokenizers[objective])
        torch.manual_seed(0)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
        config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **ids, **with_dropout(model_type))
        auto_class.from_config(config).save_pretrained(folder / model_type)
        tokenizer.save_pretrained(folder / model_type)
    return folder


@pytest.fixture(scope="module")
def few(corpus, tmp_path_factory) -> dict[str, str]:
    """A corpus that fills fewer rows than a run takes; as a stream it has many lines."""
    folder = tmp_path_factory.mktemp("few")
    lines = Path(corpus["train"]).read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:25]))
    short = [json.dumps({"text": json.loads(line)["text"][:50]}) + "\n" for line in lines[:150]]
    (folder / "stream.jsonl").write_text("".join(short))
    return {"train": str(folder / "train.jsonl"), "stream": str(folder / "stream.jsonl")} | {
        "validation": corpus["validation"]
    }


def common(folder: Path) -> dict:
    return {
        "output_dir": folder, "save_steps": SAVED, "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 1,
        "per_device_train_batch_size": BATCH, "precision": "fp32", "use_cpu": "true", "warmup_steps": 2,
    }  # fmt: skip


def command(kind: str, work: Path, few, tokenizers, folder: Path) -> tuple[str, list[str]]:
    """(recipe, its arguments); `kind` is a stage and, after a dash, a variant."""
    stage, _, variant = kind.partition("-")
    if stage in ("clm", "mlm", "span"):
        model_type = {"clm": "gpt2", "mlm": "bert", "span": "t5"}[stage]
        options = {"config_overrides": json.dumps(with_dropout(model_type)), "train_tokens": STEPS * BATCH * 32}
        if variant == "stream":
            options |= {"stream": "true", "train_data": few["stream"]}
        if variant == "accumulated":
            options |= {"dataloader_num_workers": 2}
        options |= common(folder) | {"per_device_train_batch_size": BATCH // 2 if variant == "accumulated" else BATCH}
        options.pop("output_dir")
        return f"pretrain_{stage}", recipe_arguments(stage, model_type, few, tokenizers, folder, **options)
    options = common(folder) | {
        "model_name_or_path": work / ("gpt2" if stage in ("sft", "dpo") else "bert"),
        "train_data": work / f"{stage}_train.jsonl", "eval_data": work / f"{stage}_validation.jsonl",
        "prepared_dir": work / "prepared", "max_length": 64, "learning_rate": 0.001, "compile": "false",
    }  # fmt: skip
    if stage == "sft":
        options |= {"train_tokens": STEPS * BATCH * 64, "batch_tokens": BATCH * 64}
    elif stage in ("dpo", "embed"):
        options |= {"train_pairs": STEPS * BATCH, "batch_pairs": BATCH}
    else:
        options |= {"train_examples": STEPS * BATCH, "batch_examples": BATCH}
    if stage in ("sft", "dpo"):
        options |= {"chat_template": ROOT / "recipes" / "templates" / "chatml.jinja"}
    if stage == "dpo":
        options |= {"disable_dropout": "false"}
    if stage == "tag":
        options |= {"text_column": "tokens", "label_column": "ner_tags"}
    if stage == "embed":
        options.pop("compile")
    if variant == "lora":
        options |= {"adapter": "lora", "lora_r": 4, "lora_dropout": 0.1}
    return stage, [word for key, value in options.items() for word in (f"--{key}", str(value))]


@pytest.fixture
def watched(monkeypatch):
    """Records what every step is given, {step: digests of its batches}; a run with `stop` ends within that step."""
    seen: dict[int, list[str]] = {}
    settings = {"stop": None}
    right = ExactMixin.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        digest = hashlib.sha256()
        for key in sorted(inputs):
            if isinstance(inputs[key], torch.Tensor):
                digest.update(inputs[key].cpu().contiguous().numpy().tobytes())
        step = self.state.global_step + 1
        seen.setdefault(step, []).append(digest.hexdigest())
        if step == settings["stop"]:
            raise Interrupted
        return right(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ExactMixin, "training_step", training_step)

    def generate(self, inputs=None, input_ids=None, **options):
        return input_ids if inputs is None else inputs

    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)

    def run(recipe: str, arguments: list[str], stop: int | None = None) -> dict[int, list[str]]:
        seen.clear()
        settings["stop"] = stop
        if stop:
            with pytest.raises(Interrupted):
                run_recipe(recipe, arguments)
        else:
            run_recipe(recipe, arguments)
        return dict(seen)

    return run


def comparable(folder: Path) -> list[dict]:
    """The whole history without what a clock says."""
    history = json.loads((folder / "history.json").read_text())
    return [{key: value for key, value in entry.items() if key not in NOT_COMPARED} for entry in history]


KINDS = (
    "clm-accumulated", "clm-stream", "mlm", "mlm-stream", "span", "span-stream", "sft", "sft-lora", "dpo",
    "dpo-lora", "classify", "tag", "embed",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted(kind, work, few, tokenizers, tmp_path, watched):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    batches = watched(*command(kind, work, few, tokenizers, whole))
    assert list(batches) == list(range(1, STEPS + 1))
    assert len({batch for step in batches.values() for batch in step}) > STEPS / 2, "batches differ from each other"
    recipe, arguments = command(kind, work, few, tokenizers, stopped)
    first = watched(recipe, arguments, stop=STOP)
    assert list(first) == list(range(1, STOP + 1))
    assert newest_complete(str(stopped)) == str(stopped / f"checkpoint-{SAVED}")
    assert not (stopped / "metrics.json").exists()
    second = watched(recipe, arguments)
    assert list(second) == list(range(SAVED + 1, STEPS + 1))
    assert second == {step: batches[step] for step in second}, "the same rows in the same order"
    assert comparable(stopped) == comparable(whole)
    name = "adapter_model.safetensors" if (whole / "adapter_model.safetensors").exists() else "model.safetensors"
    expected, resumed = load_file(whole / name), load_file(stopped / name)
    assert expected.keys() == resumed.keys()
    for parameter, tensor in expected.items():
        assert torch.equal(resumed[parameter], tensor), parameter
