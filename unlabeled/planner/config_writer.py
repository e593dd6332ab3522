"""A plan as a YAML file that recipes/pretrain_clm.py runs as it is."""

from pathlib import Path
from typing import Any

import yaml

from unlabeled.errors import UserError
from unlabeled.planner.options import PlanOptions
from unlabeled.planning.formatting import format_duration

LARGEST_DEFAULT_MICRO_BATCH = 16  # where the memory of the device is not known
MODEL_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
)


def check_writable_plan(options: PlanOptions) -> None:
    """Raise `UserError` unless the plan of these options can be written as a YAML file."""
    if options.config or not (options.data and options.tokenizer):
        raise UserError("--write needs --data and --tokenizer for the YAML to run as it is, and no --config")


def write_recipe_config(path: str, plan: dict[str, Any], options: PlanOptions, command: str) -> None:
    """Write the YAML file of a recommended run.

    Args:
        path: The file to write.
        plan: The plan, from `make_plan`.
        options: The options of the plan.
        command: The command that made the plan, for a comment in the file.

    Raises:
        UserError: The file exists already, or cannot be written.
    """
    file = Path(path)
    if file.exists():
        raise UserError(f"--write {file} exists; name another file")
    expected = f", {format_duration(plan['time']['seconds'])} expected" if plan["time"] else ""
    comment = f"# Planned{expected}; not yet measured.\n# {command}\n"
    output_dir = f"outputs/{file.parent.name}/{file.stem}"
    keys = recipe_keys(plan, options) | {"output_dir": output_dir}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(comment + yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--write {file} cannot be written: {error.strerror}; name another file") from error


def recipe_keys(plan: dict[str, Any], options: PlanOptions) -> dict[str, Any]:
    """The keys of the YAML file, in the order in which they are written."""
    fit = plan["in_memory"] or {}
    keys = {
        "model_type": "llama",
        "config_overrides": {name: plan["model"][name] for name in MODEL_SIZES},
        "tokenizer_name_or_path": options.tokenizer,
        "train_data": options.data,
        "eval_fraction": 0.01,
        "max_length": plan["max_length"],
        "train_tokens": plan["steps"] * plan["batch_tokens"],
        "batch_tokens": plan["batch_tokens"],
        "per_device_train_batch_size": fit.get("per_device_train_batch_size") or _default_micro_batch(plan),
        "learning_rate": plan["learning_rate"],
        **plan["schedule"],
        "max_grad_norm": 1.0,
    }
    if fit.get("activation_checkpointing"):
        keys["activation_checkpointing"] = True
    keys |= {
        "logging_steps": max(plan["steps"] // 100, 1),
        "eval_strategy": "steps",
        "eval_steps": 0.25,
        "save_steps": plan["time"]["save_steps"] if plan["time"] else max(plan["steps"] // 10, 1),
        "save_total_limit": 2,
    }
    return keys


def _default_micro_batch(plan: dict[str, Any]) -> int:
    """The largest micro-batch of at most 16 rows that divides the rows of a process."""
    rows = plan["batch_tokens"] // plan["max_length"] // plan["gpus"]
    return max(size for size in range(1, min(rows, LARGEST_DEFAULT_MICRO_BATCH) + 1) if rows % size == 0)
