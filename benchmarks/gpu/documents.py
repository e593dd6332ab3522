"""Packed rows of random documents."""

import numpy as np
import torch

from benchmarks.gpu.bench import Shape
from unlabeled.data.packing import best_fit, split_points


def document_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """int64 (count,): random lengths of documents in tokens.

    Log-normal as on the web, but shorter: half of them have fewer than 172 tokens, so that a row of 1,024 holds four.
    """
    return np.clip(rng.lognormal(mean=5.15, sigma=1.0, size=count), 16, 8192).astype(int)


def packed_lengths(shape: Shape, count: int, seed: int = 0) -> list[list[int]]:
    """The lengths of the documents in each of `count` rows, cut and packed as `unlabeled.data.preparing` does."""
    rng = np.random.default_rng(seed)
    scale = shape.length / 1024
    pieces: list[int] = []
    while sum(pieces) < 1.2 * count * shape.length + shape.length:
        for length in document_lengths(rng, 64):
            cut = split_points(max(int(length * scale), 4), shape.length, overlap=1)
            pieces += [end - start for start, end in cut]
    rows = [[pieces[index] for index in row] for row in best_fit(pieces, shape.length)]
    order = rng.permutation(len(rows))[:count]
    return [rows[index] for index in order]


def document_starts(rows: list[list[int]], length: int) -> torch.Tensor:
    """int32 (documents + 1,): the start of each document of the concatenated rows, and the end.

    The padding of a row counts as a document.
    """
    starts = []
    for index, row in enumerate(rows):
        filled = [*row, length - sum(row)] if sum(row) < length else row
        starts += (index * length + np.cumsum([0, *filled[:-1]])).tolist()
    return torch.tensor([*starts, len(rows) * length], dtype=torch.int32)


def document_ids(starts: torch.Tensor, shape: Shape) -> torch.Tensor:
    """int64 (rows, length): the number of the document that a token belongs to."""
    is_start = torch.zeros(shape.tokens, dtype=torch.int64)
    is_start[starts[:-1].long()] = 1
    return is_start.cumsum(0).view(shape.rows, shape.length)


def padded_starts(starts: torch.Tensor, size: int) -> torch.Tensor:
    """int32 (size,): `starts` with empty documents at the end."""
    return torch.cat([starts, starts[-1:].expand(size - len(starts))])


class Rows(torch.utils.data.Dataset):
    """Packed rows of random tokens, as the collators expect them."""

    def __init__(self, shape: Shape, count: int, vocabulary: int, seed: int = 0):
        self.lengths = packed_lengths(shape, count, seed)
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict:
        lengths = self.lengths[index]
        rng = np.random.default_rng(index)
        ids = rng.integers(8, self.vocabulary, sum(lengths))
        word_starts = np.ones(len(ids), dtype=bool)
        return {"input_ids": ids, "lengths": lengths, "word_starts": word_starts, "row": index, "epoch": 0}
