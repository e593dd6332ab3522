"""Checks of the folder of a model before a library opens it.

A library that opens a pipe waits for ever, and one that reads a configuration allocates whatever it asks for.
"""

import os
import re
from pathlib import Path
from typing import Any

from unlabeled.errors import UserError
from unlabeled.runtime.files import file_kind, read_json_object

# Files that libraries open in the folder of a model, a tokenizer or an adapter: those that hold a JSON object, and
# others.
OBJECTS = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "model.safetensors.index.json", "config_sentence_transformers.json",
)  # fmt: skip
OTHERS = (
    "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "modules.json", "tokenizer.model",
    "spiece.model", "lineage.json", "metrics.json",
)  # fmt: skip
# The largest value of the keys of config.json that match a pattern: far larger than in any published model, and small
# enough that no library loops for hours.
LIMITS = {
    r"vocab_size$": 20_000_000,
    r"layers?$": 20_000,
    r"(heads?|experts?|groups?)$": 1_000_000,
    r"(_size|_dim|^d_\w+|^n_embd|^n_inner)$": 20_000_000,
    r"^(max_position_embeddings|n_positions|n_ctx)$": 1_000_000_000,
    r"_token_id$": 20_000_000,
}
BOOLEAN_PREFIXES = ("output_", "do_", "use_", "return_")
INDEX = "model.safetensors.index.json"


def check_model_folder(folder: str | Path) -> None:
    """Check that libraries can read the folder of a model; a path that is not a folder is not checked.

    Raises:
        UserError: A file is a pipe, a device, a broken link, or not a JSON object; a number in config.json is far too
            large; an index names a weight file that does not exist or lies outside the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    remedy = "restore it from where the folder came from, or set another folder"
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder} ({error.strerror}); make it readable") from error
    for name in sorted(names):
        if name in OBJECTS or name in OTHERS or name.endswith(".safetensors"):
            _check_regular_file(folder / name, remedy)
    objects = {name: read_json_object(folder / name, remedy) for name in OBJECTS if name in names}
    for name in ("config.json", "generation_config.json"):
        check_numbers(objects.get(name, {}), str(folder / name))
        _check_types(objects.get(name, {}), str(folder / name))
    if INDEX in objects:
        _check_index(folder, objects[INDEX], remedy)


def _check_regular_file(path: Path, remedy: str) -> None:
    try:
        kind = file_kind(path)
    except OSError as error:
        reason = "a link to nothing" if path.is_symlink() else error.strerror
        raise UserError(f"cannot read {path} ({reason}); {remedy}") from error
    if kind:
        raise UserError(f"cannot read {path} (it is {kind}, and only a regular file is read); {remedy}")


def check_numbers(values: Any, source: str, key: str = "") -> None:
    """Refuse sizes in a configuration that no model has, before anything is allocated.

    Args:
        values: The configuration, or a part of it.
        source: The name of the configuration, for the message.
        key: The key of `values` if they are a part.

    Raises:
        UserError: A number is out of bounds; the message names its key.
    """
    if isinstance(values, dict):
        for name, value in values.items():
            check_numbers(value, source, str(name))
    elif isinstance(values, list):
        for value in values:
            check_numbers(value, source, key)
    elif isinstance(values, int | float) and not isinstance(values, bool):
        limit = next((limit for pattern, limit in LIMITS.items() if re.search(pattern, key)), None)
        if limit is not None and not -1 <= values <= limit:  # -1 often means none
            raise UserError(f"{source}: {key} is {values:,}, which no model has (-1 to {limit:,}); correct it")


def _check_types(values: dict[str, Any], source: str) -> None:
    """Refuse ids and switches of a wrong type, which libraries load and `generate` fails on."""
    for key, value in values.items():
        items = value if isinstance(value, list) else [value]
        if key.endswith("_token_id") and not all(item is None or type(item) is int for item in items):
            raise UserError(f"{source}: {key} is {value!r}, not an id of a token; correct it")
        if key.startswith(BOOLEAN_PREFIXES) and not isinstance(value, bool | None):
            raise UserError(f"{source}: {key} is {value!r}, not true or false; correct it")


def _check_index(folder: Path, index: dict[str, Any], remedy: str) -> None:
    path = folder / INDEX
    files = index.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{path} has no weight_map of names of files; {remedy}")
    is_adapter = (folder / "adapter_config.json").exists()  # its base model names other files
    for file in dict.fromkeys(files.values()):
        if os.path.isabs(file) or ".." in Path(file).parts:
            raise UserError(f"{path} names {file}, which lies outside of the folder; {remedy}")
        if not is_adapter and not (folder / file).is_file():
            raise UserError(f"{path} names {file}, which is not there; {remedy}")
