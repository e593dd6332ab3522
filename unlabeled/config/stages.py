"""The argument classes of each recipe: one table for the planner, the chain and the tests.

The table holds dotted names, because most classes extend those of transformers or TRL, which take seconds to import.
"""

from dataclasses import Field, fields
from importlib import import_module

_CONFIG = "unlabeled.config.arguments"
ARGUMENT_CLASSES = {
    "pretrain_clm": (
        f"{_CONFIG}.ModelArguments",
        f"{_CONFIG}.DataArguments",
        "unlabeled.data.fim.FIMArguments",
        f"{_CONFIG}.PretrainingArguments",
    ),
    "pretrain_mlm": (
        f"{_CONFIG}.ModelArguments",
        f"{_CONFIG}.DataArguments",
        "unlabeled.data.collators.MaskingArguments",
        f"{_CONFIG}.PretrainingArguments",
    ),
    "pretrain_span": (
        f"{_CONFIG}.ModelArguments",
        f"{_CONFIG}.DataArguments",
        "unlabeled.data.collators.SpanArguments",
        f"{_CONFIG}.PretrainingArguments",
    ),
    "sft": (
        f"{_CONFIG}.FineTuningArguments",
        f"{_CONFIG}.SourceArguments",
        f"{_CONFIG}.SFTArguments",
    ),
    "dpo": (
        f"{_CONFIG}.FineTuningArguments",
        f"{_CONFIG}.SourceArguments",
        f"{_CONFIG}.DPOArguments",
    ),
    "classify": (
        f"{_CONFIG}.AdapterArguments",
        "unlabeled.data.labels.TaskArguments",
        "unlabeled.data.labels.DownstreamArguments",
    ),
    "tag": (
        f"{_CONFIG}.AdapterArguments",
        "unlabeled.data.labels.TaskArguments",
        "unlabeled.data.labels.DownstreamArguments",
    ),
    "embed": (
        f"{_CONFIG}.AdapterArguments",
        f"{_CONFIG}.SourceArguments",
        "unlabeled.training.embedding.EmbedArguments",
    ),
}


def argument_classes(recipe: str) -> tuple[type, ...]:
    """Import the dataclasses that a recipe parses, in the order in which it names them."""
    classes = []
    for path in ARGUMENT_CLASSES[recipe]:
        module, _, name = path.rpartition(".")
        classes.append(getattr(import_module(module), name))
    return tuple(classes)


def argument_fields(recipe: str) -> dict[str, Field]:
    """The keys that a YAML of a recipe may have, each with the dataclass field that defines its type and default."""
    return {field.name: field for cls in argument_classes(recipe) for field in fields(cls) if field.init}
