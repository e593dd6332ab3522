"""The structure of the package: import layers, shared blocks of the recipes, help texts, no private paths."""

import ast
import importlib
import json
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "unlabeled"
MODULES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
READERS = ("sources", "files", "text", "csv_rows", "json_rows", "parquet_rows", "readers", "identity", "held_out")
INNER = {
    "data": (*READERS, "left_out", "rendering", "chat_templates", "conversations", "preferences"),
    "budget": ("counts", "devices", "activations", "memory", "runs", "spans", "shapes", "planner"),
    "training": ("evaluation", "epochs", "guards", "saving", "trainer", "preference", "results"),
    "streams": ("reading", "rows"),
    "downstream": ("labels", "trainer", "pairs", "embedding"),
}
PACKAGES = [path for name in INNER for path in sorted((PACKAGE / name).rglob("*.py"))]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
COMMANDS = [path for path in SCRIPTS if "__main__" in path.read_text(encoding="utf-8")]

# A module imports only from floors below its own.
FLOORS = [
    {"signals"},
    {"caches", "encoding", "holders", "locks", "small_files"},
    {"run_lock", "staging"},
    {"attention", "budget", "checkpoints", "help", "processes", "safe_loading", "secrets", "tokenization"},
    {"data", "pushes"},
    {"corpus", "losses", "modeling", "optim", "packing", "parsing", "schedules", "scaling"},
    {"arguments", "chat", "lineage", "plots", "push_contents"},
    {"collators", "console", "hub", "prepare", "run_identity"},
    {"training", "streams"},
    {"downstream"},
]


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] in ("recipes", "scripts"):
                found.add(node.module)
            elif parts[0] == "unlabeled":
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found - {"UserError", "Stopped", "explained"}  # which every module may take from the package itself


