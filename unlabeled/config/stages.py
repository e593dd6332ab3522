"""The argument classes of each recipe: one table for the planner, the chain and the tests.

The table holds names, because most classes extend those of transformers or TRL, which take seconds to import.
"""

from dataclasses import Field, fields
from typing import Any, get_type_hints

from unlabeled import config

ARGUMENT_CLASSES = {
    "pretrain_clm": ("ModelArguments", "DataArguments", "FIMArguments", "PretrainingArguments"),
    "pretrain_mlm": ("ModelArguments", "DataArguments", "MaskingArguments", "PretrainingArguments"),
    "pretrain_span": ("ModelArguments", "DataArguments", "SpanArguments", "PretrainingArguments"),
    "sft": ("FineTuningArguments", "SourceArguments", "SFTArguments"),
    "dpo": ("FineTuningArguments", "SourceArguments", "DPOArguments"),
    "classify": ("AdapterArguments", "TaskArguments", "DownstreamArguments"),
    "tag": ("AdapterArguments", "TaskArguments", "DownstreamArguments"),
    "embed": ("AdapterArguments", "SourceArguments", "EmbedArguments"),
}


def argument_classes(recipe: str) -> tuple[type, ...]:
    """Import the dataclasses that a recipe parses, in the order in which it names them."""
    return tuple(getattr(config, name) for name in ARGUMENT_CLASSES[recipe])


def argument_fields(recipe: str) -> dict[str, Field]:
    """The keys that a YAML of a recipe may have, each with the dataclass field that defines its type and default."""
    return {field.name: field for cls in argument_classes(recipe) for field in fields(cls) if field.init}


def argument_types(recipe: str) -> dict[str, Any]:
    """The type annotation of each key of a recipe.

    `Field.type` would not do: transformers' HfArgumentParser overwrites it with the type that argparse converts to.
    """
    return {name: hint for cls in argument_classes(recipe) for name, hint in get_type_hints(cls).items()}
