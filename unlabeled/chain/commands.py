"""The command of each stage, and the keys that it takes.

Paths are relative to the working directory, which is the root of the repository.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unlabeled.config.stages import ARGUMENT_CLASSES
from unlabeled.errors import UserError
from unlabeled.reporting.stages import STAGE_KINDS

TAKES_FOLDER = ("merge", "evaluate", "push")  # scripts whose first argument is the folder of a model
SOURCE_LISTS = ("--train_data", "--eval_data", "--test_data")  # keys of recipes whose lists are one JSON value

_imported_keys: dict[str, list[str] | None] = {}  # by the real path of the recipe


def stage_files() -> dict[str, str]:
    """The recipe or script of each kind of stage; a file that a user adds to recipes/ is a kind as well."""
    files = {kind.name: kind.file for kind in STAGE_KINDS.values()}
    recipes = {path.stem: f"recipes/{path.name}" for path in sorted(Path("recipes").glob("*.py"))}
    return files | recipes


def is_recipe(kind: str) -> bool:
    return stage_files()[kind].startswith("recipes/")


def stage_options(kinds: Iterable[str]) -> dict[str, dict[str, str] | None]:
    """The keys that each kind of stage takes, with the option of the command line for each.

    A value is None if the recipe cannot be imported: it will say so itself when it runs.

    Raises:
        UserError: the file of a stage is missing.
    """
    kinds = sorted(set(kinds))
    files = stage_files()
    for kind in kinds:
        if not os.path.exists(files[kind]):
            raise UserError(f"{files[kind]} is missing; leave out the stages of kind {kind}")
    recipes = [files[kind] for kind in kinds if is_recipe(kind)]
    if "prepare" in kinds:
        recipes += [files[recipe] for recipe in ARGUMENT_CLASSES if recipe.startswith("pretrain")]
    keys_of_recipe = import_recipe_keys(sorted(set(recipes)))
    options: dict[str, dict[str, str] | None] = {}
    for kind in kinds:
        if is_recipe(kind):
            keys = keys_of_recipe[files[kind]]
            options[kind] = None if keys is None else {key: f"--{key}" for key in ("env", *keys)}
        elif kind == "prepare":
            all_keys = {key for keys in keys_of_recipe.values() for key in keys or ()}
            options[kind] = {key: f"--{key}" for key in ("env", "objective", *sorted(all_keys))}
        else:
            options[kind] = script_options(kind, files[kind])
    return options


def script_options(kind: str, file: str) -> dict[str, str]:
    """The keys of a script, from its calls of `add_argument`."""
    text = Path(file).read_text(encoding="utf-8")
    names = re.findall(r"add_argument\(\s*\"--([\w-]+)\"", text)
    options = {name.replace("-", "_"): f"--{name}" for name in names}
    if kind in TAKES_FOLDER:
        options["folder"] = "folder"
    return options


def import_recipe_keys(files: list[str]) -> dict[str, list[str] | None]:
    """The keys of recipes by file; see `recipe_keys`. Each file is imported once, all in one other process."""
    new_files = [file for file in files if os.path.realpath(file) not in _imported_keys]
    if new_files:
        command = [sys.executable, "-m", "unlabeled.chain.recipe_keys", *new_files]
        process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        try:
            keys = json.loads(process.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            keys = dict.fromkeys(new_files)
        for file in new_files:
            _imported_keys[os.path.realpath(file)] = keys[file]
    return {file: _imported_keys[os.path.realpath(file)] for file in files}


def stage_command(accelerate: str, stage: Any, options: dict[str, str] | None) -> list[str]:
    """The command that runs a stage.

    Args:
        accelerate: the configuration file of `accelerate launch`, for recipes.
        stage: a `ChainStage` whose inputs are known.
        options: of `stage_options`.
    """
    words = [relative_path(sys.executable)]
    if is_recipe(stage.kind):
        words += ["-m", "accelerate.commands.launch", "--quiet", "--config_file", accelerate]
    words.append(stage_files()[stage.kind])
    if stage.kind in TAKES_FOLDER:
        words.append(stage.values["folder"])
    if stage.config:
        words += ["--config", stage.config]
    uses_argparse = not is_recipe(stage.kind) and stage.kind != "prepare"
    for key, value in (stage.inputs | stage.overrides).items():
        if key != "folder":
            option = (options or {}).get(key, f"--{key}")
            words += command_words(option, value, is_flag=uses_argparse)
    if stage.kind == "prepare":
        words += ["--prepared_dir", stage.folder]
    elif stage.kind != "push":
        words += ["--output_dir", stage.folder]
    return words


def command_words(option: str, value: Any, is_flag: bool) -> list[str]:
    """A key and its value as words of the command line.

    Args:
        is_flag: whether true is an option without a value. The parser of the recipes takes `--KEY true`.
    """
    if isinstance(value, bool) or value is None:
        if not is_flag:
            return [option, json.dumps(value)]
        return [option] if value else []
    if isinstance(value, dict):
        return [option, json.dumps(value)]
    if isinstance(value, list):
        if option in SOURCE_LISTS and not is_flag:
            return [option, json.dumps(value)]
        return [option, *map(str, value)]
    return [option, str(value)]


def relative_path(path: str | Path) -> str:
    """A path as a YAML has it: relative to the repository if it is inside."""
    path = os.path.abspath(path)
    root = os.getcwd()
    return os.path.relpath(path, root) if path.startswith(f"{root}{os.sep}") else path
