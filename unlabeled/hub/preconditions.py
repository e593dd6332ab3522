"""Checks before training of whether the Hub will take what `push_to_hub` will push."""

import os
from pathlib import Path

from transformers import TrainingArguments

from unlabeled.errors import UserError
from unlabeled.hub.client import check_token
from unlabeled.runtime.files import read_json_object
from unlabeled.runtime.model_folders import check_model_folder


def check_push(args: TrainingArguments) -> None:
    """Raise `UserError`, as `check_token` does, if a run would fail to push when it has trained."""
    if args.push_to_hub and not args.process_index:
        check_token(args.hub_token, ", or set push_to_hub to false")


def check_push_of_own_base(args: TrainingArguments) -> None:
    """Raise `UserError` if a run would push an adapter whose base model lies inside the folder of the adapter."""
    if args.push_to_hub:
        raise UserError(
            "push_to_hub: the base model of this adapter has a new head or new tokens, so it is saved in the folder of "
            "the adapter, where nobody else has it; set adapter: none, or push_to_hub: false"
        )


def check_adapter_base(base: str) -> None:
    """Raise `UserError` if the base model of an adapter is a local folder, which nobody else can load."""
    if os.path.exists(base) or base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise UserError(
            f"an adapter cannot be pushed while its base model is the folder {base}; push the base first and train on "
            "its repository, or merge the adapter and push that"
        )


def check_finished(folder: Path) -> None:
    """Raise `UserError` unless a folder holds a finished model or adapter that others can load."""
    adapter = folder / "adapter_config.json"
    if not (folder / "config.json").is_file() and not adapter.is_file():
        raise UserError(f"{folder} holds no model; name the output_dir of a finished run")
    if (folder / "run.json").exists() and not (folder / "metrics.json").exists():
        raise UserError(f"{folder} holds an unfinished run; run its command again to finish it")
    check_model_folder(folder)
    if adapter.is_file():
        settings = read_json_object(adapter, "train or export it again")
        check_adapter_base(str(settings.get("base_model_name_or_path") or ""))
