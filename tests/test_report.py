"""The report of a chain: its numbers, missing and damaged files, and the page in a browser."""

import base64
import hashlib
import json
import math
import os
import random
import re
import select
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from html.parser import HTMLParser
from itertools import count, pairwise
from pathlib import Path

import pytest
from conftest import MODELS, ROOT, make_text, run_recipe
from test_finetuning import make_pairs, write_lines
from transformers import AutoModelForCausalLM

from unlabeled.data.chat_templates import set_chat_template
from unlabeled.data.tokenizer_training import train_tokenizer
from unlabeled.models.configs import scratch_config
from unlabeled.planning import format_duration
from unlabeled.reporting import chain_samples
from unlabeled.reporting.chain_charts import (
    MAX_POINTS,
    average_neighbours,
    draw_charts,
    format_large_count,
    make_curve,
    round_ticks,
)
from unlabeled.reporting.chain_report import TEMPLATES, compute_costs, format_percent, shares, write_report
from unlabeled.reporting.chain_samples import sample_key
from unlabeled.reporting.chain_stages import COLORS, ReportStage, read_chain

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PROMPTS = [
    "Who says this line?\n\n“To be, or not to be, that is the question”",
    "Continue as LADY MACBETH.\n\nOut, damned spot! out, I say!",
    "Which play is Mercutio in?",
]
HOSTILE = "<script>alert('a')</script> <img src=https://example.com/x.png> & \"quotes\""


# --- A chain as run_chain leaves it, with figures like those of the demo --------------------------------------------


