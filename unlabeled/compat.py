"""Every use of a private or undocumented part of a library, with the reason why no public one exists."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def without_zero3_sharding() -> AbstractContextManager:
    """Inside this context transformers does not shard a new model, although ZeRO-3 is configured.

    transformers enters it itself for models inside models. `set_zero3_state` is not documented, and there is no other
    way to make a whole model under ZeRO-3. Since transformers 4.50.
    """
    from transformers.modeling_utils import set_zero3_state

    return set_zero3_state()


def attention_implementation(config: PreTrainedConfig) -> str:
    """The attention implementation that a model's configuration was loaded with, such as "sdpa".

    transformers documents the argument `attn_implementation`, but reads it back from this private property only. Since
    transformers 4.36.
    """
    return config._attn_implementation
