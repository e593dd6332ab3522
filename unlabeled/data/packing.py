"""From documents to rows of a fixed length, what keeps the documents of a row apart, and the order of the rows.

A document longer than a row is split, any other stays whole, none is dropped. Pieces are put into rows best fit first
(Ding et al. 2024, "Fewer truncations improve language modeling", arXiv:2404.10830), which leaves almost no padding.

Causal pieces overlap by one token: the first token of a piece is context only, so that each token of a document is
predicted exactly once, also where a document was cut. Masked pieces do not overlap; each has its own frame.

Random numbers are a pure function of what they are for, never of what was drawn before: masks come from (seed, epoch,
row) and the order of an epoch from (seed, epoch). Nothing has to be saved in a checkpoint, evaluation is the same each
time, and neither the number of processes nor that of data loader workers matters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from unlabeled.planning.spans import Denoiser, span_lengths

# The seed of every evaluation mask: one constant, so that runs with different seeds are scored on the same masks.
EVALUATION_SEED = 0


def split_points(length: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """Where to cut `length` tokens into pieces of at most `room`: [start, end) pairs that overlap by `overlap`.

    With an overlap of 1 a piece has at least two tokens: the context and a target.
    """
    if room <= overlap:
        raise ValueError(f"a piece of {room} tokens has no room beside an overlap of {overlap}")
    stride = room - overlap
    return [(start, min(start + room, length)) for start in range(0, max(length - overlap, 1), stride)]


def best_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Put pieces into rows, longest first, each into the fullest row that still has room for it.

    Args:
        lengths: length of each piece in tokens, each between 1 and `row_length`.
        row_length: tokens in a row.

    Returns:
        For each row the indices of its pieces. Every piece is in exactly one row.
    """
    rows: list[list[int]] = []
    rows_with_free: list[list[int]] = [[] for _ in range(row_length + 1)]  # by free tokens
    free = 0  # bit f is set when some row has exactly f free tokens
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        need = lengths[piece]
        candidates = free >> need
        if candidates:
            space = need + (candidates & -candidates).bit_length() - 1
            row = rows_with_free[space].pop()
            if not rows_with_free[space]:
                free ^= 1 << space
        else:
            space, row = row_length, len(rows)
            rows.append([])
        rows[row].append(piece)
        if left := space - need:
            rows_with_free[left].append(row)
            free |= 1 << left
    return rows


