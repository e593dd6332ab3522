"""Data sets of rows in the order of a run, for training and for evaluation."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from datasets import Dataset

from unlabeled.data.randomness import epoch_permutation, seeded_generator

WINDOW_BATCHES = 50  # batches among which `LengthGroupedRows` sorts: little padding, but a new order in each epoch


def training_order(size: int, total: int, seed: int) -> np.ndarray:
    """The rows of a whole run in the order of `TrainingRows`, for trainers that need a `datasets.Dataset`.

    Args:
        size: rows of the data set.
        total: rows of the run.
        seed: of the run.

    Returns:
        int64 (total,): the permutations of epochs 0, 1, ... one after the other, for `Dataset.select`.
    """
    epochs = -(-total // size)
    return np.concatenate([epoch_permutation(seed, epoch, size) for epoch in range(epochs)])[:total]


def no_heartbeat() -> None:
    """The default of `RunRows.heartbeat`; a named function, as data loader workers cannot unpickle a lambda."""


class RunRows(torch.utils.data.Dataset):
    """The rows of a whole run by their position in it; a base class that handles where a resumed run starts.

    Trainer asks for positions from 0 on, also after `resume`. Subclasses implement `read` alone, which is called with
    positions in the run.

    Args:
        total: rows of the run, over all epochs.

    Attributes:
        first: the position in the run that Trainer asks for as 0.
        heartbeat: called whenever rows were read, for a watchdog.
    """

    def __init__(self, total: int):
        self.total = total
        self.first = 0
        self.heartbeat: Callable[[], None] = no_heartbeat

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, position: int) -> dict:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[dict]:
        for position in positions:
            if not 0 <= position < self.total:
                raise IndexError(position)
        rows = self.read([self.first + position for position in positions])
        self.heartbeat()
        return rows

    def resume(self, position: int, checkpoint: str) -> None:
        """Continue at a position of the run, from a checkpoint folder."""
        self.first = position

    def read(self, positions: list[int]) -> list[dict]:
        """The rows at these positions of the run."""
        raise NotImplementedError


class TrainingRows(RunRows):
    """The whole run as one sequence: position i is a row of epoch i // n, in an order that depends on (seed, epoch).

    Global batch k holds the same rows whatever the number of processes and the accumulation, no batch is cut short at
    the end of an epoch, and a resumed run only has to count.

    Args:
        rows: a prepared split, or a list of rows.
        total: rows of the run, over all epochs.
        seed: of the run.
    """

    def __init__(self, rows: Dataset | list[dict], total: int, seed: int):
        super().__init__(total)
        self.rows = rows
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """The rows of one epoch in order: int64 (rows,)."""
        return epoch_permutation(self.seed, epoch, len(self.rows))

    def read(self, positions: list[int]) -> list[dict]:
        return self.read_epoch_rows([self._epoch_and_row(position) for position in positions])

    def read_epoch_rows(self, epoch_rows: list[tuple[int, int]]) -> list[dict]:
        """The rows at these (epoch, row)."""
        return read_examples(self.rows, epoch_rows)

    def _epoch_and_row(self, position: int) -> tuple[int, int]:
        epoch, index = divmod(position, len(self.rows))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = self.epoch_order(epoch)
        return epoch, int(self._order[index])


class LengthGroupedRows(TrainingRows):
    """`TrainingRows` in which the rows of a batch have similar lengths, so that little is padded.

    Each epoch is a permutation, sorted by length within windows of 50 batches, and then the batches are shuffled. All
    of it depends on (seed, epoch) alone.

    Args:
        rows: a list of rows.
        lengths: int (rows,), tokens of each row.
        total: rows of the run, over all epochs.
        seed: of the run.
        batch_size: rows of a batch over all processes.
    """

    def __init__(self, rows: list[dict], lengths: np.ndarray, total: int, seed: int, batch_size: int):
        super().__init__(rows, total, seed)
        self.lengths = lengths
        self.batch_size = batch_size

    def order(self) -> np.ndarray:
        """The rows of the whole run: int64 (total,)."""
        epochs = -(-self.total // len(self.rows))
        return np.concatenate([self.epoch_order(epoch) for epoch in range(epochs)])[: self.total]

    def epoch_order(self, epoch: int) -> np.ndarray:
        order = epoch_permutation(self.seed, epoch, len(self.rows))
        # The first rows complete the last batch of the previous epoch; whole batches follow.
        first = min(-epoch * len(order) % self.batch_size, len(order))
        last = first + (len(order) - first) // self.batch_size * self.batch_size
        window = WINDOW_BATCHES * self.batch_size
        sorted_rows = []
        for start in range(first, last, window):
            rows = order[start : min(start + window, last)]
            sorted_rows.append(rows[np.argsort(-self.lengths[rows], kind="stable")])
        batches = np.concatenate(sorted_rows or [order[:0]]).reshape(-1, self.batch_size)
        batches = batches[seeded_generator("batches", self.seed, epoch).permutation(len(batches))]
        return np.concatenate([order[:first], batches.reshape(-1), order[last:]])

    def read_epoch_rows(self, epoch_rows: list[tuple[int, int]]) -> list[dict]:
        return [self.rows[row] for _, row in epoch_rows]


class EvaluationRows(torch.utils.data.Dataset):
    """The rows of one process in evaluation, always in the same order and with the same masks.

    Every process gets the same number of rows, since under ZeRO-3 a forward pass is collective. Rows that only fill up
    are empty and have no targets.

    Args:
        rows: a prepared split.
        rank: index of the process.
        world_size: number of processes.
    """

    def __init__(self, rows: Dataset, rank: int = 0, world_size: int = 1):
        self.rows = rows
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.world_size)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        rows = [index * self.world_size + self.rank for index in indices]
        examples = read_examples(self.rows, [(0, row) for row in rows if row < len(self.rows)])
        return examples + [_empty_example(row) for row in rows if row >= len(self.rows)]


def _empty_example(row: int) -> dict:
    """A row without tokens, with the columns of every objective."""
    return {
        "input_ids": np.empty(0, dtype=int),
        "lengths": np.empty(0, dtype=int),
        "word_starts": np.empty(0, dtype=bool),
        "targets": np.empty(0, dtype=bool),
        "row": row,
        "epoch": 0,
    }


def read_examples(rows: Dataset, epoch_rows: Iterable[tuple[int, int]]) -> list[dict]:
    """Read rows of a split at once and add their `epoch` and `row`, from which collators derive masks.

    Args:
        rows: the split.
        epoch_rows: (epoch, row) of each example.
    """
    epoch_rows = list(epoch_rows)
    if not epoch_rows:
        return []
    columns = rows[[row for _, row in epoch_rows]]
    examples = []
    for values, (epoch, row) in zip(zip(*columns.values(), strict=True), epoch_rows, strict=True):
        example = dict(zip(columns, values, strict=True))
        examples.append(example | {"epoch": epoch, "row": row})
    return examples
