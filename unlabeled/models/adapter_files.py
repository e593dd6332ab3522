"""The configuration of a saved adapter, and where its base model is."""

import os
from pathlib import Path

from peft import PeftType, TaskType

from unlabeled import compat
from unlabeled.errors import UserError
from unlabeled.runtime.files import read_json, read_json_object
from unlabeled.runtime.model_folders import check_model_folder

MAX_RANK = 65_536
OWN_BASE = "base"  # subfolder of an adapter's folder, for a base model that is stored nowhere else
# How adapter_config.json names that folder. It holds no path of a machine, and because of the leading dot it is no
# valid name of a repository, so nothing ever asks the Hub for it.
OWN_BASE_PATH = f"./{OWN_BASE}"


def adapter_base(name_or_path: str) -> str | None:
    """The base model of an adapter, or None if `name_or_path` is not an adapter.

    A base inside the adapter's folder is found there, wherever the folder was moved to. A relative path, which earlier
    versions wrote, is looked up in the working directory, then in the folders above the adapter. A missing folder is
    never looked up on the Hub, where its name may belong to somebody else's model.

    Args:
        name_or_path: a local folder, or a name on the Hub.

    Returns:
        An existing folder, or a name on the Hub.

    Raises:
        UserError: adapter_config.json cannot be read or does not describe a supported adapter, or the base model is a
            folder that does not exist.
    """
    check_model_folder(name_or_path)
    try:
        file = compat.find_adapter_config(name_or_path)
    except OSError:  # neither a folder nor a name that the Hub knows; `load_pretrained` reports it
        return None
    if file is None:
        return None
    base = read_adapter_config(file)["base_model_name_or_path"]
    own_base = Path(file).parent / OWN_BASE
    if Path(base).name == OWN_BASE and (own_base / "config.json").is_file():
        return str(own_base)
    if base == OWN_BASE_PATH:
        raise UserError(
            f"the base model of the adapter {name_or_path} is not in {own_base}; copy it there from where the adapter "
            "was trained, or run the command of that run again"
        )
    path = os.path.expanduser(base)
    if os.path.isdir(path):
        return path
    if os.path.isdir(name_or_path) and not os.path.isabs(path):
        for parent in Path(name_or_path).resolve().parents:
            if (parent / base / "config.json").is_file():
                return str(parent / base)
    if _is_path(base) or _was_trained_on_folder(name_or_path):
        raise UserError(
            f"the base model of the adapter {name_or_path}, the folder {base}, is not there; put it back, or set "
            "base_model_name_or_path in adapter_config.json to where it is"
        )
    return base


def _is_path(base: str) -> bool:
    """Whether a base cannot be a repository of the Hub, whose name has at most one slash and no leading dot."""
    return base.startswith((".", "/", "~")) or base.count("/") > 1 or Path(base).name == OWN_BASE


def _was_trained_on_folder(adapter: str) -> bool:
    """Whether the adapter's lineage says that its base was a local folder, whose weight files it then lists."""
    try:
        weights = read_json(Path(adapter, "lineage.json"))["parent"]["weights"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return "adapter_model.safetensors" not in weights  # an adapter's own base may well be a model of the Hub


def read_adapter_config(file: str | Path) -> dict:
    """Read an adapter_config.json, and check the values that are needed to load the adapter.

    Raises:
        UserError: it cannot be read, or a key is missing or invalid.
    """
    remedy = "restore it, or set another adapter"
    config = read_json_object(file, remedy)
    base = config.get("base_model_name_or_path")
    if base is None or base == "":
        raise UserError(f"{file} names no base model, as the run that wrote it has not finished; run its command again")
    if not isinstance(base, str):
        raise UserError(f"{file}: base_model_name_or_path is {base!r}, not the name of a model; {remedy}")
    known_values = {
        "peft_type": [peft_type.value for peft_type in PeftType],
        "task_type": [None, *(task_type.value for task_type in TaskType)],
    }
    for key, values in known_values.items():
        if config.get(key) not in values:
            raise UserError(f"{file}: {key} is {config.get(key)!r}, which PEFT does not know; {remedy}")
    if config["peft_type"] != "LORA":
        # For some other types PEFT reads a tokenizer or a model without trust_remote_code=False.
        raise UserError(
            f"{file} is an adapter of type {config['peft_type']}, and only LORA is supported; set another adapter"
        )
    rank = config.get("r", 1)
    if not isinstance(rank, int) or not 0 < rank <= MAX_RANK:
        raise UserError(f"{file}: r is {rank!r}, not a rank from 1 to {MAX_RANK:,}; {remedy}")
    tokens = config.get("alora_invocation_tokens")
    if tokens is not None and not (isinstance(tokens, list) and all(type(token) is int for token in tokens)):
        raise UserError(f"{file}: alora_invocation_tokens is {tokens!r}, not a list of ids; {remedy}")
    return config


def absolute_name(base: str) -> str:
    """A name that PEFT and transformers resolve from any working directory: of the Hub, or a folder's absolute path."""
    path = os.path.expanduser(base)
    return os.path.abspath(path) if os.path.isdir(path) else base
