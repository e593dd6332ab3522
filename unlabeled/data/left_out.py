"""Reasons for which documents, conversations and pairs are left out of a data set, and sentences about them."""

import statistics
from collections.abc import Mapping, Sequence

EMPTY_TEXT = "empty text"
TOO_LONG = "longer than max_length"


def join_reasons(left_out: Mapping[str, int]) -> str:
    """The counts by reason, for the middle of a sentence: `3 with an empty answer, 1 with empty text`."""
    return ", ".join(f"{count} with {reason}" for reason, count in left_out.items())


def describe_lengths(lengths: Sequence[int]) -> str:
    """The lengths in tokens of rows that are too long, for the end of a sentence."""
    return f"the shortest has {min(lengths)} tokens, half of them have {statistics.median_low(lengths)} or fewer"
