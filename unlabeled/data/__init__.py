"""Text to batches: sources and files, tokenization, packing, conversations, preferences, labels, pairs, collators.

The functions that recipes call can be imported from here. They are loaded on first use, as torch takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlabeled.data.loading import (
        LabeledDataset,
        PreparedDataset,
        load_conversation_dataset,
        load_labeled_dataset,
        load_pair_dataset,
        load_preference_dataset,
        load_text_dataset,
    )

__all__ = [
    "LabeledDataset",
    "PreparedDataset",
    "load_conversation_dataset",
    "load_labeled_dataset",
    "load_pair_dataset",
    "load_preference_dataset",
    "load_text_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("unlabeled.data.loading"), name)
