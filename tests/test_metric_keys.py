"""Every metric that a report, a card, a bar or a plan reads is one that a trainer or a script writes."""

import json
import re
import sys

import numpy as np
import pytest
import transformers
from conftest import MODELS, ROOT, WORDS, recipe_arguments, run_recipe
from test_finetuning import make_conversations, make_pairs, write_lines

from unlabeled.data.chat_templates import set_chat_template
from unlabeled.models.configs import scratch_config

sys.path.insert(0, str(ROOT / "scripts"))
import make_report
import report_charts
import run_chain

from unlabeled.reporting.lineage import METRICS
from unlabeled.training.results import COMPARED

READERS = [
    *(ROOT / "scripts" / name for name in ("make_report.py", "report_charts.py", "run_chain.py", "plan_inputs.py")),
    *(
        ROOT / "unlabeled" / name
        for name in ("training/progress.py", "reporting/lineage.py", "reporting/plots.py", "planning/scaling_laws.py")
    ),
    *(ROOT / "unlabeled" / name for name in ("training/results.py", "planning/formatting.py")),
]
# How a value of a table of metrics or of an entry of the history is asked for.
TABLES = r"(?:metrics|logs|entry|last|before|numbers|found\.metrics|stage\.metrics|lineage\[\"metrics\"\])"
ASKED = [
    re.compile(rf"\b{TABLES}\[\"([\w/]+)\"\]"),
    re.compile(rf"\b{TABLES}\.get\(\"([\w/]+)\""),
    re.compile(rf"\"([\w/]+)\" (?:not )?in {TABLES}\b"),
    re.compile(rf"number\({TABLES}, \"([\w/]+)\""),
]
# Of other tables than metrics and history, by the same names: chain.json, and the report's sources of data.
OTHER_TABLES = {"folder", "kind", "name", "seconds", "fingerprint", "at", "parts", "uses"}
BY_OTHERS = {"logits_difference"}  # scripts/merge_adapter.py


@pytest.fixture(scope="module")
def written(corpus, tokenizers, tmp_path_factory) -> dict[str, set[str]]:
    """Keys of metrics.json and of history.json, of a tiny run of each recipe and kind of labels."""
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
    keys: dict[str, set[str]] = {"metrics": set(), "history": set()}
    for run in runs:
        keys["metrics"] |= json.loads((run / "metrics.json").read_text(encoding="utf-8")).keys()
        for entry in json.loads((run / "history.json").read_text(encoding="utf-8")):
            keys["history"] |= entry.keys()
    return keys


def test_registries_have_only_what_is_written(written):
    """The tables of the report, of the card and of the chain: each metric of them comes out of some run."""
    for registry in (make_report.RESULTS, METRICS, dict.fromkeys(run_chain.RESULTS), dict.fromkeys(COMPARED)):
        assert registry.keys() - written["metrics"] <= BY_OTHERS
    for title, _, train, held in report_charts.PREFERENCES:
        assert {train, held} <= written["history"], title


def test_what_is_read_by_name_is_written(written):
    found: dict[str, list[str]] = {}
    for path in READERS:
        text = path.read_text(encoding="utf-8")
        for pattern in ASKED:
            for key in pattern.findall(text):
                found.setdefault(key, []).append(path.name)
    assert {"eval_loss", "preference_accuracy", "peak_memory_bytes", "mfu", "train_seconds"} <= found.keys()
    known = written["metrics"] | written["history"] | BY_OTHERS | OTHER_TABLES | {"skipped_steps"}
    assert not {key: files for key, files in found.items() if key not in known}


def test_no_registry_leaves_out_a_score(written):
    """Scores on held-out and test data are in the card, whatever the kind of labels."""
    scores = {key for key in written["metrics"] if re.match(r"(eval|test)_", key) and not key.endswith("_before")}
    seconds = {key for key in scores if key.endswith(("_seconds", "_per_second"))}
    assert scores - seconds - METRICS.keys() <= {"test_loss", "eval_kinds", "test_kinds", "eval_examples"}
