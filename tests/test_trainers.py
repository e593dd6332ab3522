"""What holds for every kind of data set and trainer: a resumed run is the uninterrupted one, any data are evaluated.

All in this process, with dropout and over more than one epoch. A run is stopped neither at a checkpoint nor where an
epoch ends; `test_resume.py` kills real processes.
"""

import hashlib
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import MODELS, ROOT, SPAN_MODELS, WORDS, recipe_arguments, run_recipe
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from unlabeled import UserError
from unlabeled.data.labeled_rows import LabeledSplit
from unlabeled.data.tokenization import load_tokenizer
from unlabeled.runtime.checkpoints import find_newest_checkpoint
from unlabeled.training import ExactTrainerMixin

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


@pytest.fixture(scope="module")
def watched():
    """Runs a recipe, until the step `stop`: (trainer, what every step is given as {step: digests of its batches})."""
    seen: dict[int, list[str]] = {}
    settings = {"stop": None, "trainer": None}
    right_step, right_init = ExactTrainerMixin.training_step, ExactTrainerMixin.__init__

    def init(self, *args, **kwargs):
        right_init(self, *args, **kwargs)
        settings["trainer"] = self

    def training_step(self, model, inputs, *args, **kwargs):
        digest = hashlib.sha256()
        for key in sorted(inputs):
            if isinstance(inputs[key], torch.Tensor):
                digest.update(inputs[key].cpu().contiguous().numpy().tobytes())
        step = self.state.global_step + 1
        seen.setdefault(step, []).append(digest.hexdigest())
        if step == settings["stop"]:
            raise Interrupted
        return right_step(self, model, inputs, *args, **kwargs)

    def generate(self, inputs=None, input_ids=None, **options):
        return input_ids if inputs is None else inputs

    def run(
        recipe: str, arguments: list[str], stop: int | None = None
    ) -> tuple[ExactTrainerMixin, dict[int, list[str]]]:
        seen.clear()
        settings["stop"] = stop
        if stop:
            with pytest.raises(Interrupted):
                run_recipe(recipe, arguments)
        else:
            run_recipe(recipe, arguments)
        return settings["trainer"], dict(seen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExactTrainerMixin, "__init__", init)
        patch.setattr(ExactTrainerMixin, "training_step", training_step)
        patch.setattr(transformers.GenerationMixin, "generate", generate)
        yield run


def comparable(folder: Path) -> list[dict]:
    """The whole history without what a clock says."""
    history = json.loads((folder / "history.json").read_text())
    return [{key: value for key, value in entry.items() if key not in NOT_COMPARED} for entry in history]


def results(folder: Path) -> dict:
    """The metrics of a finished run without what a clock or the memory of the process says."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if not re.search("second|memory|mfu", name)}


def halves(dataset) -> tuple:
    """Two parts of the data that a trainer evaluates."""
    middle = (len(dataset.rows) if isinstance(dataset, LabeledSplit) else len(dataset)) // 2
    if not isinstance(dataset, LabeledSplit):
        return dataset.select(range(middle)), dataset.select(range(middle, len(dataset)))
    cut = int(sum(dataset.counts[:middle]))
    first = replace(
        dataset,
        texts=dataset.texts[:middle],
        rows=dataset.rows[:middle],
        truth=dataset.truth[:cut],
        counts=dataset.counts[:middle],
        visible_targets=dataset.visible_targets[:middle],
    )
    second = replace(
        dataset,
        texts=dataset.texts[middle:],
        rows=dataset.rows[middle:],
        truth=dataset.truth[cut:],
        counts=dataset.counts[middle:],
        visible_targets=[place - cut for place in dataset.visible_targets[middle:]],
    )
    return first, second


def evaluations(trainer: ExactTrainerMixin) -> dict:
    """What `evaluate` says of all kinds of data; at once, since the next run takes the accelerator's state away."""
    own = trainer.eval_dataset
    first, second = halves(own)
    results = {"own": trainer.evaluate(), "again": trainer.evaluate(own, metric_key_prefix="test")}
    results |= {"first": trainer.evaluate(first), "both": trainer.evaluate({"a": first, "b": second})}
    results |= {"cached": trainer.evaluate(), "ignoring": trainer.evaluate(first, ignore_keys=["past_key_values"])}
    logged = trainer.state.log_history[-1]
    assert logged["eval_loss"] == results["ignoring"]["eval_loss"], "what was evaluated is logged"
    for call, sentence in (
        (lambda: trainer.evaluate([{"text": "no rows"}]), "evaluate: "),
        (lambda: trainer.evaluate("unknown"), "evaluate: the trainer has no data set of the name 'unknown'"),
        (lambda: trainer.predict(first), "predict is not supported"),
    ):
        with pytest.raises(UserError, match=sentence):
            call()
    return results


@pytest.fixture(scope="module")
def whole(work, few, tokenizers, tmp_path_factory, watched):
    """Makes the uninterrupted run of a kind: (folder, batches of each step, evaluations after it)."""
    runs = {}

    def make(kind: str) -> tuple[Path, dict[int, list[str]], dict]:
        if kind not in runs:
            folder = tmp_path_factory.mktemp(kind) / "whole"
            trainer, batches = watched(*command(kind, work, few, tokenizers, folder))
            runs[kind] = folder, batches, evaluations(trainer)
        return runs[kind]

    return make


KINDS = (
    "clm-accumulated", "clm-stream", "mlm", "mlm-stream", "span", "span-stream", "sft", "sft-lora", "dpo",
    "dpo-lora", "classify", "tag", "embed",
)  # fmt: skip


