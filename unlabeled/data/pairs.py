"""Pairs of texts that belong together, with optional hard negatives: read, checked and put into batches."""

import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from unlabeled.config import SourceArguments
from unlabeled.data.encoding import keep_beginning
from unlabeled.data.files import skipped_files
from unlabeled.data.held_out import check_held_out, unit_hash
from unlabeled.data.identity import fingerprint, identity
from unlabeled.data.randomness import epoch_permutation
from unlabeled.data.readers import read_rows
from unlabeled.data.sources import Source, parse_sources
from unlabeled.data.tokenization import tokenizer_fingerprint
from unlabeled.errors import UserError

if TYPE_CHECKING:  # an extra: it needs sentence-transformers
    from unlabeled.config import EmbedArguments

# Why a pair is left out.
SECOND_TIME = "a text for the second time"
OWN_NEGATIVE = "a negative that is another text of its row"
# How similar the texts of held-out columns are to the anchor.
GRADES = {"positive": 2, "same_work": 1, "other_work": 0}
# Columns of an anchor and its positive, as in the data sets of sentence-transformers. The first are ours.
PAIR_COLUMNS = (
    ("anchor", "positive"),
    ("query", "positive"),
    ("query", "answer"),
    ("question", "answer"),
    ("sentence1", "sentence2"),
)
NEGATIVE = re.compile(r"negative(_[0-9]+)?")
SCORE_COLUMNS = ("label", "labels", "score", "scores", "similarity_score")  # they say that not every row is a pair


@dataclass(frozen=True)
class Columns:
    """The columns of a source: of the anchor, its positive, and its hard negatives in order."""

    anchor: str
    positive: str
    negatives: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return (self.anchor, self.positive, *self.negatives)


def find_columns(row: dict, row_name: str) -> Columns:
    """The columns of a row by their names.

    Raises:
        UserError: there are none, several, or some of which it is not clear what they mean.
    """
    matches = [names for names in PAIR_COLUMNS if row.keys() >= set(names)]
    if matches and matches[0] == PAIR_COLUMNS[0]:
        matches = matches[:1]
    if len(matches) != 1:
        known = "; ".join(" and ".join(names) for names in matches or PAIR_COLUMNS)
        problem = "more than one pair of columns" if matches else "no anchor or no positive"
        raise UserError(f"{row_name} has {problem}; give it two columns of text, anchor and positive (known: {known})")
    anchor, positive = matches[0]
    scores = [name for name in SCORE_COLUMNS if name in row]
    if scores and positive != "positive":
        raise UserError(
            f"{row_name} has {anchor} and {positive} with a {scores[0]}, and this recipe takes every row for a pair "
            "that belongs together; keep such rows only, as anchor and positive"
        )
    negatives = [name for name in row if NEGATIVE.fullmatch(name)]
    for name, value in row.items():
        looks_negative = "negative" in name.lower() or name.lower() in ("neg", "negs")
        if looks_negative and name not in negatives and _holds_text(value):
            raise UserError(f"{row_name} has texts in {name}; name the columns negative, negative_1, ...")
    return Columns(anchor, positive, tuple(sorted(negatives, key=_negative_number)))


