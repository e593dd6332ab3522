"""docs/adapting_a_recipe.md: each diff applies to the recipe, and the changed recipe does what the page says."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, recipe_arguments, run_recipe

PAGE = (ROOT / "docs/adapting_a_recipe.md").read_text(encoding="utf-8")
RECIPE = (ROOT / "recipes/pretrain_clm.py").read_text(encoding="utf-8")


def diffs_by_section() -> dict[str, list[str]]:
    """The diff blocks of the page by the heading above them."""
    sections = re.split(r"^## (.*)$", PAGE, flags=re.M)
    titles, bodies = sections[1::2], sections[2::2]
    blocks = [re.findall(r"```diff\n(.*?)```", body, re.S) for body in bodies]
    return {title: found for title, found in zip(titles, blocks, strict=True) if found}


DIFFS = diffs_by_section()


def apply(diff: str, source: str) -> str:
    """Replace the lines that begin with a space or "-" by those that begin with a space or "+"."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    assert source.count(old) == 1, f"the recipe does not have exactly once:\n{old}"
    return source.replace(old, new)


@pytest.fixture
def run_section(corpus, tokenizers, tmp_path):
    """Run a recipe of two steps with the diffs of a section; returns its output folder."""

    def run(section: str) -> Path:
        source = RECIPE
        for diff in DIFFS[section]:
            source = apply(diff, source)
        recipe = tmp_path / "my_recipe.py"
        recipe.write_text(source, encoding="utf-8")
        options = {"train_tokens": 2 * 256, "save_strategy": "no", "logging_steps": 1}
        output_dir = tmp_path / "run"
        run_recipe(recipe, recipe_arguments("clm", "llama", corpus, tokenizers, output_dir, **options))
        return output_dir

    return run


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def test_every_section_with_a_diff_is_tested():
    tests = Path(__file__).read_text(encoding="utf-8")
    assert len(DIFFS) >= 6
    for section in DIFFS:
        assert f'run_section("{section}")' in tests, section


def test_own_optimizer(run_section, capsys):
    run_section("Own optimizer")
    assert "optimizer  Adafactor" in capsys.readouterr().out


def test_own_data_collator(run_section, capsys):
    folder = run_section("Own data collator")
    assert read_metrics(folder)["steps"] == 2
    assert "checked: packed documents do not see each other" in capsys.readouterr().out


def test_own_loss(run_section):
    """The z-loss adds to the training loss, and not to the validation loss."""
    folder = run_section("Own loss")
    history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    training_loss = next(entry["loss"] for entry in history if "loss" in entry)
    assert 0 < read_metrics(folder)["eval_loss"] < training_loss


def test_own_metric(run_section):
    folder = run_section("Own metric")
    metrics = read_metrics(folder)
    assert metrics["first_half_loss"] == pytest.approx(metrics["eval_loss"], rel=0.1)
    assert metrics["first_half_loss"] != metrics["eval_loss"]
    assert "first_half_loss" in (folder / "README.md").read_text(encoding="utf-8")


def test_fixed_prompts(run_section):
    folder = run_section("Fixed prompts in the samples")
    assert "ROMEO.\nBut soft,|" in (folder / "samples.md").read_text(encoding="utf-8")


def test_own_data(run_section, corpus):
    """Fewer documents than the corpus has are trained on."""
    folder = run_section("Own data")
    lineage = json.loads((folder / "lineage.json").read_text(encoding="utf-8"))
    documents = len(Path(corpus["train"]).read_text().splitlines())
    train = lineage["data"]["splits"]["train"] if "data" in lineage else lineage["splits"]["train"]
    assert 0 < train["documents"] < documents