def assert_same_run(stopped: Path, expected: Path) -> None:
    assert comparable(stopped) == comparable(expected)
    assert results(stopped) == results(expected)
    name = "adapter_model.safetensors" if (expected / "adapter_model.safetensors").exists() else "model.safetensors"
    right, found = load_file(expected / name), load_file(stopped / name)
    assert right.keys() == found.keys()
    for parameter, tensor in right.items():
        assert torch.equal(found[parameter], tensor), parameter


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted(kind, work, few, tokenizers, tmp_path, watched, whole):
    expected, batches, _ = whole(kind)
    assert list(batches) == list(range(1, STEPS + 1))
    assert len({batch for step in batches.values() for batch in step}) > STEPS / 2, "batches differ from each other"
    stopped = tmp_path / "stopped"
    recipe, arguments = command(kind, work, few, tokenizers, stopped)
    _, first = watched(recipe, arguments, stop=STOP)
    assert list(first) == list(range(1, STOP + 1))
    assert find_newest_checkpoint(str(stopped)) == str(stopped / f"checkpoint-{SAVED}")
    assert not (stopped / "metrics.json").exists()
    _, second = watched(recipe, arguments)
    assert list(second) == list(range(SAVED + 1, STEPS + 1))
    assert second == {step: batches[step] for step in second}, "the same rows in the same order"
    assert_same_run(stopped, expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith(("stream", "lora"))])
def test_evaluation_of_any_data(kind, whole):
    _, _, found = whole(kind)
    own, first, both = found["own"], found["first"], found["both"]
    assert found["cached"] == own, "other data leave the figures of the trainer's own as they are"
    assert found["again"].keys() == {f"test_{key.removeprefix('eval_')}" for key in own}
    for key, value in found["again"].items():
        name = key.removeprefix("test_")
        assert value == pytest.approx(own[name] if name in own else own[f"eval_{name}"], rel=1e-6), key
    assert found["ignoring"] == first
    assert first["eval_loss"] != own["eval_loss"] and "bits_per_byte" not in first
    assert "bits_per_byte" in own or kind in ("span", "dpo", "classify", "tag", "embed")
    assert all(key.startswith(("eval_a_", "eval_b_")) for key in both)
    assert both["eval_a_loss"] == first["eval_loss"] and both["eval_b_loss"] != first["eval_loss"]
    size = {"clm-accumulated": "targets", "sft": "targets", "dpo": "pairs"}.get(kind)
    if size:  # of masks and spans the second half has others than in the whole; those of embeddings are no sums
        assert both[f"eval_a_{size}"] + both[f"eval_b_{size}"] == own[size]
        total = sum(both[f"eval_{part}_loss"] * both[f"eval_{part}_{size}"] for part in "ab")
        assert total / own[size] == pytest.approx(own["eval_loss"], rel=1e-5)
    if kind == "classify":  # 14 examples, which give two parts of one size
        assert (both["eval_a_loss"] + both["eval_b_loss"]) / 2 == pytest.approx(own["eval_loss"], rel=1e-5)
        assert (both["eval_a_accuracy"] + both["eval_b_accuracy"]) / 2 == pytest.approx(own["eval_accuracy"])


@pytest.mark.parametrize("form", [True, Path, False])
def test_ways_to_resume(form, work, few, tokenizers, tmp_path, watched, whole, monkeypatch):
    """As `Trainer.train` takes it; recipes themselves look for the newest checkpoint."""
    expected, batches, _ = whole("tag")
    recipe, arguments = command("tag", work, few, tokenizers, tmp_path)
    watched(recipe, arguments, stop=STOP)
    value = form(tmp_path / f"checkpoint-{SAVED}") if form is Path else form
    right = ExactTrainerMixin.train
    monkeypatch.setattr(ExactTrainerMixin, "train", lambda self, resume_from_checkpoint=None: right(self, value))
    _, seen = watched(recipe, arguments)
    first = SAVED + 1 if form else 1
    assert seen == {step: batches[step] for step in range(first, STEPS + 1)}
    assert_same_run(tmp_path, expected)


def test_checkpoints_that_cannot_be_resumed(work, few, tokenizers, tmp_path, monkeypatch):
    right = ExactTrainerMixin.train
    (tmp_path / "foreign").mkdir()
    for value, sentence in (
        (True, f"there is no complete checkpoint in {tmp_path / 'run'} to resume from"),
        (tmp_path / "none", f"cannot resume from {tmp_path / 'none'}: it has no readable complete.json"),
        (tmp_path / "foreign", f"cannot resume from {tmp_path / 'foreign'}: it has no readable complete.json"),
    ):
        monkeypatch.setattr(ExactTrainerMixin, "train", lambda self, _=None, value=value, **kwargs: right(self, value))
        with pytest.raises(UserError, match=sentence):
            run_recipe(*command("tag", work, few, tokenizers, tmp_path / "run"))


def test_a_release_that_writes_no_training_args(work, few, tokenizers, tmp_path, monkeypatch):
    right = torch.save
    monkeypatch.setattr(
        torch,
        "save",
        lambda value, file, **kwargs: None if str(file).endswith("training_args.bin") else right(value, file, **kwargs),
    )
    run_recipe(*command("tag", work, few, tokenizers, tmp_path))
    assert (tmp_path / "metrics.json").exists() and not list(tmp_path.rglob("training_args.bin"))
