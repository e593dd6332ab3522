"""The keys that a YAML file and the command line take: dataclasses, and the parser that reads them.

Names are imported when they are first used, since most of these classes extend those of transformers, TRL and
sentence-transformers, which take seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlabeled.config.data import DataArguments, SourceArguments, TaskArguments
    from unlabeled.config.embedding import EmbedArguments
    from unlabeled.config.model import AdapterArguments, FineTuningArguments, ModelArguments
    from unlabeled.config.objectives import FIMArguments, MaskingArguments, SpanArguments
    from unlabeled.config.parser import parse_arguments
    from unlabeled.config.training import BudgetArguments, PretrainingArguments
    from unlabeled.config.tuning import DownstreamArguments, DPOArguments, SFTArguments, TuningArguments

__all__ = [
    "AdapterArguments",
    "BudgetArguments",
    "DPOArguments",
    "DataArguments",
    "DownstreamArguments",
    "EmbedArguments",
    "FIMArguments",
    "FineTuningArguments",
    "MaskingArguments",
    "ModelArguments",
    "PretrainingArguments",
    "SFTArguments",
    "SourceArguments",
    "SpanArguments",
    "TaskArguments",
    "TuningArguments",
    "parse_arguments",
]

_MODULES = {
    "data": ("DataArguments", "SourceArguments", "TaskArguments"),
    "embedding": ("EmbedArguments",),
    "model": ("AdapterArguments", "FineTuningArguments", "ModelArguments"),
    "objectives": ("FIMArguments", "MaskingArguments", "SpanArguments"),
    "parser": ("parse_arguments",),
    "training": ("BudgetArguments", "PretrainingArguments"),
    "tuning": ("DPOArguments", "DownstreamArguments", "SFTArguments", "TuningArguments"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
