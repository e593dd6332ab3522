"""Whether what a run left behind equals what an undisturbed run left, but for times."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The commit, and figures that depend on the clock or on the memory of the process (`reported` is a hash of such ones).
VARYING_KEY = re.compile(r"seconds|runtime|per_second|memory|mfu|^lines$|^at$|^reported$|^git$")
# Their content is taken from files that are compared, and from times.
NOT_COMPARED = {"README.md", "report.html"}
# What the next process that takes a lock writes over; a killed one leaves it.
LOCK_FILE = re.compile(r"\..+\.lock")


def list_paths(folder: Path) -> list[Path]:
    """Every file and folder below a folder, in order, but for locks."""
    return [path for path in sorted(folder.rglob("*")) if not LOCK_FILE.fullmatch(path.name)]


def read_batches(log: Path) -> list[tuple[str, int, str]]:
    """(output_dir, step, hash of the tensors) of each micro-batch, in order."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [(run, int(step), digest) for run, step, digest in (line.split() for line in lines)]


def without_times(value):
    """A value of JSON without the entries that vary between equal runs."""
    if isinstance(value, dict):
        return {key: without_times(entry) for key, entry in value.items() if not VARYING_KEY.search(key)}
    if isinstance(value, list):
        return [without_times(entry) for entry in value]
    return value


def read_content(file: Path, folder: Path):
    """What is compared of a file: its bytes, or JSON without times and without the name of the folder."""
    if file.name in NOT_COMPARED or file.parent.name == "logs":
        return None
    data = file.read_bytes()
    if file.suffix == ".json":
        text = data.decode("utf-8").replace(str(folder), "FOLDER")
        if folder.is_relative_to(ROOT):  # a lineage has paths relative to the repository
            text = text.replace(str(folder.relative_to(ROOT)), "FOLDER")
        value = json.loads(text)
        if file.name == "complete.json":  # the hashes of files with times in them differ
            return sorted(value)
        return without_times(value)
    return data


def read_folder(folder: Path) -> dict[str, object]:
    """Content of every file and name of every folder below a folder, by its path."""
    return {
        str(path.relative_to(folder)): read_content(path, folder) if path.is_file() else "folder"
        for path in list_paths(folder)
    }


def find_difference(folder: Path, expected: dict[str, object]) -> str | None:
    """The first difference between a folder and what `read_folder` returned for another, or None."""
    paths = {str(path.relative_to(folder)) for path in list_paths(folder)}
    if left_over := sorted(paths - expected.keys()):
        return f"left over: {', '.join(left_over[:3])}"
    if missing := sorted(expected.keys() - paths):
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


def describe_difference(actual, expected) -> str:
    """Where two values of JSON differ first, and how; empty for bytes."""
    if isinstance(actual, dict) and isinstance(expected, dict):
        for key in sorted(actual.keys() | expected.keys()):
            if actual.get(key) != expected.get(key):
                return f" {key}{describe_difference(actual.get(key), expected.get(key))}"
    if isinstance(actual, list) and isinstance(expected, list) and len(actual) == len(expected):
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            if one != other:
                return f" {i}{describe_difference(one, other)}"
    if isinstance(actual, bytes) or isinstance(expected, bytes):
        return ""
    return f": {str(actual)[:60]}, not {str(expected)[:60]}"
