"""The figures in README and YAML comments are those of committed results."""

import json
import re

import pytest
from conftest import ROOT

from benchmarks import documented_figures

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "benchmarks/results/tiny_recipes.json").read_text(encoding="utf-8"))


def test_documented_figures():
    assert documented_figures.differences(RESULTS) == []


def test_a_changed_result_is_noticed():
    changed = json.loads(json.dumps(RESULTS))
    changed["pretrain_clm"]["metrics"]["bits_per_byte"] += 0.01
    assert len(documented_figures.differences(changed)) == 3  # in README, docs/data.md and the YAML


@pytest.mark.parametrize("run", ["pretrain_clm", "chain"])
def test_console_output_of_the_readme(run):
    """Every line of a block of README that shows what a run printed is a line that the recorded run printed."""
    first = {"pretrain_clm": "  model      LlamaForCausalLM", "chain": "  stage   "}[run]
    block = next(block for block in re.findall(r"```text\n(.*?)```", README, re.S) if block.startswith(first))
    printed = {line.rstrip() for line in RESULTS[run]["console"]}
    for line in block.splitlines():
        assert line.rstrip() in printed, line


def test_results_name_their_origin():
    for name, result in RESULTS.items():
        assert result["git"]["commit"] and result["processor"] and result["versions"]["torch"], name
