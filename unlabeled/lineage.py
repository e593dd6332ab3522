"""`lineage.json`: what a model comes from, so that every figure beside it can be traced and repeated."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

from unlabeled.corpus import file_sha256

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "deepspeed", "trl", "peft")


def versions() -> dict[str, str]:
    """Installed versions of what determines a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, str | bool] | None:
    """Commit of the code that runs and whether files differ from it; None outside a repository."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def weights_sha256(folder: str) -> dict[str, str]:
    """sha256 of each weight file of a local folder."""
    return {path.name: file_sha256(str(path)) for path in sorted(Path(folder).glob("*.safetensors"))}


def parent_of(model_name_or_path: str | None) -> dict | None:
    """The model that a stage started from: its name, its weights and, where it has one, its own lineage."""
    if model_name_or_path is None:
        return None
    parent: dict = {"name_or_path": model_name_or_path}
    if os.path.isdir(model_name_or_path):
        parent["weights"] = weights_sha256(model_name_or_path)
        lineage = Path(model_name_or_path, "lineage.json")
        if lineage.exists():
            parent["lineage"] = json.loads(lineage.read_text(encoding="utf-8"))
    return parent


def make_lineage(
    stage: str, configuration: dict, manifest: dict, plan: dict, metrics: dict, parent: dict | None, git: dict | None
) -> dict:
    """The record of one stage, with that of its parent inside."""
    return {
        "stage": stage,
        "parent": parent,
        "configuration": configuration,
        "data": {key: manifest[key] for key in ("train", "evaluation", "splits", "fingerprint", "tokenizer")},
        "plan": {key: value for key, value in plan.items() if key != "lines"},
        "metrics": metrics,
        "versions": versions(),
        "git": git,
    }
