"""Prepared rows in the order in which training and evaluation read them."""

import numpy as np
import torch

from unlabeled.randomness import permutation


class TrainingRows(torch.utils.data.Dataset):
    """The whole run as one sequence: position i is a row of epoch i // n, in an order that (seed, epoch) alone decide.

    Read in sequence, global batch k holds the same rows whatever the number of processes and the accumulation, no batch
    is cut short where an epoch ends, and resuming is a matter of counting.
    """

    def __init__(self, rows, total: int, seed: int):
        self.rows, self.total, self.seed = rows, total, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, position: int) -> dict:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[dict]:
        places = [self._place(position) for position in positions]
        return _examples(self.rows, places)

    def _place(self, position: int) -> tuple[int, int]:
        if not 0 <= position < self.total:
            raise IndexError(position)
        epoch, index = divmod(position, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.seed, epoch, len(self.rows))
        return epoch, int(self._order[index])


class EvaluationRows(torch.utils.data.Dataset):
    """The rows of one process in evaluation, always in the same order and with the same masks.

    Every process gets the same number of rows, since under ZeRO-3 a forward pass is collective; rows that only fill up
    are empty and so have no targets.
    """

    def __init__(self, rows, rank: int = 0, world_size: int = 1):
        self.rows, self.rank, self.world_size = rows, rank, world_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.world_size)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        places = [(0, index * self.world_size + self.rank) for index in indices]
        inside = _examples(self.rows, [place for place in places if place[1] < len(self.rows)])
        empty = {"input_ids": np.empty(0, int), "lengths": np.empty(0, int), "word_starts": np.empty(0, bool)}
        return inside + [{**empty, "row": row, "epoch": 0} for _, row in places if row >= len(self.rows)]


def _examples(rows, places: list[tuple[int, int]]) -> list[dict]:
    """The rows at these (epoch, row) places, read in one go."""
    if not places:
        return []
    columns = rows[[row for _, row in places]]
    examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [example | {"epoch": epoch, "row": row} for example, (epoch, row) in zip(examples, places, strict=True)]