def row_cost_of_spans(denoisers: Sequence[Denoiser], max_length: int) -> np.ndarray:
    """The share of a row that a text takes, for `best_fit`: int64 (longest text + 1,), in tokens of `max_length`.

    Its inputs need room, and so do its targets, of which short texts have more for their size.
    """
    longest, target_length = span_lengths(denoisers, max_length)
    room = np.zeros(longest + 1, dtype=np.int64)
    for length in range(2, longest + 1):
        both = np.array([denoiser.lengths(length) for denoiser in denoisers]).max(axis=0)
        room[length] = max(both[0], -(-both[1] * max_length // target_length))
    return room


@dataclass(frozen=True)
class Layout:
    """Where the documents of a batch of rows lie; padding counts as a document of its own.

    Attributes:
        document_ids: int64 (rows, max_length), 0, 1, 2, ... along a row.
        position_ids: int64 (rows, max_length), restarting at 0 with each document.
        padding: bool (rows, max_length).
    """

    document_ids: torch.Tensor
    position_ids: torch.Tensor
    padding: torch.Tensor

    @property
    def starts(self) -> torch.Tensor:
        """bool (rows, max_length): the first token of each document."""
        return self.position_ids == 0


def layout(lengths: Sequence[Sequence[int]], max_length: int) -> Layout:
    """The layout of rows whose documents have these `lengths` in tokens; what they leave of `max_length` is padding."""
    document_ids = np.zeros((len(lengths), max_length), dtype=np.int64)
    position_ids = np.zeros((len(lengths), max_length), dtype=np.int64)
    padding = np.zeros((len(lengths), max_length), dtype=bool)
    for row, row_lengths in enumerate(lengths):
        full = np.asarray(row_lengths, dtype=np.int64)
        used = int(full.sum())
        if used < max_length:
            full = np.append(full, max_length - used)
        ends = np.cumsum(full)
        document_ids[row] = np.repeat(np.arange(len(full)), full)
        position_ids[row] = np.arange(max_length) - np.repeat(ends - full, full)
        padding[row, used:] = True
    return Layout(torch.from_numpy(document_ids), torch.from_numpy(position_ids), torch.from_numpy(padding))


def generator(purpose: str, *key: int) -> np.random.Generator:
    """A generator for a purpose and integers from 0 up, for example `generator("mask", seed, epoch, row)`."""
    # SeedSequence ignores trailing zeros, (1,) and (1, 0) would be one stream: the length of the key goes in first.
    entropy = [int.from_bytes(purpose.encode(), "little"), len(key), *key]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of the rows in one epoch: int64 of shape (size,)."""
    return generator("order", seed, epoch).permutation(size)


def training_order(size: int, total: int, seed: int) -> np.ndarray:
    """The rows of a whole run in the order of `TrainingRows`, for trainers that take a `datasets.Dataset`: select them.

    int64 (total,): the permutations of epochs 0, 1, ... one after the other.
    """
    return np.concatenate([permutation(seed, epoch, size) for epoch in range(-(-total // size))])[:total]


def no_heartbeat() -> None:
    """Stands for the watchdog's where there is none; a function by name, which can go to workers of a data loader."""


class RunRows(torch.utils.data.Dataset):
    """The rows of a whole run by their position in it; a base class that takes care of where a resumed run begins.

    Trainer asks for positions from 0 up, also after `resume`. Subclasses define `read` alone, which gets positions in
    the run, so that none of them can forget to count those that were read before.

    Args:
        total: rows of the run, over all epochs.
    """

    def __init__(self, total: int):
        self.total = total
        self.first = 0  # the position in the run that is asked for as 0
        self.heartbeat: Callable[[], None] = no_heartbeat  # is called when something was read

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
        """Begin at a position of the run, after a checkpoint."""
        self.first = position

    def read(self, positions: list[int]) -> list[dict]:
        """The rows at these positions of the run."""
        raise NotImplementedError


class TrainingRows(RunRows):
    """The whole run as one sequence: position i is a row of epoch i // n, in an order that (seed, epoch) alone decide.

    Read in sequence, global batch k holds the same rows whatever the number of processes and the accumulation, no batch
    is cut short where an epoch ends, and resuming is a matter of counting.
    """

    def __init__(self, rows, total: int, seed: int):
        super().__init__(total)
        self.rows, self.seed = rows, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """The rows of one epoch in order: int64 (rows,)."""
        return permutation(self.seed, epoch, len(self.rows))

    def read(self, positions: list[int]) -> list[dict]:
        return self.examples([self._place(position) for position in positions])

    def examples(self, places: list[tuple[int, int]]) -> list[dict]:
        """The rows at these (epoch, row) places."""
        return examples_of(self.rows, places)

    def _place(self, position: int) -> tuple[int, int]:
        epoch, index = divmod(position, len(self.rows))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = self.epoch_order(epoch)
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
        inside = examples_of(self.rows, [place for place in places if place[1] < len(self.rows)])
        marks = {"word_starts": np.empty(0, bool), "targets": np.empty(0, bool)}
        empty = {"input_ids": np.empty(0, int), "lengths": np.empty(0, int)} | marks
        return inside + [{**empty, "row": row, "epoch": 0} for _, row in places if row >= len(self.rows)]


def examples_of(rows, places: list[tuple[int, int]]) -> list[dict]:
    """The rows at these (epoch, row) places, read in one go."""
    if not places:
        return []
    columns = rows[[row for _, row in places]]
    examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [example | {"epoch": epoch, "row": row} for example, (epoch, row) in zip(examples, places, strict=True)]