def history(steps: int, tokens: int, seconds: float, curve, noise: float, gap: float = 0.1) -> list[dict]:
    """A history of `steps` entries. The loss follows `curve` from 0 to 1; two evaluations lie above it by `gap`."""
    rng, entries = random.Random(0), []
    for i in range(1, steps + 1):
        at = {"step": 20 * i, "tokens": tokens * i // steps, "train_seconds": seconds * i / steps}
        entries.append(at | {"loss": curve(i / steps) + rng.gauss(0, noise), "grad_norm": 1.0})
        if i % (steps // 2) == 0:
            entries.append(at | {"eval_loss": curve(i / steps) + gap})
    return entries


@cache
def dpo_history() -> list[dict]:
    """The history of a run of recipes/dpo.py on a tiny model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = train_tokenizer(make_text(100, 0), "bpe", 384)
        set_chat_template(tokenizer, str(ROOT / "recipes" / "templates" / "chatml.jinja"))
        config = scratch_config("llama", MODELS["llama"], tokenizer, 64)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        pairs = write_lines(folder / "pairs.jsonl", make_pairs(20, 0))
        options = {
            "model_name_or_path": folder / "model", "train_data": pairs, "eval_data": pairs, "train_pairs": 12,
            "batch_pairs": 4, "per_device_train_batch_size": 4, "max_length": 64, "output_dir": folder / "run",
            "precision": "fp32", "use_cpu": "true", "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2,
        }  # fmt: skip
        run_recipe("dpo", [word for key, value in options.items() for word in (f"--{key}", str(value))])
        return json.loads((folder / "run" / "history.json").read_text(encoding="utf-8"))


def as_a_trainer_logs(entries: list[dict], real: list[dict]) -> list[dict]:
    """The entries with exactly the keys of a real history; accuracies rise from 0.5."""
    keys = {kind: next(entry.keys() for entry in real if kind in entry) for kind in ("loss", "eval_loss")}
    found = []
    for entry in entries:
        kind = "eval_loss" if "eval_loss" in entry else "loss"
        wave = 0.02 * math.sin(entry["step"]) if kind == "loss" else 0.0
        accuracy = 0.5 + 0.235 * entry["tokens"] / 98304 + wave
        found.append({key: entry.get(key, accuracy if "accurac" in key else 0.0) for key in keys[kind]})
    return found


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def lineage(name: str, data: str) -> dict:
    files = [f"{data}/train.parquet", f"{data}/validation.parquet"]
    sources = [
        {
            "path": file,
            "files": {Path(file).name: hashlib.sha256(file.encode()).hexdigest()},
            "licence": "public domain",
        }
        for file in files
    ]
    return {
        "stage": name, "data": {"train": sources[:1], "evaluation": sources[1:]},
        "plan": {"device": "AMD EPYC, 2 threads", "precision": "fp32", "parameters": 1115264},
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0", "trl": "1.16.0"},
        "git": {"commit": "fc97e3cd897a9dc63ef5514781a1fda276305189", "dirty": name == "dpo"},
    }  # fmt: skip


def make_chain(folder: Path, answers=None) -> Path:
    """A chain of six stages. Its samples are cached, so no model is loaded."""
    cost = {"steps": 400, "parameters": 1115264, "tokens_per_second": 7409.9, "peak_memory_bytes": 928501760}
    metrics = {
        "pretrain": cost | {
            "eval_loss": 4.5373, "perplexity": 93.44, "bits_per_byte": 2.3007, "unigram_entropy": 6.376,
            "train_tokens": 819200, "train_seconds": 110.555, "flops": 6.12e12,
        },
        "sft": cost | {
            "eval_loss": 2.912, "eval_loss_before": 5.204, "perplexity": 18.39,
            "train_tokens": 204800, "train_seconds": 31.2, "flops": 1.53e12, "steps": 100,
        },
        "dpo": cost | {
            "eval_loss": 0.561, "preference_accuracy": 0.715, "preference_accuracy_before": 0.52,
            "reward_margin": 0.42, "reward_accuracy": 0.735, "train_tokens": 98304, "train_seconds": 24.9,
            "flops": 0.98e12, "steps": 48,
        },
    }  # fmt: skip
    histories = {
        "pretrain": history(20, 819200, 110.5, lambda t: 4.25 + 3.4 * math.exp(-6 * t) - 0.1 * t, 0.03, 0.379),
        "sft": history(20, 204800, 31.2, lambda t: 2.75 + 1.5 * math.exp(-4 * t), 0.06, 0.135),
        "dpo": history(12, 98304, 24.9, lambda t: 0.40 + 0.29 * math.exp(-1.5 * t), 0.015, 0.096),
    }
    histories["dpo"] = as_a_trainer_logs(histories["dpo"], dpo_history())
    stages = [("tokenizer", "tokenizer", 4.1), ("pretrain", "pretrain_clm", 128.4), ("sft", "sft", 46.0),
              ("dpo", "dpo", 39.7), ("merge", "merge", 6.2), ("evaluate", "evaluate", 9.3)]  # fmt: skip
    for name in ("pretrain", "sft", "dpo", "merge"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "model.safetensors").write_bytes(name.encode())
        write(folder / name / "lineage.json", lineage(name, f"data/demo/{'plays' if name == 'pretrain' else 'chats'}"))
    for name, found in metrics.items():
        write(folder / name / "metrics.json", found)
        write(folder / name / "history.json", histories[name])
    write(folder / "merge" / "metrics.json", {"logits_difference": 3.8e-6, "parameters": 1115264, "flops": 1e15})
    write(folder / "evaluate" / "metrics.json", {"bits_per_byte": 2.412, "perplexity": 112.7})
    listed = [{"name": name, "kind": kind, "folder": name, "seconds": s} for name, kind, s in stages]
    write(folder / "chain.json", {"name": "Shakespeare, tiny", "prompts": PROMPTS, "stages": listed})
    (folder / "tokenizer").mkdir(exist_ok=True)
    _, prompts, read = read_chain(folder)
    cache = {sample_key(s, prompts): (answers or sample_texts)(s.name) for s in read if s.weights}
    write(folder / "samples.json", cache)
    return folder


def sample_texts(stage: str) -> list[str]:
    if stage == "pretrain":
        return ["\nAnd the King of the King's name, I am a man of\nthe world, and I will not be a man of the King.\n\n"
                "KING RICHARD.\nI am a manner, and I will not be so.",
                "\n\nMACBETH.\nI will not be so much to say, and I will be\nThe father of the world; and in the world,",
                "\n\nROMEO.\nI am not so, sir, I will not be so."]  # fmt: skip
    return {
        "sft": [
            "KING HENRY",
            "I will not speak of this. The night is long,\nAnd I am in the King.",
            "Romeo and Juliet",
        ],
        "dpo": ["HAMLET", "The night is long, and I have seen the hand\nThat was so white before.", "Romeo and Juliet"],
        "merge": ["HAMLET", "The night is long, and I have seen the hand\nThat was so white before.", ""],
    }[stage]


@pytest.fixture
def chain(tmp_path) -> Path:
    return make_chain(tmp_path / "chain")


class Page(HTMLParser):
    """A parsed page: its tags with their attributes, and its words."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def report(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


# --- Arithmetic -----------------------------------------------------------------------------------------------------


def test_shares():
    assert shares([3, None, 1, 0]) == [0.75, None, 0.25, 0]
    assert shares([None, None]) == [None, None]
    assert shares([0, 0]) == [None, None]


def test_costs(chain):
    _, _, stages = read_chain(chain)
    costs = compute_costs(stages)
    flops, seconds = ([row[i] for row in costs.rows if row[i] is not None] for i in (1, 2))
    assert sum(flops) == pytest.approx(1) and sum(seconds) == pytest.approx(1)
    assert len(flops) == 3  # a merge reports the FLOPs of its model, and an evaluation has the metrics of another stage
    assert costs.tokens == 1122304
    assert costs.flops == pytest.approx(8.63e12)
    assert costs.seconds == pytest.approx(233.7)
    assert costs.after_pretraining == pytest.approx((2.51 / 8.63, 85.7 / 233.7))


def test_costs_without_wall_clock_time(chain):
    value = json.loads((chain / "chain.json").read_text())
    del value["stages"][2]["seconds"]
    write(chain / "chain.json", value)
    _, _, stages = read_chain(chain)
    assert stages[2].cost_seconds == 31.2
    assert "for sft it is the training time only" in report(chain)


def test_cumulative_tokens(chain):
    _, _, stages = read_chain(chain)
    assert [stage.first_token for stage in stages] == [0, 0, 819200, 1024000, 1122304, 1122304]
    sft = make_curve(stages[2], "loss", "eval_loss")
    assert sft.evaluation[0] == (819200, 5.204)  # measured before the stage
    assert sft.training[-1][0] == sft.evaluation[-1][0] == 1024000


def test_preference_charts(chain):
    """They show what the trainer logs. The loss of pairs is not in the chart of the losses of tokens."""
    _, _, stages = read_chain(chain)
    charts = draw_charts(stages)
    for chart in charts["side"]:
        (curve,) = chart.curves
        assert len(curve["training"]) == 12 and len(curve["evaluation"]) == 2, chart.title
    held = make_curve(stages[3], "rewards/accuracies", "reward_accuracy").evaluation
    assert [value for _, value in held] == pytest.approx([0.5 + 0.235 / 2, 0.735])
    assert [name[2] for name in charts["main"][0].names] == ["pretrain", "sft"]
    assert [(chart.title, chart.names[0][2]) for chart in charts["side"]] == [
        ("Preference loss", "dpo"),
        ("Reward accuracy", "dpo"),
    ]


@pytest.mark.parametrize("sizes", [(819200, 204800), (10**9, 1000, 1000), (5,)])
def test_chart_positions(sizes):
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    stages = [
        ReportStage(
            f"a stage with a long name {i}",
            "sft",
            None,
            None,
            {"train_tokens": size},
            {},
            history(10, size, 1, lambda t: 5 - 4 * t, 0),
            start,
        )
        for i, (size, start) in enumerate(zip(sizes, starts, strict=True))
    ]
    for chart in draw_charts(stages)["main"]:
        for curve in chart.curves:
            for x, y in curve["training"] + curve["evaluation"]:
                assert chart.left <= x <= chart.right and chart.top <= y <= chart.bottom
        edges = [chart.left, *chart.edges, chart.right]
        assert all(b - a >= (chart.right - chart.left) / 9 for a, b in pairwise(edges))
        assert chart.is_stretched == (len(sizes) == 3)


def test_average_of_neighbours():
    points = [(float(i), 2.0 * i) for i in range(1, 10001)]
    thinned = average_neighbours(points)
    assert len(thinned) == MAX_POINTS
    assert thinned[0] == (25.5, 51.0) and thinned[-1] == (9975.5, 19951.0)
    assert average_neighbours(points[:7]) == points[:7]


@pytest.mark.parametrize(
    "n, text", [(0, "0"), (950, "950"), (12345, "12.3K"), (999999, "1M"), (6.74e9, "6.74B"), (1.2e12, "1.2T"),
                (1.21e20, "1.21 × 10²⁰")]
)  # fmt: skip
def test_large_counts(n, text):
    assert format_large_count(n) == text


def test_durations_and_percentages():
    assert [format_duration(s) for s in (4.07, 46, 233.7, 3599.9, 7260)] == [
        "4 s",
        "46 s",
        "3 min 54 s",
        "1 h 00 min",
        "2 h 01 min",
    ]
    assert [format_percent(p) for p in (0, 0.0001, 0.709, 1)] == ["0.0 %", "< 0.1 %", "70.9 %", "100.0 %"]


@pytest.mark.parametrize(
    "low, high, most", [(0, 1, 4), (4.2, 7.9, 6), (0, 819200, 5), (-0.3, -0.1, 3), (0.5, 0.7502, 2)]
)
def test_round_ticks(low, high, most):
    found = round_ticks(low, high, most)
    assert 1 <= len(found) <= most + 1
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)


# --- The page -------------------------------------------------------------------------------------------------------


def test_path_of_the_page(chain):
    command = [sys.executable, str(ROOT / "scripts" / "make_report.py"), str(chain)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.stdout == f"{chain / 'evaluate' / 'report.html'}\n" and process.returncode == 0


def test_page_without_external_files(chain):
    text = report(chain)
    assert len(text.encode()) < 500_000
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "data", "action"):
            assert name not in attributes or attributes[name] == "data:,", (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in text and "@import" not in text


def test_numbers_on_the_page(chain):
    words = re.sub(r"\s+", " ", " ".join(Page(report(chain)).words))
    for expected in (
        "Shakespeare, tiny",
        "1.12M",
        "70.9 %",
        "5.204",
        "2.912",
        "0.520",
        "0.715",
        "3.8e-06",
        "fc97e3cd897a9dc63ef5514781a1fda276305189",
        "with uncommitted changes",
        "torch 2.13.0+cpu",
        hashlib.sha256(b"dpo").hexdigest(),
        hashlib.sha256(b"data/demo/chats/train.parquet").hexdigest(),
        "public domain",
        "KING HENRY",
        "(empty)",
    ):
        assert expected in words, expected


def test_own_metric_on_the_page(chain):
    """A number that is not in the registry, as a trainer of one's own may compute."""
    metrics = json.loads((chain / "sft" / "metrics.json").read_text())
    write(chain / "sft" / "metrics.json", metrics | {"eval_rhymes": 0.25, "eval_rhymes_before": 0.125})
    words = re.sub(r"\s+", " ", " ".join(Page(report(chain)).words))
    assert re.search(r"eval_rhymes 0\.125 → 0\.25", words)
    assert words.count("eval_rhymes") == 1


def test_escaped_text(tmp_path):
    folder = make_chain(tmp_path / "chain", answers=lambda name: [HOSTILE] * 3)
    value = json.loads((folder / "chain.json").read_text())
    value["name"] = value["stages"][1]["name"] = HOSTILE
    write(folder / "chain.json", value)
    source = json.loads((folder / "sft" / "lineage.json").read_text())
    source["data"]["train"][0] |= {"path": HOSTILE, "licence": HOSTILE}
    source["git"]["commit"] = source["plan"]["device"] = source["versions"]["torch"] = HOSTILE
    write(folder / "sft" / "lineage.json", source)
    text = report(folder)
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert "".join(page.words).count(HOSTILE) > 15
    assert "<script" not in text and "<img" not in text


def test_accessibility(chain):
    page = Page(report(chain))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes.get("role") == "img" or attributes.get("aria-hidden") == "true"
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
        assert set(attributes.get("aria-labelledby", "").split()) <= set(ids)
    assert [tag for tag, _ in page.tags if tag in ("h1", "h2")] == ["h1", "h2", "h2", "h2", "h2"]
    assert page.tags[0] == ("html", {"lang": "en"})


def test_contrast():
    """WCAG AA: 4.5 to 1 for text, in light and dark, on the page and on cards."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    style = (TEMPLATES / "report.html").read_text(encoding="utf-8")
    themes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root {(.*?)}", style, re.S)]
    assert len(themes) == 2
    for theme in themes:
        assert len(theme) == 5 + COLORS
        for name in ("ink", "soft", *(f"s{i}" for i in range(COLORS))):
            for ground in ("page", "card"):
                dark, light = sorted((luminance(theme[name]), luminance(theme[ground])))
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)


# --- What is missing or broken --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.json", "history.json", "lineage.json", "model.safetensors", "samples.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "damaged", "nonsense"])
def test_incomplete_stage(chain, name, how, monkeypatch):
    monkeypatch.setattr(chain_samples, "generate_samples", lambda folder, prompts: ["yes"] * len(prompts))
    for path in list(chain.rglob(name)):
        if how == "missing":
            path.unlink()
        elif how == "nonsense":
            path.write_text('[{"tokens": "many", "loss": null}, 3, {"tokens": NaN, "loss": true}]')
        else:
            path.write_text("" if how == "damaged" else "[]" if name == "history.json" else "{}")
    text = report(chain)
    assert "None" not in text and "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S).lower().split()


def test_push_stage(chain):
    before = re.sub(r"\s+", " ", " ".join(Page(report(chain)).words))
    value = json.loads((chain / "chain.json").read_text())
    value["stages"].append({"name": "push", "kind": "push", "folder": "merge", "seconds": 1.0})
    write(chain / "chain.json", value)
    assert write_report(chain) == chain / "merge" / "report.html"
    words = re.sub(r"\s+", " ", " ".join(Page(report(chain)).words))
    assert words.count("difference of a logit") == before.count("difference of a logit") == 1
    assert words.count(hashlib.sha256(b"merge").hexdigest()) == 1


@pytest.mark.parametrize("key", ["train_tokens", "flops", "train_seconds", "eval_loss", "parameters"])
@pytest.mark.parametrize("value", [None, "many", float("nan"), float("inf"), True, []])
def test_invalid_number(chain, key, value):
    metrics = json.loads((chain / "sft" / "metrics.json").read_text())
    write(chain / "sft" / "metrics.json", metrics | {key: value})
    text = report(chain)
    if key == "flops":
        assert "reports no FLOPs" in text and "stages after pretraining" not in text


def test_chain_without_results(tmp_path):
    write(
        tmp_path / "chain.json", {"stages": [{"kind": "prepare", "folder": "."}, {"name": "later", "folder": "later"}]}
    )
    words = " ".join(Page(report(tmp_path)).words)
    assert "No samples" in words and "No stage of this chain has left a training history" in words


def test_invalid_lineage(chain):
    for broken in ({"plan": 1, "git": [], "data": [], "versions": "1"}, {"data": {"train": {}, "evaluation": [3, {}]}}):
        write(chain / "sft" / "lineage.json", broken)
        report(chain)


def test_model_that_does_not_load(chain, capsys, monkeypatch):
    def answers(folder, prompts):
        if folder.name == "dpo":
            raise Exception("Error while deserializing header: incomplete metadata")  # safetensors' is no OSError
        return sample_texts(folder.name)

    (chain / "samples.json").unlink()
    monkeypatch.setattr(chain_samples, "generate_samples", answers)
    words = " ".join(Page(report(chain)).words)
    assert "KING HENRY" in words and re.search(r"dpo\s+has no samples", words)
    assert "no samples of dpo" in capsys.readouterr().err
    assert len(json.loads((chain / "samples.json").read_text())) == 3  # the next report tries it again


@pytest.mark.slow
def test_generated_samples(tmp_path, tokenizers):
    """Two untrained models: the causal one continues the prompt, the masked one replaces the masks only."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    for objective, model in (
        ("clm", LlamaForCausalLM(LlamaConfig(vocab_size=384, **MODELS["llama"]))),
        ("mlm", BertForMaskedLM(BertConfig(vocab_size=256, **MODELS["bert"]))),
    ):
        model.save_pretrained(tmp_path / objective)
        PreTrainedTokenizerFast.from_pretrained(tokenizers[objective]).save_pretrained(tmp_path / objective)
    write(
        tmp_path / "chain.json",
        {
            "prompts": ["the people are", "the [MASK] are here"],
            "stages": [{"name": name, "kind": f"pretrain_{name}", "folder": name} for name in ("clm", "mlm")],
        },
    )
    report(tmp_path)
    causal, masked = json.loads((tmp_path / "samples.json").read_text()).values()
    assert len(causal) == 2 and not causal[0].startswith("the people are")
    assert masked[0].startswith("the people are") and "[MASK]" not in masked[0]
    assert masked[1].startswith("the") and masked[1].endswith("are here") and "[MASK]" not in masked[1]


@pytest.mark.parametrize(
    "content, words", [(None, "is missing"), ("{", "no list of stages"), ('{"stages": []}', "no list of stages"),
                       ('{"stages": [1]}', "no list of stages"), ('{"stages": [{"folder": "x"}]}', "no stage")]
)  # fmt: skip
def test_folder_without_chain(tmp_path, content, words):
    if content is not None:
        (tmp_path / "chain.json").write_text(content)
    command = [sys.executable, str(ROOT / "scripts" / "make_report.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.search(rf"^error: .*{words}", done.stderr, re.M) and "Traceback" not in done.stderr


def test_second_report_without_torch(chain):
    code = (
        "import pathlib, sys\n"
        "from unlabeled.reporting.chain_report import write_report\n"
        "write_report(pathlib.Path(sys.argv[1]))\n"
        "print('torch' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code, str(chain)], capture_output=True, text=True)
    assert process.stdout == "False\n" and not process.stderr


def test_cached_samples(chain, monkeypatch):
    asked = []
    monkeypatch.setattr(
        chain_samples, "generate_samples", lambda folder, prompts: asked.append(folder.name) or ["new"] * len(prompts)
    )
    (chain / "dpo" / "model.safetensors").write_bytes(b"trained again")
    report(chain)
    report(chain)
    assert asked == ["dpo"]
    value = json.loads((chain / "chain.json").read_text())
    write(chain / "chain.json", value | {"prompts": ["another"]})
    report(chain)
    assert asked == ["dpo", "pretrain", "sft", "dpo", "merge"]
    assert len(json.loads((chain / "samples.json").read_text())) == 4  # samples that no stage has any more are removed


# --- A real browser -------------------------------------------------------------------------------------------------


class Browser:
    """Headless Chromium, controlled over its debugging pipe. Its events are recorded."""

    def __init__(self, profile: Path):
        (ours_in, theirs_out), (theirs_in, ours_out) = os.pipe(), os.pipe()
        command = (
            f'exec "$0" --headless=new --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe '
            f'--no-first-run --user-data-dir="$1" 3<&{theirs_in} 4>&{theirs_out}'
        )
        self.process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, str(profile)], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
        )
        os.close(theirs_in), os.close(theirs_out)
        self.read, self.write = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb", buffering=0)
        self.ids, self.buffer, self.events = count(1), b"", []
        target = self("Target.createTarget", session=None, url="about:blank")["targetId"]
        self.session = None
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    session = None

    def __call__(self, method: str, session: str | None = "own", **params) -> dict:
        own = next(self.ids)
        message = {"id": own, "method": method, "params": params}
        if session and self.session:
            message["sessionId"] = self.session
        self.write.write(json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != own:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self) -> dict:
        while b"\0" not in self.buffer:
            assert select.select([self.read], [], [], 60)[0], "Chromium does not answer"
            block = os.read(self.read.fileno(), 1 << 16)
            assert block, "Chromium has gone away"
            self.buffer += block
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int, dark: bool = False, height: int = 900) -> None:
        self.events.clear()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def ask(self, expression: str):
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def of(self, *methods: str) -> list[dict]:
        return [event["params"] for event in self.events if event.get("method") in methods]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.process.kill()
    browser.process.wait()


TOO_WIDE = """[...document.querySelectorAll('main *, header *')].filter(e => !e.closest('thead, .scroll'))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("width", [360, 800, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_in_a_browser(browser, tmp_path, width, dark):
    """No console messages, no network requests and no horizontal scrolling, in the light and the dark theme."""
    path = write_report(make_chain(tmp_path / "chain"))
    browser.open(path, width, dark)
    assert browser.ask("innerWidth") == width
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)"
    )
    assert browser.ask(TOO_WIDE) == []
    drawn = "[...document.querySelectorAll('figure svg')].filter(e => e.getBoundingClientRect().width > 0)"
    assert browser.ask(f"{drawn}.length") == 3  # one of the two shapes of the loss chart is visible
    size = browser.ask(f"Math.min(...{drawn}.map(e => e.getBoundingClientRect().width / e.viewBox.baseVal.width * 12))")
    assert size >= 10  # px, of the smallest words in a picture
    if folder := os.environ.get("REPORT_SCREENSHOTS"):
        browser.open(path, width, dark, browser.ask("document.documentElement.scrollHeight"))
        browser.screenshot(Path(folder, f"{width}-{'dark' if dark else 'light'}.png"))
    assert browser.of("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded") == []
    asked = {event["request"]["url"] for event in browser.of("Network.requestWillBeSent")}
    assert asked - {"data:,"} == {path.as_uri()}


@pytest.mark.parametrize("width", [360, 1280])
def test_long_words_in_a_browser(browser, tmp_path, width):
    folder = make_chain(tmp_path / "chain", answers=lambda name: ["donaudampfschiff" * 20] * 3)
    value = json.loads((folder / "chain.json").read_text())
    value["name"] = "chain_" * 20
    for stage in value["stages"]:
        stage["name"] += "_with_a_long_name_without_spaces"
    write(folder / "chain.json", value)
    source = json.loads((folder / "sft" / "lineage.json").read_text())
    source["data"]["train"][0]["path"] = "data/" * 60
    source["plan"]["device"] = "device_" * 20
    write(folder / "sft" / "lineage.json", source)
    browser.open(write_report(folder), width)
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask(TOO_WIDE) == []
    if folder := os.environ.get("REPORT_SCREENSHOTS"):
        browser.screenshot(Path(folder, f"long-{width}.png"))


def test_browser_checks(browser, tmp_path):
    """The checks of the tests above notice a page that is too wide, prints to the console and loads an image."""
    page = tmp_path / "page.html"
    page.write_text(
        "<main><p style='width:2000px'>wide</p><img src='x.png'></main><script>console.log(1); nothing()</script>"
    )
    browser.open(page, 360)
    assert browser.ask("document.documentElement.scrollWidth") > 360
    assert len(browser.ask(TOO_WIDE)) == 1
    assert browser.of("Runtime.consoleAPICalled") and browser.of("Runtime.exceptionThrown")
    assert (tmp_path / "x.png").as_uri() in {e["request"]["url"] for e in browser.of("Network.requestWillBeSent")}
