"""Small files that others wrote: configurations, templates, records. Read only where they are files, and not huge.

A library that opens a pipe waits for ever, and one that reads a configuration builds what it asks for.
"""

import errno
import json
import os
import re
import stat
from pathlib import Path

from unlabeled.errors import UserError

LIMIT_BYTES = 500_000_000  # tokenizer.json of 250,000 tokens has some 20 MB
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
# What libraries open in the folder of a model, a tokenizer or an adapter.
OBJECTS = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "model.safetensors.index.json", "config_sentence_transformers.json",
)  # fmt: skip
OTHERS = (
    "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "modules.json", "tokenizer.model",
    "spiece.model", "lineage.json", "metrics.json",
)  # fmt: skip
# The largest number that a key of config.json may have. Larger than any published model's by far, and small enough
# that nothing loops for hours.
LIMITS = {
    r"vocab_size$": 20_000_000,
    r"layers?$": 20_000,
    r"(heads?|experts?|groups?)$": 1_000_000,
    r"(_size|_dim|^d_\w+|^n_embd|^n_inner)$": 20_000_000,
    r"^(max_position_embeddings|n_positions|n_ctx)$": 1_000_000_000,
    r"_token_id$": 20_000_000,
}


def file_kind(path: str | Path) -> str | None:
    """What a path is that cannot be read like a file, for messages: "a pipe"; None for a file.

    Raises:
        OSError: there is nothing, or it may not be looked at.
    """
    mode = os.stat(path).st_mode
    return None if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "a special file")


def read_small_file(path: str | Path) -> str:
    """The text of a file.

    Raises:
        OSError: with `strerror`; it cannot be read, is no regular file, or has more than `LIMIT_BYTES`.
        UnicodeDecodeError: it is not UTF-8.
    """
    kind = file_kind(path)
    if kind == "a folder":
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if kind:
        raise OSError(errno.EINVAL, f"it is {kind}, and only a regular file is read", str(path))
    if os.path.getsize(path) > LIMIT_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {LIMIT_BYTES:,} bytes", str(path))
    return Path(path).read_text(encoding="utf-8")


def parse_json(text: str):
    """`json.loads`.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | Path):
    """The value in a JSON file.

    Raises:
        OSError, ValueError: as `read_small_file` and `parse_json` do.
    """
    return parse_json(read_small_file(path))


def read_json_object(path: str | Path, remedy: str) -> dict:
    """The mapping in a JSON file.

    Raises:
        UserError: it cannot be read, or is something else; `remedy` ends the sentence.
    """
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"not valid JSON: {' '.join(str(error).split())[:200]}"
        raise UserError(f"cannot read {path} ({reason}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not an object with keys; {remedy}")
    return value


def read_optional_json(path: str | Path) -> dict:
    """The mapping in a JSON file; empty where there is none, which is for whoever needs it to complain of."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def check_model_folder(folder: str | Path) -> None:
    """What libraries read in the folder of a model can be read, and asks for nothing that cannot be.

    Raises:
        UserError: a file is a pipe, a device, a link to nothing, or no JSON object; a number in config.json is out of
            all bounds; an index names a weight file that is not there or lies outside of the folder.
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
            _check_regular(folder / name, remedy)
    objects = {name: read_json_object(folder / name, remedy) for name in OBJECTS if name in names}
    for name in ("config.json", "generation_config.json"):
        check_numbers(objects.get(name, {}), str(folder / name))
        _check_types(objects.get(name, {}), str(folder / name))
    if "model.safetensors.index.json" in objects:
        _check_index(folder, objects["model.safetensors.index.json"], remedy)


def _check_regular(path: Path, remedy: str) -> None:
    try:
        kind = file_kind(path)
    except OSError as error:
        reason = "a link to nothing" if path.is_symlink() else error.strerror
        raise UserError(f"cannot read {path} ({reason}); {remedy}") from error
    if kind:
        raise UserError(f"cannot read {path} (it is {kind}, and only a regular file is read); {remedy}")


def check_numbers(values, where: str, key: str = "") -> None:
    """Refuse sizes in a configuration that no model has, before anything is built from them.

    Args:
        values: the configuration, or a part of it.
        where: names it in the message.
        key: of `values` where they are a part.

    Raises:
        UserError: naming the key.
    """
    if isinstance(values, dict):
        for name, value in values.items():
            check_numbers(value, where, str(name))
    elif isinstance(values, list):
        for value in values:
            check_numbers(value, where, key)
    elif isinstance(values, int | float) and not isinstance(values, bool):
        limit = next((limit for pattern, limit in LIMITS.items() if re.search(pattern, key)), None)
        if limit is not None and not -1 <= values <= limit:  # -1 often means none
            raise UserError(f"{where}: {key} is {values:,}, which no model has (-1 to {limit:,}); correct it")


def _check_types(values: dict, where: str) -> None:
    """Refuse what `generate` would stumble over: libraries load ids and switches of any type."""
    for key, value in values.items():
        items = value if isinstance(value, list) else [value]
        if key.endswith("_token_id") and not all(item is None or type(item) is int for item in items):
            raise UserError(f"{where}: {key} is {value!r}, not an id of a token; correct it")
        if key.startswith(("output_", "do_", "use_", "return_")) and not isinstance(value, bool | None):
            raise UserError(f"{where}: {key} is {value!r}, not true or false; correct it")


def _check_index(folder: Path, index: dict, remedy: str) -> None:
    path = folder / "model.safetensors.index.json"
    files = index.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{path} has no weight_map of names of files; {remedy}")
    for file in dict.fromkeys(files.values()):
        if os.path.isabs(file) or ".." in Path(file).parts:
            raise UserError(f"{path} names {file}, which lies outside of the folder; {remedy}")
        if not (folder / file).is_file() and not (folder / "adapter_config.json").exists():  # whose base says more
            raise UserError(f"{path} names {file}, which is not there; {remedy}")
