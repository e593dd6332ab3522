"""The registry of metrics has what runs write, and whatever reads a metric by its key reads one that is written."""

import json
import re

import numpy as np
import pytest
import transformers
from conftest import MODELS, ROOT, WORDS, recipe_arguments, run_recipe
from test_finetuning import make_conversations, make_pairs, write_lines

from unlabeled.data.chat_templates import set_chat_template
from unlabeled.models.configs import scratch_config
from unlabeled.reporting.chain_charts import PREFERENCE_CHARTS
from unlabeled.reporting.metrics import COST_METRICS, METRICS, extra_keys
from unlabeled.reporting.stages import STAGE_KINDS

READERS = [
    *sorted((ROOT / "unlabeled" / "reporting").glob("*.py")),
    ROOT / "unlabeled" / "chain" / "runner.py",
    ROOT / "unlabeled" / "planning" / "formatting.py",
    ROOT / "unlabeled" / "planning" / "scaling_laws.py",
    ROOT / "unlabeled" / "training" / "progress.py",
    ROOT / "unlabeled" / "training" / "results.py",
]
# How code reads a value of `metrics.json` or of an entry of the history.
TABLES = r"(?:metrics|logs|entry|last|before|numbers|found\.metrics|stage\.metrics|lineage\[\"metrics\"\])"
ACCESSES = [
    re.compile(rf"\b{TABLES}\[\"([\w/]+)\"\]"),
    re.compile(rf"\b{TABLES}\.get\(\"([\w/]+)\""),
    re.compile(rf"\"([\w/]+)\" (?:not )?in {TABLES}\b"),
    re.compile(rf"number\({TABLES}, \"([\w/]+)\""),
]
# Keys of other tables by the same names (chain.json, the report's sources of data), and of runs with skipped steps.
OTHER_KEYS = {"folder", "kind", "name", "seconds", "fingerprint", "at", "parts", "uses", "skipped_steps"}
NOT_RUN = {"merge", "evaluate"}  # scripts, which no run below is of


@pytest.fixture(scope="module")
def written(corpus, tokenizers, tmp_path_factory) -> list[dict]:
    """The stage and the keys of metrics.json and history.json of a tiny run of each recipe and kind of labels."""
    folder, draw = tmp_path_factory.mktemp("keys"), np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.GenerationMixin, "generate", lambda self, ids=None, **options: ids)  # takes long
        patch.setattr("unlabeled.reporting.run_plan.peak_flops", lambda name, precision: 1e12)  # else there is no MFU
        runs = []
        for objective, model_type in (("clm", "llama"), ("mlm", "bert"), ("span", "t5")):
            runs.append(folder / objective)
            if objective == "span":
                patch.undo()  # its samples are generated, and are few
                patch.setattr("unlabeled.reporting.run_plan.peak_flops", lambda name, precision: 1e12)
            options = {"train_tokens": 2 * 256, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no"}
            words = recipe_arguments(objective, model_type, corpus, tokenizers, runs[-1], **options)
            run_recipe(f"pretrain_{objective}", words)
        patch.setattr(transformers.GenerationMixin, "generate", lambda self, ids=None, **options: ids)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizers["clm"])
        set_chat_template(tokenizer, str(ROOT / "recipes" / "templates" / "chatml.jinja"))
        config = scratch_config("llama", MODELS["llama"], tokenizer, 64)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "chat")
        tokenizer.save_pretrained(folder / "chat")
        texts = [" ".join(draw.permutation(WORDS)[:6]) for _ in range(32)]
        data = {
            "sft": make_conversations(20, 0),
            "dpo": make_pairs(20, 0),
            "classify": [{"text": text, "label": f"class {i % 2}"} for i, text in enumerate(texts)],
            "rate": [{"text": text, "label": i / 7 + 0.5} for i, text in enumerate(texts)],
            "tag": [{"tokens": text.split(), "ner_tags": ["O", "B-LOC"] * 3} for text in texts],
            "embed": [{"anchor": one, "positive": two} for one, two in zip(texts[::2], texts[1::2], strict=True)],
        }
        for row, other in zip(data["embed"], data["embed"][1:] + data["embed"][:1], strict=True):
            row |= {"same_work": other["positive"], "other_work": other["anchor"]}
        for name, rows in data.items():
            recipe = "classify" if name == "rate" else name
            path, unit = (
                write_lines(folder / f"{name}.jsonl", rows),
                {"sft": "tokens", "dpo": "pairs", "embed": "pairs"},
            )
            unit, row = unit.get(name, "examples"), 64 if name == "sft" else 1
            options = {
                "model_name_or_path": folder / "chat" if name in ("sft", "dpo") else folder / "mlm",
                "train_data": path, "eval_data": path, f"train_{unit}": 16 * row, f"batch_{unit}": 8 * row,
                "per_device_train_batch_size": 8, "max_length": 64, "output_dir": folder / f"{name}-run",
                "precision": "fp32", "use_cpu": "true", "logging_steps": 1, "save_strategy": "no",
            }  # fmt: skip
            if name in ("classify", "rate", "tag"):
                options |= {"test_data": path}
            if name == "tag":
                options |= {"text_column": "tokens", "label_column": "ner_tags"}
            run_recipe(recipe, [word for key, value in options.items() for word in (f"--{key}", str(value))])
            runs.append(folder / f"{name}-run")
    written = []
    for run in runs:
        keys = {
            "stage": json.loads((run / "lineage.json").read_text(encoding="utf-8"))["stage"],
            "metrics": json.loads((run / "metrics.json").read_text(encoding="utf-8")).keys(),
            "history": set(),
        }
        for entry in json.loads((run / "history.json").read_text(encoding="utf-8")):
            keys["history"] |= entry.keys()
        written.append(keys)
    return written


def all_keys(written: list[dict], file: str) -> set[str]:
    return {key for keys in written for key in keys[file]}


def test_registered_metrics_are_written(written):
    """Each metric of the registry is written by a run of each stage that it names."""
    registry = METRICS | COST_METRICS
    expected = {key: set(metric.stages) - NOT_RUN for key, metric in registry.items()}
    assert expected == {key: {keys["stage"] for keys in written if key in keys["metrics"]} for key in registry}
    for title, _, train, held_out in PREFERENCE_CHARTS:
        assert {train, held_out} <= all_keys(written, "history"), title


def test_written_metrics_are_registered(written):
    """So that what is not in the registry is a user's own metric."""
    assert list(extra_keys(dict.fromkeys(all_keys(written, "metrics"), 1.0))) == []


def test_headline_metrics(written):
    """Each stage has a headline metric that its runs write."""
    for keys in written:
        assert set(STAGE_KINDS[keys["stage"]].headline) & keys["metrics"], keys["stage"]


def test_metrics_read_by_key_are_written(written):
    files_by_key: dict[str, list[str]] = {}
    for path in READERS:
        text = path.read_text(encoding="utf-8")
        for pattern in ACCESSES:
            for key in pattern.findall(text):
                files_by_key.setdefault(key, []).append(path.name)
    assert {"eval_loss", "unigram_entropy", "peak_memory_bytes", "mfu", "train_seconds"} <= files_by_key.keys()
    known = all_keys(written, "metrics") | all_keys(written, "history") | OTHER_KEYS
    assert not {key: files for key, files in files_by_key.items() if key not in known}
