"""A recipe without a line that looks optional, and one with its own data collator; see `test_adapting_a_recipe.py`."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, recipe_arguments, run_recipe

# Each is removed from pretrain_clm.py on its own: the run still trains, evaluates and exports.
OPTIONAL = {
    "seed": r"    set_seed\(.*\)\n",
    "pad_token": r"    print_on_main\(ensure_pad_token\(tokenizer\)\)\n",
    "evaluate": r"    trainer\.evaluate\(\)\n",
    "samples": r"        samples=lambda .*\n",
    "loss": r"        compute_loss_func=.*\n",
    "optimizer": r"        optimizer_cls_and_kwargs=.*\n",
    "arguments": r"        arguments=.*\n",
}


def adapted(source: str, replacements: dict[str, str], folder: Path) -> Path:
    """A copy of a recipe with some of its text replaced; the patterns are regular expressions that match once."""
    text = (ROOT / "recipes" / f"{source}.py").read_text(encoding="utf-8")
    for pattern, replacement in replacements.items():
        text, count = re.subn(pattern, replacement, text)
        assert count == 1, pattern
    path = folder / f"{source}.py"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def words(corpus, tokenizers, tmp_path) -> list[str]:
    """Arguments of a run of two steps."""
    options = {"train_tokens": 2 * 256, "save_strategy": "no", "logging_steps": 1}
    return recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "run", **options)


def metrics(folder: Path) -> dict:
    return json.loads((folder / "run" / "metrics.json").read_text())


@pytest.mark.parametrize("line", OPTIONAL)
def test_optional_line(line, words, tmp_path):
    run_recipe(adapted("pretrain_clm", {OPTIONAL[line]: ""}, tmp_path), words)
    assert metrics(tmp_path)["steps"] == 2
    assert metrics(tmp_path)["eval_loss"] > 0
    assert (tmp_path / "run" / "README.md").exists()
    assert (tmp_path / "run" / "samples.md").exists() is (line != "samples")


def test_own_data_collator(words, tmp_path, capsys):
    """Without the method `probe`, by which the isolation of documents is tried out."""
    own = """

class OwnCollator:
    def __call__(self, rows):
        rows = [torch.as_tensor(row["input_ids"]).long() for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
        return {"input_ids": ids, "labels": ids.clone()}


def main():
"""
    changes = {
        r"\n\ndef main\(\):\n": own,
        r"(?s)    data_collator = .*?\n    \)\n": "    data_collator = OwnCollator()\n",
        r"from transformers import": "import torch\nfrom transformers import",
    }
    run_recipe(adapted("pretrain_clm", changes, tmp_path), words)
    assert "isolation  not checked: OwnCollator has no method `probe`" in capsys.readouterr().out
    assert metrics(tmp_path)["steps"] == 2
