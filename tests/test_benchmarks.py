"""The arithmetic of the benchmarks, and what their variants differ in. The benchmarks themselves take hours."""

import json
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from conftest import ROOT

from benchmarks import recipes, settings, speed
from benchmarks.gpu import bench, documents, head, loop
from benchmarks.gpu import recipes as gpu_recipes
from benchmarks.gpu.results import Results
from benchmarks.speed import make_variants
from unlabeled.config import (
    DataArguments,
    FIMArguments,
    MaskingArguments,
    ModelArguments,
    PretrainingArguments,
    SpanArguments,
    parse_arguments,
)

OBJECTIVE_ARGUMENTS = {"clm": FIMArguments, "mlm": MaskingArguments, "span": SpanArguments}
# Modules without a command line.
LIBRARY_MODULES = ("__init__", "baselines", "settings", "tables")
SCRIPTS = [path.stem for path in sorted((ROOT / "benchmarks").glob("*.py")) if path.stem not in LIBRARY_MODULES]
SCRIPTS.append("gpu")


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("has_bf16", [False, True])
def test_ablation_adds_one_optimization_per_row(has_bf16, has_gpu):
    variants = make_variants(has_bf16, has_gpu)
    ours = [options for name, options in variants.items() if name not in ("stock", "loop")]
    assert len(ours) == 4 + has_bf16 + has_gpu
    assert variants["loop"] == ours[-1]
    for options, next_options in pairwise(ours):
        assert sum(options[key] != next_options[key] for key in options) == 1


def test_settings_name_shipped_configurations():
    for name, setting in settings.SETTINGS.items():
        assert (ROOT / f"recipes/configs/{setting.config}.yaml").exists()
        assert setting.objective == name.split("-")[0]


def test_tokenizer_folders():
    folders = [settings.tokenizer_folder(settings.SETTINGS[name]) for name in ("clm-7m", "mlm-7m", "clm-tiny")]
    assert [folder and folder.name for folder in folders] == ["tokenizer-bpe-8192", "tokenizer-wordpiece-8192", None]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_command(script):
    command = [sys.executable, "-m", f"benchmarks.{script}", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert f"python -m benchmarks.{script}" in result.stdout


def test_whole_recipes_are_shipped_configurations():
    for name, setting in recipes.ALL_SETTINGS.items():
        model, stage = setting.config.split("/")
        config = ROOT / f"recipes/configs/{model}/{stage}.yaml"
        assert config.exists(), name
        assert (ROOT / "recipes" / f"{stage.removesuffix('_lora')}.py").exists(), name
        if "pretrain" in stage:
            groups = ModelArguments, DataArguments, OBJECTIVE_ARGUMENTS[setting.objective], PretrainingArguments
            options = ["--config", str(config), *setting.options, "--precision=fp32"]
            _, data_args, _, args = parse_arguments(*groups, args=options)
            assert "shakespeare" in str(data_args.train_data), "nothing is downloaded"
            assert args.batch_tokens and args.max_steps


def test_recipe_command_trains_for_the_steps(tmp_path):
    command = recipes.make_command(recipes.ALL_SETTINGS["clm-tiny"], "sdpa", 40, ["--batch_tokens=1024"], tmp_path)
    assert "--train_tokens=40960" in command


def test_speed_table_by_hand():
    """Ratios compare turns of the same round, whatever the machine does between rounds."""
    report = {
        "peak_memory_bytes": 1e9,
        "flops_per_token": 1e6,
        "peak_flops": None,
        "batch_tokens": 2048,
        "parameters": 1e6,
        "device": "a CPU",
    }
    first_steps = {"stock": 10, "loop": 60, "+ Muon": 60}
    reports = {name: report | {"first_step": seconds} for name, seconds in first_steps.items()}
    turns = [
        {"stock": 2.0, "loop": 1.0, "+ Muon": 1.25},
        {"stock": 8.0, "loop": 4.0, "+ Muon": 4.0},
        {"stock": 3.0, "loop": 1.5, "+ Muon": 1.5},
    ]
    table = speed.make_table("clm-tiny", reports, turns)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if "|" in line]
    stock, loop, ours = rows[2:]
    assert stock[2] == "1.00 (1.00 to 1.00)"
    assert loop[2] == "2.00 (2.00 to 2.00)"
    assert ours[1:4] == ["1,365", "2.00 (1.60 to 2.00)", "1 G"]
    assert ours[6] == f"{2 * 540 / 590:.2f}", "a minute of compilation is a tenth of ten minutes"
    assert "1.000 of the loop's speed (0.80 to 1.00)" in table


def test_gpu_parts_on_a_cpu():
    """Every output head gives the loss and gradients of all logits, and whole steps train."""
    records = []

    def record(name, **figures):
        records.append({"name": name} | figures)

    small_bench = bench.Bench(torch.device("cpu"), bench.SMALL, record, compile=False)
    head.head(small_bench)
    measured = {entry["name"]: entry for entry in records if "difference_of_loss" in entry}
    assert len(measured) >= 6
    for name, entry in measured.items():
        assert entry["difference_of_loss"] < 1e-5, name
        assert entry["difference_of_hidden_gradient"] < 2e-2, name
        assert entry["difference_of_weight_gradient"] < 2e-2, name
    records.clear()
    loop.loop(small_bench, kind="gpt2", attn="varlen", head="compiled chunks", lengths="padded")
    loop.loop(small_bench, kind="gpt2", attn="sdpa", head="recipe")
    loop.loop(small_bench, kind="plain")
    assert [round(entry["first_loss"], 1) for entry in records] == [6.5] * 3, "a random guess: log(640) nats"
    varlen, sdpa = records[:2]
    assert varlen["loss"] == pytest.approx(sdpa["loss"], abs=0.01), "the same model, text and steps"


def test_document_starts_by_hand():
    starts = documents.document_starts([[3, 5], [6]], length=8)
    assert starts.tolist() == [0, 3, 8, 14, 16], "the padding of the second row counts as a document"
    assert documents.padded_starts(starts, 7).tolist() == [0, 3, 8, 14, 16, 16, 16]


def test_gpu_results_with_failed_pieces(tmp_path):
    results = Results(tmp_path, {"card": "none"})
    results.record("loop", "one", ms=1234.5, mfu=0.25, reasons=["a|b"])
    results.record("loop", "two", error="RuntimeError: it broke")
    results.write()
    text = (tmp_path / "results.md").read_text()
    assert "| one | 1,234 | 25.0% |" in text or "| one | 1,235 | 25.0% |" in text
    assert "**two: error**: RuntimeError: it broke" in text
    assert "a\\|b" in text
    assert [entry["name"] for entry in json.loads((tmp_path / "results.json").read_text())["results"]] == ["one", "two"]


@pytest.mark.parametrize("name", ["gpt2-124m", "modernbert-base", "t5-base"])
def test_gpu_recipe_options_are_valid(name, tmp_path):
    arguments = gpu_recipes.make_arguments(name, tmp_path, tmp_path / "out", small=True, steps=4, on_gpu=False)
    objective_arguments = OBJECTIVE_ARGUMENTS[gpu_recipes.RECIPES[name].objective]
    *_, args = parse_arguments(ModelArguments, DataArguments, objective_arguments, PretrainingArguments, args=arguments)
    assert args.max_steps == 4
