"""Names of the tensors in a model folder's weight files, and the prefix that wrappers put before them."""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unlabeled.errors import UserError

# What `torch.compile` and DistributedDataParallel put before the name of each weight of the model that they wrap.
WRAPPER_PREFIX = re.compile(r"^(?:_orig_mod\.|module\.)+")
INDEX_NAME = "model.safetensors.index.json"


def tensor_names(folder: str) -> dict[Path, list[str]]:
    """The names of the tensors in each weight file of a local folder; empty for a model name on the Hub."""
    if not os.path.isdir(folder):
        return {}
    names: dict[Path, list[str]] = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names[file] = list(tensors.keys())
    return names


def has_wrapper_prefix(folder: str) -> bool:
    """Whether any weight of a local folder is named as in a wrapped model."""
    return any(WRAPPER_PREFIX.match(name) for names in tensor_names(folder).values() for name in names)


@contextmanager
def without_wrapper_prefix(name_or_path: str) -> Iterator[str]:
    """Yield a folder whose weights have no wrapper prefix.

    This is `name_or_path` itself, or a temporary copy with renamed weights if all of them have the prefix.
    `from_pretrained(key_mapping=...)` cannot do it: `save_pretrained` would apply the mapping backwards.

    Raises:
        UserError: only some of the weights have the prefix.
    """
    names_by_file = tensor_names(name_or_path)
    names = [name for file_names in names_by_file.values() for name in file_names]
    wrapped = [name for name in names if WRAPPER_PREFIX.match(name)]
    if not wrapped:
        yield name_or_path
        return
    if len(wrapped) < len(names):
        raise UserError(
            f"model_name_or_path {name_or_path}: {len(wrapped)} of its {len(names)} weights are named as in a wrapped "
            f"model, such as {wrapped[0]}; save the model inside the wrapper again"
        )
    with tempfile.TemporaryDirectory(prefix="unwrapped-") as folder:
        _copy_without_prefix(Path(name_or_path).resolve(), Path(folder), names_by_file)
        yield folder


def _copy_without_prefix(source: Path, target: Path, names_by_file: dict[Path, list[str]]) -> None:
    """Link all files of a folder but its weights, which are written with new names."""
    for path in source.iterdir():
        if not path.name.endswith((".safetensors", ".safetensors.index.json")):
            os.symlink(path, target / path.name)
    weight_map = {}
    for file, names in names_by_file.items():
        tensors = load_file(file)
        renamed = {WRAPPER_PREFIX.sub("", name): tensors[name] for name in names}
        save_file(renamed, target / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(renamed, file.name)
    if len(names_by_file) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (target / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
