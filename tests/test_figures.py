"""The figures in README, docs and YAML comments equal those of committed results."""

import json
import re

import pytest
from conftest import ROOT

from benchmarks import documented_figures

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "benchmarks/results/tiny_recipes.json").read_text(encoding="utf-8"))


def test_documented_figures():
    assert documented_figures.differences(RESULTS) == []


def test_changed_result():
    changed = json.loads(json.dumps(RESULTS))
    changed["pretrain_clm"]["metrics"]["bits_per_byte"] += 0.01
    assert len(documented_figures.differences(changed)) == 3  # in README, docs/data.md and the YAML


def test_changed_console_line():
    changed = json.loads(json.dumps(RESULTS))
    changed["chain"]["console"] = [line.replace("tokenizer  ", "tokenizers ") for line in changed["chain"]["console"]]
    assert documented_figures.differences(changed) == ["README.md lacks the recorded console output of chain"]


@pytest.mark.parametrize(
    ("name", "run"), [("pretrain_clm", "pretrain_clm"), ("sample", "pretrain_clm"), ("chain", "chain")]
)
def test_console_output_of_the_readme(name, run):
    """Every line of a block of README that shows what a run printed is a line that the recorded run printed."""
    block = re.search(rf"<!-- recorded: {name} -->\n```text\n(.*?)```", README, re.S)[1]
    printed = {line.rstrip() for line in RESULTS[run]["console"]}
    for line in block.splitlines():
        assert line.rstrip() in printed, line


def test_write(monkeypatch, tmp_path):
    """`--write` restores a changed figure and a changed excerpt, byte for byte."""
    readme = tmp_path / "README.md"
    readme.write_text(
        README.replace("2.29 bits per byte on three", "9.99 bits per byte on three").replace("  sft  ", "  xxx  ")
    )
    monkeypatch.setattr(documented_figures, "README", readme)
    monkeypatch.setattr(documented_figures, "ROOT", tmp_path)
    monkeypatch.setattr(
        documented_figures,
        "METRICS",
        [figure for figure in documented_figures.METRICS if figure.document == "README.md"],
    )
    documented_figures.write(RESULTS)
    assert readme.read_text(encoding="utf-8") == README


def test_origin_of_results():
    for name, result in RESULTS.items():
        assert result["git"]["commit"] and result["processor"] and result["versions"]["torch"], name
