"""The versions of the code that made a result: installed packages and the commit of the repository."""

import importlib.metadata
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "deepspeed",
    "trl",
    "peft",
    "sentence-transformers",
)


def installed_versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that determine a result."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def git_state() -> dict[str, str | bool] | None:
    """The commit of the running code, and whether files differ from it (`dirty`). None outside a repository."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
