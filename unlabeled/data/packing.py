"""Packing: documents cut into pieces, pieces put into rows of a fixed length, and where the documents of a row lie.

A document longer than a row is split, any other stays whole, and none is dropped. Pieces are packed best fit first
(Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830), which leaves almost no padding.

Causal pieces overlap by one token: the first token of a piece is context only. Each token of a document is therefore
predicted exactly once, also where the document was cut. Masked pieces do not overlap, and each has its own frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from unlabeled.planning.spans import Denoiser, span_lengths


def split_points(length: int, max_length: int, overlap: int) -> list[tuple[int, int]]:
    """Where to cut a document into pieces.

    Args:
        length: tokens of the document.
        max_length: tokens in a piece at most.
        overlap: tokens that consecutive pieces share. With an overlap of 1, each piece has at least two tokens: the
            context and a target.

    Returns:
        [start, end) of each piece.

    Raises:
        ValueError: `max_length` is not larger than `overlap`.
    """
    if max_length <= overlap:
        raise ValueError(f"pieces of {max_length} tokens cannot overlap by {overlap}")
    stride = max_length - overlap
    return [(start, min(start + max_length, length)) for start in range(0, max(length - overlap, 1), stride)]


def best_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Pack pieces into rows, longest first, each into the fullest row that still has space for it.

    The free space of all rows is kept as the bits of one integer, so that the best row is found without a search.

    Args:
        lengths: tokens of each piece, between 1 and `row_length`.
        row_length: tokens in a row.

    Returns:
        For each row the indices of its pieces. Every piece is in exactly one row.
    """
    rows: list[list[int]] = []
    rows_by_space: list[list[int]] = [[] for _ in range(row_length + 1)]
    spaces = 0  # bit n is set when some row has exactly n free tokens
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[piece]
        large_enough = spaces >> length
        if large_enough:
            lowest_bit = large_enough & -large_enough
            space = length + lowest_bit.bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces ^= 1 << space
        else:
            space = row_length
            row = len(rows)
            rows.append([])
        rows[row].append(piece)
        remaining = space - length
        if remaining:
            rows_by_space[remaining].append(row)
            spaces |= 1 << remaining
    return rows


def span_row_cost(denoisers: Sequence[Denoiser], max_length: int) -> np.ndarray:
    """What a text costs of a row when its spans are corrupted, by the length of the text, for `best_fit`.

    A text needs space in the inputs and in the targets, and short texts have relatively long targets. The cost is the
    larger of both shares, in tokens of `max_length`.

    Returns:
        int64 (longest text + 1,); texts have at least 2 tokens.
    """
    longest, target_length = span_lengths(denoisers, max_length)
    cost = np.zeros(longest + 1, dtype=np.int64)
    for length in range(2, longest + 1):
        lengths = [denoiser.lengths(length) for denoiser in denoisers]
        inputs = max(input_tokens for input_tokens, _ in lengths)
        targets = max(target_tokens for _, target_tokens in lengths)
        targets_cost = -(-targets * max_length // target_length)  # rounded up
        cost[length] = max(inputs, targets_cost)
    return cost


@dataclass(frozen=True)
class RowLayout:
    """Where the documents of a batch of rows lie. Padding counts as one more document.

    Attributes:
        document_ids: int64 (rows, max_length), 0, 1, 2, ... along a row.
        position_ids: int64 (rows, max_length), restarting at 0 with each document.
        padding: bool (rows, max_length), True where a row is padded.
    """

    document_ids: torch.Tensor
    position_ids: torch.Tensor
    padding: torch.Tensor

    @property
    def starts(self) -> torch.Tensor:
        """bool (rows, max_length): the first token of each document."""
        return self.position_ids == 0


def layout_rows(lengths: Sequence[Sequence[int]], max_length: int) -> RowLayout:
    """The layout of rows of `max_length` tokens.

    Args:
        lengths: for each row, the tokens of each of its documents; the rest of the row is padding.
        max_length: tokens in a row.
    """
    document_ids = np.zeros((len(lengths), max_length), dtype=np.int64)
    position_ids = np.zeros((len(lengths), max_length), dtype=np.int64)
    padding = np.zeros((len(lengths), max_length), dtype=bool)
    for row, document_lengths in enumerate(lengths):
        segments = np.asarray(document_lengths, dtype=np.int64)
        used = int(segments.sum())
        if used < max_length:
            segments = np.append(segments, max_length - used)
        ends = np.cumsum(segments)
        document_ids[row] = np.repeat(np.arange(len(segments)), segments)
        position_ids[row] = np.arange(max_length) - np.repeat(ends - segments, segments)
        padding[row, used:] = True
    return RowLayout(torch.from_numpy(document_ids), torch.from_numpy(position_ids), torch.from_numpy(padding))