def test_every_module_has_a_floor():
    rooms = set(MODULES) | {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()}
    assert rooms == set().union(*FLOORS)
    listed = re.search(r"^packages = (.*)$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert sorted(json.loads(listed)) == sorted(["unlabeled", *(f"unlabeled.{name}" for name in INNER)])


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_floors_below(name):
    floor = next(i for i, floor in enumerate(FLOORS) if name in floor)
    below = set().union(*FLOORS[:floor])
    assert imported(MODULES[name]) <= below


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_module_of_a_package_imports_only_from_floors_below(path):
    room = path.relative_to(PACKAGE).parts[0]
    floor = next(i for i, floor in enumerate(FLOORS) if room in floor)
    assert imported(path) <= {room}.union(*FLOORS[:floor])


@pytest.mark.parametrize("room", INNER)
def test_inside_a_room_there_is_no_circle(room):
    names = INNER[room]
    assert {path.stem for path in (PACKAGE / room).glob("*.py")} == {*names, "__init__"}
    for number, name in enumerate(names):
        text = (PACKAGE / room / f"{name}.py").read_text(encoding="utf-8")
        found = set(re.findall(rf"from unlabeled\.{room}\.(\w+)", text))
        assert found <= set(names[:number])


def test_recipes_share_their_blocks_word_for_word():
    """What two recipes of a kind do not share is what their objectives differ in."""
    read = {path.stem: path.read_text(encoding="utf-8").splitlines() for path in RECIPES}
    for other, word, loss, least in (("mlm", "MaskedLM", "masked_lm", 0.75), ("span", "Seq2SeqLM", "span", 0.6)):
        first, second = read["pretrain_clm"], read[f"pretrain_{other}"]
        body = [line for line in first[first.index("def main():") :] if line.strip()]
        body = body[: next(i for i, line in enumerate(body) if line.startswith("def openings"))]
        replaced = {line.replace("CausalLM", word).replace("causal_lm", loss) for line in body}
        assert len(replaced & set(second)) / len(replaced) > least, sorted(replaced - set(second))
    body = {line.replace("TokenClassification", "SequenceClassification") for line in read["tag"] if line.strip()}
    assert len(body & set(read["classify"])) / len(body) > 0.85, sorted(body - set(read["classify"]))
    sft, dpo = read["sft"], read["dpo"]
    for heading, least in (("def main", 0.75), ("    # --- Model", 0.85), ("    # --- Train,", 1.0)):
        start = next(i for i, line in enumerate(sft) if line.startswith(heading))
        body = {line.replace("ExactSFTTrainer", "ExactDPOTrainer") for line in sft[start:] if line.strip()}
        assert len(body & set(dpo)) / len(body) >= least, sorted(body - set(dpo))


def test_nothing_is_monkeypatched_and_no_remote_code_is_run():
    for path in [*MODULES.values(), *PACKAGES, *RECIPES, *SCRIPTS]:
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text
        assert not re.search(r"^\s*(transformers|torch|trl|accelerate|datasets)(\.\w+)+ = ", text, re.M), path


def test_keys_of_our_own_are_few():
    from sentence_transformers import SentenceTransformerTrainingArguments
    from transformers import TrainingArguments
    from trl import DPOConfig, SFTConfig
    from unlabeled.downstream import embedding, labels

    from unlabeled.config import arguments
    from unlabeled.data import collators, corpus

    ours = (arguments.DataArguments, collators.MaskingArguments, arguments.ModelArguments, arguments.SourceArguments)
    ours += (arguments.FineTuningArguments, labels.TaskArguments, collators.SpanArguments, corpus.FIMArguments)

    def names(cls) -> set[str]:
        return {member.name for member in fields(cls)}

    own = set().union(*map(names, ours))
    own |= names(labels.DownstreamArguments) - names(TrainingArguments)
    own |= names(embedding.EmbedArguments) - names(SentenceTransformerTrainingArguments)
    for cls, theirs in (("Pretraining", TrainingArguments), ("SFT", SFTConfig), ("DPO", DPOConfig)):
        own |= names(getattr(arguments, f"{cls}Arguments")) - names(theirs)
    assert len(own) <= 47


def test_every_key_of_our_own_has_help():
    from unlabeled.downstream import embedding, labels

    from unlabeled.config import arguments
    from unlabeled.data import collators, corpus

    for cls in (
        labels.TaskArguments,
        labels.DownstreamArguments,
        embedding.EmbedArguments,
        collators.SpanArguments,
        corpus.FIMArguments,
        arguments.AdapterArguments,
        arguments.DataArguments,
        collators.MaskingArguments,
        arguments.ModelArguments,
        arguments.PretrainingArguments,
        arguments.BudgetArguments,
        arguments.TuningArguments,
        arguments.FineTuningArguments,
        arguments.SourceArguments,
        arguments.SFTArguments,
        arguments.DPOArguments,
    ):
        for name, kind in cls.__annotations__.items():
            if not name.startswith("_") and "ClassVar" not in str(kind):
                assert cls.__dataclass_fields__[name].metadata.get("help"), name


@pytest.mark.slow
@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.stem)
def test_help_of_a_script_is_quick_and_shows_a_command(script):
    """Heavy imports come after the arguments are read (prepare_data needs the recipes' arguments for its help)."""
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert f"python scripts/{script.name}" in script.read_text(encoding="utf-8").split('"""')[1]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_help_of_a_recipe_is_there_before_torch(recipe):
    """It is read from the source, so it is compared with what the dataclasses are: every key, its default, its help."""
    from unlabeled.downstream import embedding, labels

    from unlabeled.config import arguments
    from unlabeled.data import collators, corpus

    begun = time.perf_counter()
    done = subprocess.run([sys.executable, recipe, "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert time.perf_counter() - begun < 2
    text, foreign = done.stdout, re.findall(r"and every key of (\w+)\.\S*?(\w+)$", done.stdout, re.M)
    assert ast.get_docstring(ast.parse(recipe.read_text(encoding="utf-8"))) in text
    theirs = {
        member.name for package, name in foreign for member in fields(getattr(importlib.import_module(package), name))
    }
    called = re.search(r"= parse\(\s*([\w, ]+?)\s*\)", recipe.read_text(encoding="utf-8"))[1]
    for name in called.split(", "):
        cls = next(
            getattr(room, name) for room in (arguments, collators, corpus, embedding, labels) if hasattr(room, name)
        )
        for member in fields(cls):
            shown = re.search(rf"^  --{member.name} +(\S+) +(.*) \((.*)\)$", text, re.M)
            if not shown:
                assert member.name in theirs, (name, member.name)
                continue
            assert shown[2] == member.metadata["help"], "of the class that is nearest"
            assert shown[3] in (str(member.default), json.dumps(member.default))


def test_tracked_files_name_no_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for name in files:
        path = ROOT / name
        if path.suffix in (".png",) or not path.is_file():
            continue
        assert not re.search(r"(?<![\w.])/(work|root|home)/\w", path.read_text(encoding="utf-8")), name
