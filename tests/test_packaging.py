"""The package as it is installed: its dependencies are declared, extras are optional, and a copied recipe runs."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT, recipe_arguments
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib", reason="Python before 3.11 cannot read pyproject.toml")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
MODULES = sorted((ROOT / "unlabeled").rglob("*.py"))
# The command that uses it says how to install it: it pins other versions of what is declared.
NOT_DECLARED = {"lm_eval"}
OPTIONAL = ("deepspeed", "sentence_transformers", "lm_eval", "fastapi", "uvicorn", "openai", "gguf", "trackio")
NEED_SENTENCE_TRANSFORMERS = tuple(f"unlabeled.{name}.embedding" for name in ("config", "models", "training"))


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def third_party_imports(path: Path) -> set[str]:
    """The top-level packages that a module imports, other than those of Python and this project."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"unlabeled"}


def test_imports_are_declared():
    declared = {normalized(requirement.name) for requirement in DEPENDENCIES}
    declared |= {normalized(requirement.name) for extra in EXTRAS.values() for requirement in extra}
    distributions = packages_distributions()
    for path in MODULES:
        for name in third_party_imports(path) - NOT_DECLARED:
            sources = {normalized(distribution) for distribution in distributions.get(name, [name])}
            assert sources & declared, f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not declare"


def test_pins_are_within_the_declared_ranges():
    """requirements.txt and requirements.lock install what pyproject.toml asks for."""
    pins = {}
    for file in ("requirements.lock", "requirements.txt"):
        for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / file).read_text(encoding="utf-8"), re.M):
            pins[normalized(name)] = version
    for requirement in [*DEPENDENCIES, *(requirement for extra in EXTRAS.values() for requirement in extra)]:
        version = pins[normalized(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} does not allow {version}"


IMPORT_ALL = """
import importlib, sys
for name in {optional!r}:
    sys.modules[name] = None  # as if it were not installed
for name in {modules!r}:
    importlib.import_module(name)
"""


def test_core_without_extras():
    """Only the modules of sentence embeddings need an extra to be imported."""
    names = []
    for path in MODULES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if "metrics" not in parts and name not in NEED_SENTENCE_TRANSFORMERS:
            names.append(name)
    code = IMPORT_ALL.format(optional=OPTIONAL, modules=names)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.slow
def test_installed_wheel(corpus, tokenizers, tmp_path):
    """A recipe copied to another folder runs with the package from a wheel, and without this repository."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "unlabeled", source / "unlabeled", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, source]
    subprocess.run([*pip, *map(str, build)], check=True)
    (wheel,) = tmp_path.glob("unlabeled-*.whl")

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(f"{Path(pytest.__file__).parent.parent}\n")

    recipe = tmp_path / "copied" / "recipe.py"
    recipe.parent.mkdir()
    shutil.copy(ROOT / "recipes" / "pretrain_clm.py", recipe)
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), "-c", "import unlabeled; print(unlabeled.__file__)"]
    origin = subprocess.run(command, capture_output=True, text=True, cwd=recipe.parent, env=clean, check=True).stdout
    assert Path(origin.strip()).is_relative_to(site_packages)
    arguments = recipe_arguments("clm", "llama", corpus, tokenizers, tmp_path / "run", train_tokens=512)
    command = [str(python), str(recipe), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, cwd=recipe.parent, env=clean)
    assert process.returncode == 0, process.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 2