def _holds_text(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return any(isinstance(item, str) for item in items)


def _negative_number(column: str) -> int:
    """The number of a column of negatives; `negative` comes first."""
    return int(column.partition("_")[2] or -1)


def negative_columns(count: int) -> list[str]:
    """The names of the columns of hard negatives after reading."""
    return [f"negative_{number}" for number in range(1, count + 1)]


def text_columns(pairs: Dataset) -> list[str]:
    """The columns that the loss embeds: anchor, positive, and the hard negatives in order."""
    return ["anchor", "positive", *(name for name in pairs.column_names if NEGATIVE.fullmatch(name))]


# --- Reading ----------------------------------------------------------------------------------------------------------


class _PairSplit:
    """The pairs of one split, in which no text is an anchor or a positive twice."""

    def __init__(self) -> None:
        self.pairs: list[dict] = []
        self.left_out: Counter[str] = Counter()
        self._texts: set[str] = set()

    def add(self, row: dict, negatives: int) -> None:
        texts = {row["anchor"], row["positive"]}
        negative_texts = [row[name] for name in negative_columns(negatives)]
        if self._texts & texts:
            self.left_out[SECOND_TIME] += 1
        elif texts & set(negative_texts) or len(set(negative_texts)) < len(negative_texts):
            self.left_out[OWN_NEGATIVE] += 1
        else:
            self._texts.update(texts)
            self.pairs.append(row)

    def tokenize(self, tokenizer: PreTrainedTokenizerFast, max_length: int) -> dict:
        """Add the number of `tokens` to each pair; the counts for the manifest."""
        columns = [name for name in self.pairs[0] if name in ("anchor", "positive") or NEGATIVE.fullmatch(name)]
        size = sum(len(pair[name].encode()) for pair in self.pairs for name in columns)
        truncated = 0
        for pair in self.pairs:
            # Training encodes a text each time it meets it, and truncates it only then.
            for name in columns:
                pair[name] = keep_beginning(tokenizer.backend_tokenizer, pair[name], max_length)
            ids = tokenizer([pair[name] for name in columns], verbose=False)["input_ids"]
            truncated += sum(len(text_ids) > max_length for text_ids in ids)
            pair["tokens"] = sum(min(len(text_ids), max_length) for text_ids in ids)
        return {
            "left_out": dict(self.left_out),
            "truncated": truncated,
            "negatives": len(columns) - 2,
            "documents": len(self.pairs),
            "rows": len(self.pairs),
            "text_tokens": sum(pair["tokens"] for pair in self.pairs),
            "bytes": size,
        }


def read_pairs(
    data_args: SourceArguments, tokenizer: PreTrainedTokenizerFast, max_length: int
) -> tuple[dict[str, Dataset], dict]:
    """Read pairs of texts and count their tokens.

    A text that is an anchor or a positive twice would be a wrong negative of itself: the later pair is left out and
    counted. Negatives that are an anchor, positive or negative of another row are up to `order_of_pairs`.

    Args:
        data_args: the sources.
        tokenizer: of the model.
        max_length: tokens of a text at most.

    Returns:
        {"train": Dataset, "validation": Dataset} with the columns anchor, positive, negative_1, ... (where the data
        have hard negatives) and `tokens` of all texts of a pair; and the manifest.

    Raises:
        UserError: there are no pairs, a column is missing or empty, or rows have different numbers of negatives.
    """
    train = parse_sources(data_args.train_data, "train_data")
    evaluation = parse_sources(data_args.eval_data or [], "eval_data")
    splits = {"train": _PairSplit(), "validation": _PairSplit()}
    repaired: Counter = Counter()
    for sources_split, sources in (("train", train), ("validation", evaluation)):
        negatives = None
        for source in sources:
            for row in _read_source(source, negatives, repaired):
                negatives = sum(name.startswith("negative_") for name in row)
                is_held_out = unit_hash(row["anchor"].encode()) < data_args.eval_fraction
                splits["validation" if is_held_out else sources_split].add(row, negatives)
    check_held_out(data_args.eval_fraction, len(splits["train"].pairs), len(splits["validation"].pairs), "pairs")
    counts = {}
    for name, key in (("train", "train_data"), ("validation", "eval_data")):
        if not splits[name].pairs:
            raise UserError(f"{key} has no pairs; give it rows with anchor and positive")
        counts[name] = splits[name].tokenize(tokenizer, max_length)
    plan = {
        "objective": "embed",
        "max_length": max_length,
        "eval_fraction": data_args.eval_fraction,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "train": [identity(source) for source in train],
        "evaluation": [identity(source) for source in evaluation],
    }
    manifest = plan | {
        "fingerprint": fingerprint(plan),
        "splits": counts,
        "skipped_files": skipped_files([*train, *evaluation]),
        "repaired": dict(repaired),
    }
    return {name: Dataset.from_list(split.pairs) for name, split in splits.items()}, manifest


def _read_source(source: Source, negatives: int | None, repaired: Counter) -> Iterator[dict[str, str]]:
    """The rows of a source with the columns anchor, positive, negative_1, ..., and those of `GRADES`.

    Args:
        source: of pairs.
        negatives: the number of hard negatives of the sources before it, or None.
        repaired: counts the rows that were changed, by reason.
    """
    columns = None
    for row_name, row in read_rows(source, repaired=repaired):
        row_columns = find_columns(row, row_name)
        columns = columns or row_columns
        if row_columns != columns or (negatives is not None and len(columns.negatives) != negatives):
            raise UserError(
                f"{row_name} has the columns {', '.join(row_columns.all)}, others than the rows before it; give all "
                "the same ones, with as many hard negatives"
            )
        for name in columns.all:
            if isinstance(row[name], str) and row[name].strip():
                continue
            if name in columns.negatives:
                raise UserError(f"{row_name} has no {name}; give each row as many hard negatives, as text")
            raise UserError(f"{row_name} has no anchor or no positive; give it both, as text")
        texts = [row[name] for name in columns.all]
        names = ("anchor", "positive", *negative_columns(len(columns.negatives)))
        grades = {name: text for name, text in row.items() if name in GRADES and name not in columns.all}
        yield dict(zip(names, texts, strict=True)) | grades


# --- Batches ----------------------------------------------------------------------------------------------------------


def order_of_pairs(size: int, args: "EmbedArguments", texts: Sequence[Sequence[str]] | None = None) -> np.ndarray:
    """The rows of a whole run: the full batches of each epoch.

    No batch reaches from one epoch into the next, where it could hold a pair twice, which would be a wrong negative of
    itself. The rest of an epoch, less than a batch, is left out of it; which pairs these are differs from epoch to
    epoch.

    Args:
        size: pairs of the data set.
        args: the budget and the seed.
        texts: the texts of each row, if a text may be in several rows, as hard negatives are. Such rows are put into
            different batches, the later one into the next batch that has space for it.

    Returns:
        int64 (train_pairs,).

    Raises:
        UserError: there are fewer pairs than a batch takes, or too many of them share a text.
    """
    if size < args.batch_pairs:
        raise UserError(f"train_data has {size} pairs and batch_pairs is {args.batch_pairs}; add pairs, or lower it")
    order = np.empty(0, dtype=np.int64)
    epoch = 0
    while len(order) < args.train_pairs:
        rows = epoch_permutation(args.seed, epoch, size)
        if texts is None:
            rows = rows[: size - size % args.batch_pairs]
        else:
            rows = batches_without_repeats(rows.tolist(), texts, args.batch_pairs)
            if not len(rows):
                raise UserError(
                    f"batch_pairs is {args.batch_pairs}, and fewer rows of train_data have no text in common; lower "
                    "it, or give them other negatives"
                )
        order = np.concatenate([order, rows])
        epoch += 1
    return order[: args.train_pairs]


def left_out_of_epoch(size: int, args: "EmbedArguments", texts: Sequence[Sequence[str]]) -> int:
    """How many pairs are in no batch of the first epoch, beside the rest that is less than a batch."""
    rows = batches_without_repeats(epoch_permutation(args.seed, 0, size).tolist(), texts, args.batch_pairs)
    return size - size % args.batch_pairs - len(rows)


def batches_without_repeats(order: list[int], texts: Sequence[Sequence[str]], batch_size: int) -> np.ndarray:
    """Full batches in which no text occurs twice, in the given order as far as possible.

    Args:
        order: the rows of an epoch.
        texts: the texts of each row.
        batch_size: rows of a batch.

    Returns:
        int64 (batches · batch_size,).
    """
    waiting = deque(order)
    rows: list[int] = []
    while True:
        batch: list[int] = []
        postponed: list[int] = []
        used: set[str] = set()
        while waiting and len(batch) < batch_size:
            row = waiting.popleft()
            if used.isdisjoint(texts[row]):
                batch.append(row)
                used.update(texts[row])
            else:
                postponed.append(row)
        if len(batch) < batch_size:
            return np.array(rows, dtype=np.int64)
        rows += batch
        waiting.extendleft(reversed(postponed))
