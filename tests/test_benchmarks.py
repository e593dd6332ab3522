"""The benchmarks' own arithmetic, and that each lever is what it says; the runs themselves take an hour."""

import json
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from conftest import ROOT

from benchmarks import baselines, gpu, gpu_pieces, recipes, speed
from unlabeled.config.arguments import DataArguments, ModelArguments, PretrainingArguments
from unlabeled.config.parser import parse
from unlabeled.data.collators import MaskingArguments, SpanArguments
from unlabeled.data.fim import FIMArguments

OWN = {"clm": FIMArguments, "mlm": MaskingArguments, "span": SpanArguments}


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_one_lever_more_in_each_line(bf16, gpu):
    found = speed.contestants(bf16, gpu)
    ours = [levers for name, levers in found.items() if name not in ("stock", "loop")]
    assert len(ours) == 4 + bf16 + gpu and found["loop"] == ours[-1]
    for one, two in pairwise(ours):
        assert sum(one[key] != two[key] for key in one) == 1


def test_every_setting_names_a_configuration():
    for name, setting in baselines.SETTINGS.items():
        assert (ROOT / f"recipes/configs/{setting.config}.yaml").exists()
        assert setting.objective == name.split("-")[0]
    kinds = {baselines.tokenizer_of(baselines.SETTINGS[name]).name for name in ("clm-7m", "mlm-7m")}
    assert kinds == {"tokenizer-bpe-8192", "tokenizer-wordpiece-8192"}


def test_every_benchmark_says_what_it_measures():
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        if path.stem not in ("__init__", "baselines", "gpu_pieces"):
            said = subprocess.run(
                [sys.executable, "-m", f"benchmarks.{path.stem}", "--help"],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            assert f"python -m benchmarks.{path.stem}" in said


def test_whole_recipes_are_shipped_configurations():
    for name, setting in recipes.ALL.items():
        model, stage = setting.config.split("/")
        assert (ROOT / f"recipes/configs/{model}/{stage}.yaml").exists(), name
        assert (ROOT / "recipes" / f"{stage.removesuffix('_lora')}.py").exists(), name
        if "pretrain" in stage:
            groups = ModelArguments, DataArguments, OWN[setting.objective], PretrainingArguments
            file = str(ROOT / f"recipes/configs/{model}/{stage}.yaml")
            _, data, _, args = parse(*groups, args=["--config", file, *setting.changes, "--precision=fp32"])
            assert "shakespeare" in str(data.train_data), "nothing is fetched"
            assert args.batch_tokens and args.max_steps


def test_the_table_by_hand():
    """Ratios are those of turns of the same round, whatever the machine does between rounds."""
    last = {"peak_memory_bytes": 1e9, "flops_per_token": 1e6, "peak_flops": None, "batch_tokens": 2048,
            "parameters": 1e6, "device": "a CPU"}  # fmt: skip
    said = {name: last | {"first_step": first} for name, first in (("stock", 10), ("loop", 60), ("+ Muon", 60))}
    turns = [{"stock": 2.0, "loop": 1.0, "+ Muon": 1.25}, {"stock": 8.0, "loop": 4.0, "+ Muon": 4.0},
             {"stock": 3.0, "loop": 1.5, "+ Muon": 1.5}]  # fmt: skip
    rows = [line.strip("| ").split(" | ") for line in speed.table("clm-tiny", said, turns).splitlines() if "|" in line]
    stock, loop, ours = rows[2:]
    assert stock[2] == "1.00 (1.00 to 1.00)" and loop[2] == "2.00 (2.00 to 2.00)"
    assert ours[1] == "1,365" and ours[2] == "2.00 (1.60 to 2.00)" and ours[3] == "1 G"
    assert ours[6] == f"{2 * 540 / 590:.2f}", "a minute of compiling is a tenth of ten minutes"
    assert "1.000 of the loop's speed (0.80 to 1.00)" in speed.table("clm-tiny", said, turns)


def test_gpu_pieces_run_on_a_cpu():
    """Each head gives the loss and gradients of all logits; a loop trains; lengths are the documents'."""
    records = []

    def record(name, **figures):
        records.append({"name": name} | figures)

    bench = gpu_pieces.Bench(torch.device("cpu"), gpu_pieces.SMALL, record, compile=False)
    gpu_pieces.head(bench)
    heads = {entry["name"]: entry for entry in records if "difference_of_loss" in entry}
    assert len(heads) >= 6
    for name, entry in heads.items():
        assert entry["difference_of_loss"] < 1e-5, name
        assert entry["difference_of_hidden_gradient"] < 2e-2, name
        assert entry["difference_of_weight_gradient"] < 2e-2, name
    records.clear()
    gpu_pieces.loop(bench, kind="gpt2", attn="varlen", head="compiled chunks", lengths="padded")
    gpu_pieces.loop(bench, kind="gpt2", attn="sdpa", head="as it is")
    gpu_pieces.loop(bench, kind="plain")
    assert [round(entry["first_loss"], 1) for entry in records] == [6.5] * 3, "nats of a guess: the log of 640"
    one, two = records[:2]
    assert one["loss"] == pytest.approx(two["loss"], abs=0.01), "the same model, text and step"


def test_starts_of_documents_by_hand():
    starts = gpu_pieces.document_starts([[3, 5], [6]], length=8)
    assert starts.tolist() == [0, 3, 8, 14, 16], "the padding of the second row is a document"
    assert gpu_pieces.padded_starts(starts, 7).tolist() == [0, 3, 8, 14, 16, 16, 16]


def test_gpu_results_keep_what_failed(tmp_path):
    results = gpu.Results(tmp_path, {"card": "none"})
    results.record("loop", "one", ms=1234.5, mfu=0.25, reasons=["a|b"])
    results.record("loop", "two", error="RuntimeError: it broke")
    results.write()
    text = (tmp_path / "results.md").read_text()
    assert "| one | 1,234 | 25.0% |" in text or "| one | 1,235 | 25.0% |" in text
    assert "**two: error**: RuntimeError: it broke" in text
    assert "a\\|b" in text
    assert [entry["name"] for entry in json.loads((tmp_path / "results.json").read_text())["results"]] == ["one", "two"]


def test_gpu_recipes_have_valid_keys(tmp_path):
    for name in ("gpt2-124m", "modernbert-base", "t5-base"):
        command = gpu.command_of(name, tmp_path, tmp_path / "out", small=True, steps=4, on_gpu=False)
        groups = ModelArguments, DataArguments, OWN[name_of_objective(gpu, name)], PretrainingArguments
        *_, args = parse(*groups, args=command)
        assert args.max_steps == 4


def name_of_objective(gpu, name: str) -> str:
    return gpu.RECIPES[name].config.split("_")[-1]
