"""The stages of a chain: what its YAML says about each, and whether a stage is finished."""

import os
import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from unlabeled.chain.commands import is_recipe, stage_files
from unlabeled.errors import UserError
from unlabeled.hub.push_record import pushed_to
from unlabeled.runtime.files import read_small_file
from unlabeled.runtime.secrets import check_no_secret, yaml_problem

# Files that a finished stage has in its folder. The recipes write metrics.json last.
FINISHED_FILES = {
    "tokenizer": ["tokenizer.json"],
    "prepare": ["*/manifest.json"],
    "merge": ["*.safetensors"],
    "evaluate": ["*"],
    "push": [],
}
RECIPE_FILES = ["metrics.json", "*.safetensors"]


@dataclass
class ChainStage:
    """A stage of a chain.

    Attributes:
        number: its place in the chain, from 1.
        kind: the recipe or script that runs it; see `STAGE_KINDS`.
        config: the YAML of the recipe, if the chain names one.
        overrides: the keys that the chain's YAML sets.
        keys: the same with those of `config` underneath.
        folder: where the stage writes.
        inputs: the keys that name folders of earlier stages. None takes back the value of `config`.
        state: "to do", "done", "interrupted" or "changed".
        reason: why the stage is in that state.
        parts: what the fingerprint is computed from; see `ContentHashes.stage_parts`.
    """

    number: int
    kind: str
    name: str
    config: str | None
    overrides: dict[str, Any]
    keys: dict[str, Any]
    folder: str
    inputs: dict[str, str | None] = field(default_factory=dict)
    state: str = "to do"
    reason: str = ""
    parts: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        """All keys that have a value."""
        return {key: value for key, value in (self.keys | self.inputs).items() if value not in (None, "null")}

    @property
    def label(self) -> str:
        return f"{self.number}-{self.name}"

    @property
    def missing_files(self) -> str:
        """The files of a finished stage that are not in the folder."""
        patterns = FINISHED_FILES.get(self.kind, RECIPE_FILES)
        return " and ".join(pattern for pattern in patterns if not any(Path(self.folder).glob(pattern)))

    @property
    def has_to_push(self) -> bool:
        """Whether `push_to_hub` of a recipe asks for a push that is not recorded in the folder."""
        if not is_recipe(self.kind) or str(self.values.get("push_to_hub")).lower() != "true":
            return False
        name = self.values.get("hub_model_id") or os.path.basename(self.folder)
        return pushed_to(self.folder, name, self.values.get("hub_revision")) is None


def read_stages(path: str, folder: str, items: list) -> list[ChainStage]:
    """Read the list of stages of a chain.

    Args:
        path: the chain's YAML, for messages.
        folder: the folder of the chain, in which each stage gets one.
        items: what the YAML has under `stages`.

    Raises:
        UserError: a stage is not a mapping of a known kind to keys, sets what the chain decides, or has the name of
            another stage.
    """
    stages = [read_stage(path, folder, number, item) for number, item in enumerate(items, 1)]
    names = [stage.name for stage in stages]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError(f"{path}: two stages are called {repeated[0]}; give one another `name`")
    return stages


def read_stage(path: str, folder: str, number: int, item: Any) -> ChainStage:
    where = f"{path}: stage {number}"
    is_mapping = isinstance(item, dict) and len(item) == 1
    kind, overrides = next(iter(item.items())) if is_mapping else (None, None)
    if kind is None or not isinstance(overrides or {}, dict):
        raise UserError(f"{where} is no `KIND: {{KEY: VALUE, ...}}`; write it as recipes/chains/tiny.yaml does")
    check_key(where, kind, stage_files())
    overrides = dict(overrides or {})
    name = str(overrides.pop("name", kind))
    config = overrides.pop("config", None)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"{where}: name {name!r} is to name a folder; use letters, digits, '_', '-' and '.'")
    config_keys = read_yaml(config) if config else {}
    check_no_secret(where, overrides)
    check_no_secret(str(config), config_keys)
    if "env" in overrides:
        raise UserError(f"{where}: move env to the file that config names; a recipe has no such option")
    for key in ("output_dir", "prepared_dir") if kind == "prepare" else ("output_dir",):
        if key in overrides:
            raise UserError(f"{where}: remove {key}; each stage writes to a folder in that of the chain")
    return ChainStage(
        number=number,
        kind=kind,
        name=name,
        config=config,
        overrides=overrides,
        keys=config_keys | overrides,
        folder=os.path.join(folder, f"{number}-{name}"),
    )


def check_stage_keys(path: str, stage: ChainStage, options: dict[str, str] | None) -> None:
    """Raise `UserError` for a key that the stage does not take.

    Args:
        path: the chain's YAML.
        options: of `stage_options`; None if they are not known.
    """
    where = f"{path}: stage {stage.number}"
    if options is None:
        return
    for key in stage.overrides:
        check_key(where, key, options)
    for key in stage.keys:
        if key not in stage.overrides:
            check_key(str(stage.config), key, options)


def check_key(where: str, key: Any, known: Any) -> None:
    if key not in known:
        nearest = get_close_matches(str(key), list(known), 1, 0)[0]
        raise UserError(f"{where}: unknown {key!r}; did you mean {nearest!r}?")


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file of keys.

    Raises:
        UserError: the file cannot be read, is not valid YAML, or holds something else.
    """
    try:
        value = yaml.safe_load(read_small_file(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML; correct it: {yaml_problem(error)}") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"cannot read {path} ({reason}); correct it, or name another YAML file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no keys; recipes/chains/ and recipes/configs/ have examples")
    return value
