"""Documents of several sources mixed by weight."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import numpy as np

from unlabeled.data.left_out import EMPTY_TEXT, join_reasons
from unlabeled.data.sources import Source
from unlabeled.errors import UserError


class TokenizedDocument(Protocol):
    """What `mix` needs to know of a document: its token ids, and the reason for which it is left out, if any."""

    ids: np.ndarray
    left_out: str | None


D = TypeVar("D", bound=TokenizedDocument)


def mix(
    sources: list[Source], open_source: Callable[[Source], Iterator[D]], max_tokens: int | None
) -> Iterator[tuple[int, D]]:
    """Interleave the documents of several sources in proportion to their weights, counted in tokens.

    The next document comes from the source that is furthest behind its share. A source that ends starts again, until
    each source has been read once or `max_tokens` are reached. A single source is therefore read exactly once.

    Args:
        sources: the sources and their weights.
        open_source: starts reading a source from its beginning.
        max_tokens: stop after this many tokens; None reads every source at least once.

    Yields:
        The index of the source and the document.

    Raises:
        UserError: a source has no tokens.
    """
    streams = [open_source(source) for source in sources]
    tokens = [0] * len(sources)
    epochs = [0] * len(sources)
    left_out: list[Counter] = [Counter() for _ in sources]
    while sources and (max_tokens is None or sum(tokens) < max_tokens):
        index = min(range(len(sources)), key=lambda i: tokens[i] / sources[i].weight)
        document = next(streams[index], None)
        if document is None:
            epochs[index] += 1
            if not tokens[index]:
                raise UserError(_describe_empty_source(sources[index], left_out[index]))
            if all(epochs):
                return
            streams[index] = open_source(sources[index])
            continue
        tokens[index] += len(document.ids)
        if document.left_out:
            left_out[index][document.left_out] += 1
        yield index, document


def _describe_empty_source(source: Source, left_out: Counter) -> str:
    """The error message for a source without tokens; `left_out` counts its documents by reason."""
    if not left_out or set(left_out) == {EMPTY_TEXT}:
        return f"{source.path} has no text; leave it out"
    return f"{source.path} has nothing to learn from ({join_reasons(left_out)}); correct it or leave it out"
