"""The structure of the project: import layers, help texts, no paths of a machine."""

import ast
import re
import subprocess
import sys
from dataclasses import fields
from inspect import get_annotations
from pathlib import Path

import pytest
from conftest import ROOT

from unlabeled.config.stages import ARGUMENT_CLASSES, argument_classes

PACKAGE = ROOT / "unlabeled"
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
COMMANDS = [path for path in SCRIPTS if "__main__" in path.read_text(encoding="utf-8")]

# A package imports only from those before it; modules of one layer may import each other.
LAYERS = (
    ("errors", "compat", "runtime"),
    ("demo",),
    ("planning",),
    ("config",),
    ("data",),
    ("models",),
    ("planner",),
    ("reporting",),
    ("hub",),
    ("training",),
    ("chain",),
)
# To be removed.
EXCEPTIONS = {}
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if "metrics" not in path.parts}


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """The modules of the project that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name in MODULES or name.split(".")[0] in ("recipes", "scripts")}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "unlabeled"])
def test_layers(name):
    """Imports point one way, and nothing in the package imports a recipe or a script."""
    own = LAYER_OF[name.split(".")[1]]
    for other in imported(MODULES[name]) - {"unlabeled"}:
        assert other.startswith("unlabeled."), f"{name} imports {other}"
        if (name, ".".join(other.split(".")[:2])) in EXCEPTIONS:
            continue
        assert LAYER_OF[other.split(".")[1]] <= own, f"{name} imports {other}"


def test_import_cycles():
    """No module imports itself through others when it is loaded."""
    graph = {name: imported(path, top_level_only=True) & set(MODULES) for name, path in MODULES.items()}
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path[path.index(name) :], name))
        if name in finished:
            return
        for other in sorted(graph[name] - {name} - packages):
            visit(other, (*path, name))
        finished.add(name)

    for name in graph:
        visit(name, ())


def test_packages_have_an_init_file():
    """`pip install .` takes only those."""
    for path in MODULES.values():
        assert (path.parent / "__init__.py").is_file(), path


def test_no_patches_and_no_remote_code():
    for path in [*MODULES.values(), *RECIPES, *SCRIPTS]:
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text
        assert not re.search(r"^\s*(transformers|torch|trl|accelerate|datasets)(\.\w+)+ = ", text, re.M), path


@pytest.mark.parametrize("recipe", ARGUMENT_CLASSES)
def test_every_key_has_help(recipe):
    """Keys of the libraries bring their own."""
    for cls in argument_classes(recipe):
        own = {
            name for base in cls.__mro__ if base.__module__.startswith("unlabeled.") for name in get_annotations(base)
        }
        for member in fields(cls):
            if member.name in own and member.init:
                assert member.metadata.get("help"), (cls.__name__, member.name)


@pytest.mark.slow
@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.stem)
def test_help_of_a_script(script):
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert f"python scripts/{script.name}" in script.read_text(encoding="utf-8").split('"""')[1]


def test_tracked_files_name_no_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for name in files:
        path = ROOT / name
        if path.suffix in (".png",) or not path.is_file():
            continue
        assert not re.search(r"(?<![\w.])/(work|root|home)/\w", path.read_text(encoding="utf-8")), name
