"""`lineage.json`: where a model comes from, so that every figure can be traced.

It is pushed with the model, so it holds neither a path of the machine nor the name of a user; see `portable`.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

from unlabeled.errors import UserError
from unlabeled.reporting.stages import stage_of_objective
from unlabeled.reporting.versions import git_state, installed_versions
from unlabeled.runtime.files import file_sha256, read_json_object

REPOSITORY = Path(__file__).resolve().parents[2]
# The keys of a lineage that are read later, and their types.
LINEAGE_KEYS = {"stage": str, "configuration": dict, "data": dict, "plan": dict, "metrics": dict}


def make_lineage(configuration: dict, manifest: dict, plan: dict, metrics: dict, parent: dict | None) -> dict:
    """The record of a stage, with the record of its parent inside. It holds no path of this machine.

    Args:
        configuration: the arguments that are not the defaults, with `objective`.
        manifest: of the prepared data.
        plan: of `make_run_plan`.
        metrics: as in `metrics.json`.
        parent: of `parent_of`.
    """
    data = {key: manifest[key] for key in ("splits", "fingerprint", "tokenizer")}
    for split in ("train", "evaluation"):
        data[split] = [portable(with_licence(source)) for source in manifest[split]]
    return {
        "stage": stage_of_objective(configuration["objective"]),
        "parent": portable(parent),
        "configuration": portable(configuration),
        "data": data,
        "plan": {key: portable(value) for key, value in plan.items() if key != "lines"},
        "metrics": metrics,
        "versions": installed_versions(),
        "git": git_state(),
    }


def read_lineage(path: Path) -> dict:
    """Read the record of a stage, with the records of its parents inside.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    remedy = "restore it, or remove it to go on from a model of unknown origin"
    lineage = read_json_object(path, remedy)

    def refuse(key: str, value: Any) -> None:
        raise UserError(f"{path} is no lineage, as {key} in it is {str(value)[:60]!r}; {remedy}")

    record = lineage
    while record is not None:
        for key, kind in LINEAGE_KEYS.items():
            if not isinstance(record.get(key), kind):
                refuse(key, record.get(key))
        parent = record.get("parent")
        if not isinstance(parent, dict | None):
            refuse("parent", parent)
        record = parent.get("lineage") if parent else None
        if not isinstance(record, dict | None):
            refuse("parent.lineage", record)
    return lineage


def list_stages(lineage: dict) -> list[dict]:
    """The records of all stages of a lineage, from the first to the last."""
    stages = []
    record: dict | None = lineage
    while record:
        stages.append(record)
        record = (record.get("parent") or {}).get("lineage")
    return stages[::-1]


def parent_of(model_name_or_path: str | None) -> dict | None:
    """The model that a stage starts from: its name, hashes of its weights and, if it has one, its lineage."""
    if model_name_or_path is None:
        return None
    parent: dict = {"name_or_path": model_name_or_path}
    if os.path.isdir(model_name_or_path):
        parent["weights"] = weights_sha256(model_name_or_path)
        lineage = Path(model_name_or_path, "lineage.json")
        if lineage.exists():
            parent["lineage"] = read_lineage(lineage)
    return parent


def weights_sha256(folder: str) -> dict[str, str]:
    """The sha256 of each weight file of a local folder."""
    files = sorted(Path(folder).glob("*.safetensors"))
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return dict(zip((file.name for file in files), pool.map(file_sha256, files), strict=True))


def with_licence(source: dict) -> dict:
    """Add the licence to a source if a README.md beside its files has a line `Licence: ...`."""
    path = Path(source["path"])
    readme = (path if path.is_dir() else path.parent) / "README.md"
    if "files" not in source or not readme.is_file():
        return source
    match = re.search(r"^Licence: (.+)$", readme.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return source | {"licence": match[1].strip()} if match else source


def non_default_arguments(*arguments: Any) -> dict:
    """The keys of dataclasses whose values are not the defaults. Tokens are secrets and left out."""
    values = {}
    for instance in arguments:
        for field in fields(instance):
            value = getattr(instance, field.name)
            if not field.init or value == field.default or field.name.endswith("_token"):
                continue
            if isinstance(value, str | int | float | bool | list | dict):
                values[field.name] = getattr(value, "value", value)
    return values


def portable(value: Any) -> Any:
    """Make the paths in a value, or in a structure of values, relative to the repository or the working directory.

    Of a path outside of both only the last part is kept. Names of the Hub and relative paths stay as they are.
    """
    if isinstance(value, dict):
        return {portable(key): portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if not isinstance(value, str | Path):
        return value
    path = Path(value)
    leaves_working_directory = path.is_absolute() or ".." in path.parts or path.parts[:1] == ("~",)
    return _shorten_path(path) if leaves_working_directory else value


def _shorten_path(path: Path) -> str:
    absolute = Path(os.path.abspath(path.expanduser()))
    home = Path.home()
    for base in (REPOSITORY, Path.cwd()):
        base_contains_home = home != base and home.is_relative_to(base)  # the rest would name the user
        if absolute.is_relative_to(base) and not base_contains_home:
            return str(absolute.relative_to(base))
    return absolute.name
