"""Compares the files of a run with those of an undisturbed run, ignoring times."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# The commit, and values that depend on time or on the memory of the process (`reported` is a hash of such values).
VARYING_KEY = re.compile(r"seconds|runtime|per_second|memory|mfu|^lines$|^at$|^reported$|^git$")
# Their content comes from files that are compared, and from times.
NOT_COMPARED = {"README.md", "report.html"}
# A killed process leaves its lock file behind; the next one overwrites it.
LOCK_FILE = re.compile(r"\..+\.lock")


def list_paths(folder: Path) -> list[Path]:
    """All files and folders below a folder, sorted, without locks."""
    return [path for path in sorted(folder.rglob("*")) if not LOCK_FILE.fullmatch(path.name)]


def read_batches(log: Path) -> list[tuple[str, int, str]]:
    """(output folder, step, hash of the tensors) of each micro-batch, in order."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [(run, int(step), digest) for run, step, digest in (line.split() for line in lines)]


def without_times(value: Any) -> Any:
    """A JSON value without the entries that vary between equal runs."""
    if isinstance(value, dict):
        return {key: without_times(entry) for key, entry in value.items() if not VARYING_KEY.search(key)}
    if isinstance(value, list):
        return [without_times(entry) for entry in value]
    return value


def read_content(file: Path, folder: Path) -> Any:
    """The content to compare: bytes, or JSON without times and with a placeholder for the folder."""
    if file.name in NOT_COMPARED or file.parent.name == "logs":
        return None
    data = file.read_bytes()
    if file.suffix == ".json":
        text = data.decode("utf-8").replace(str(folder), "FOLDER")
        if folder.is_relative_to(ROOT):  # the lineage contains paths relative to the repository
            text = text.replace(str(folder.relative_to(ROOT)), "FOLDER")
        value = json.loads(text)
        if file.name == "complete.json":  # the hashes of files that contain times differ
            return sorted(value)
        return without_times(value)
    return data


def read_folder(folder: Path) -> dict[str, object]:
    """The content of all files and the names of all folders below a folder, by path."""
    return {
        str(path.relative_to(folder)): read_content(path, folder) if path.is_file() else "folder"
        for path in list_paths(folder)
    }


def find_difference(folder: Path, expected: dict[str, object]) -> str | None:
    """The first difference between a folder and `expected`, the result of `read_folder` for another one, or None."""
    paths = {str(path.relative_to(folder)) for path in list_paths(folder)}
    left_over = sorted(paths - expected.keys())
    if left_over:
        return f"left over: {', '.join(left_over[:3])}"
    missing = sorted(expected.keys() - paths)
    if missing:
        return f"missing: {', '.join(missing[:3])}"
    for path, content in expected.items():
        file = folder / path
        try:
            actual = read_content(file, folder) if file.is_file() else "folder"
        except ValueError:
            return f"different: {path} is not JSON"
        if actual != content:
            return f"different: {path}{describe_difference(actual, content)}"
    return None


def describe_difference(actual: Any, expected: Any) -> str:
    """Where two JSON values first differ, and how; empty for bytes."""
    if isinstance(actual, dict) and isinstance(expected, dict):
        for key in sorted(actual.keys() | expected.keys()):
            if actual.get(key) != expected.get(key):
                return f" {key}{describe_difference(actual.get(key), expected.get(key))}"
    if isinstance(actual, list) and isinstance(expected, list) and len(actual) == len(expected):
        for index, (actual_item, expected_item) in enumerate(zip(actual, expected, strict=True)):
            if actual_item != expected_item:
                return f" {index}{describe_difference(actual_item, expected_item)}"
    if isinstance(actual, bytes) or isinstance(expected, bytes):
        return ""
    return f": {str(actual)[:60]}, not {str(expected)[:60]}"
