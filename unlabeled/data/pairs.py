"""Pairs of texts that belong together, with hard negatives where the data have some: read, checked and put in order."""

import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

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

SECOND_TIME = "a text for the second time"  # reasons to leave a pair out
OWN_NEGATIVE = "a negative that is another text of its row"
GRADES = {"positive": 2, "same_work": 1, "other_work": 0}  # columns of held-out pairs: how near they are to the anchor
# Columns of an anchor and its positive, as in the data sets of sentence-transformers. The first are ours.
NAMES = (("anchor", "positive"), ("query", "positive"), ("query", "answer"), ("question", "answer"),
         ("sentence1", "sentence2"))  # fmt: skip
NEGATIVE = re.compile(r"negative(_[0-9]+)?")
SCORES = ("label", "labels", "score", "scores", "similarity_score")  # what says that not every row is a pair


@dataclass(frozen=True)
class Columns:
    """The columns of a source: of the anchor, its positive, and its hard negatives in order."""

    anchor: str
    positive: str
    negatives: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return (self.anchor, self.positive, *self.negatives)


def find_columns(row: dict, place: str) -> Columns:
    """The columns of a row by their names.

    Raises:
        UserError: there are none, several, or some of which it is not clear what they mean.
    """
    known = [names for names in NAMES if row.keys() >= set(names)]
    if known and known[0] == NAMES[0]:
        known = known[:1]
    if len(known) != 1:
        which = "; ".join(" and ".join(names) for names in known or NAMES)
        problem = "more than one pair of columns" if known else "no anchor or no positive"
        raise UserError(f"{place} has {problem}; give it two columns of text, anchor and positive (known: {which})")
    anchor, positive = known[0]
    scored = [name for name in SCORES if name in row]
    if scored and positive != "positive":
        raise UserError(
            f"{place} has {anchor} and {positive} with a {scored[0]}, and this recipe takes every row for a pair that "
            "belongs together; keep such rows only, as anchor and positive"
        )
    negatives = [name for name in row if NEGATIVE.fullmatch(name)]
    for name, value in row.items():
        named = "negative" in name.lower() or name.lower() in ("neg", "negs")
        if named and name not in negatives and any(isinstance(item, str) for item in _items(value)):
            raise UserError(f"{place} has texts in {name}; name the columns negative, negative_1, ...")
    return Columns(anchor, positive, tuple(sorted(negatives, key=lambda name: int(name.partition("_")[2] or -1))))


def _items(value: object) -> Iterable:
    return value if isinstance(value, list) else [value]


def _read(source: Source, negatives: int | None, repaired: Counter) -> Iterator[tuple[dict[str, str], str]]:
    """The rows of a source as {"anchor", "positive", "negative_1", ..., and the grades}, with their places."""
    columns = None
    for place, row in read_rows(source, repaired=repaired):
        row_columns = find_columns(row, place)
        columns = columns or row_columns
        if row_columns != columns or (negatives is not None and len(columns.negatives) != negatives):
            raise UserError(
                f"{place} has the columns {', '.join(row_columns.all)}, others than the rows before it; give all the "
                "same ones, with as many hard negatives"
            )
        texts = [row[name] for name in columns.all]
        for name, text in zip(columns.all, texts, strict=True):
            if isinstance(text, str) and text.strip():
                continue
            if name in columns.negatives:
                raise UserError(f"{place} has no {name}; give each row as many hard negatives, as text")
            raise UserError(f"{place} has no anchor or no positive; give it both, as text")
        names = ("anchor", "positive", *negative_columns(len(columns.negatives)))
        grades = {name: text for name, text in row.items() if name in GRADES and name not in columns.all}
        yield dict(zip(names, texts, strict=True)) | grades, place


def negative_columns(count: int) -> list[str]:
    return [f"negative_{number}" for number in range(1, count + 1)]


def text_columns(pairs: Dataset) -> list[str]:
    """The columns that the loss embeds: anchor, positive, and the hard negatives in order."""
    return ["anchor", "positive", *(name for name in pairs.column_names if NEGATIVE.fullmatch(name))]


def read_pairs(data_args: SourceArguments, tokenizer, max_length: int) -> tuple[dict[str, Dataset], dict]:
    """{"train": Dataset, "validation": Dataset} with the texts of each pair and `tokens` of all of them; a manifest.

    The columns are anchor and positive, and negative_1, ... where the data have hard negatives; see `NAMES` for others
    that are known. A text that is an anchor or a positive twice would be a wrong answer to itself: the later pair is
    left out, and counted. That a negative is an anchor, positive or negative elsewhere is up to `order_of_pairs`.

    Raises:
        UserError: no pairs; a column is missing, or empty in a row; rows have different numbers of negatives.
    """
    pairs: dict[str, list[dict]] = {"train": [], "validation": []}
    seen: dict[str, set[str]] = {"train": set(), "validation": set()}
    left_out: dict[str, Counter] = {split: Counter() for split in pairs}
    repaired: Counter = Counter()
    every_source: list[Source] = []
    plan = {"objective": "embed", "max_length": max_length, "eval_fraction": data_args.eval_fraction}
    plan |= {"tokenizer": tokenizer_fingerprint(tokenizer)}
    for given, key, part in (("train", "train_data", "train"), ("validation", "eval_data", "evaluation")):
        sources = parse_sources(getattr(data_args, key) or [], key)
        plan[part] = [identity(source) for source in sources]
        every_source += sources
        negatives = None
        for source in sources:
            for row, _ in _read(source, negatives, repaired):
                negatives = sum(name.startswith("negative_") for name in row)
                split = "validation" if unit_hash(row["anchor"].encode()) < data_args.eval_fraction else given
                both = {row["anchor"], row["positive"]}
                wrong = [row[name] for name in negative_columns(negatives)]
                if seen[split] & both:
                    left_out[split][SECOND_TIME] += 1
                elif both & set(wrong) or len(set(wrong)) < len(wrong):
                    left_out[split][OWN_NEGATIVE] += 1
                else:
                    seen[split].update(both)
                    pairs[split].append(row)
    check_held_out(data_args.eval_fraction, len(pairs["train"]), len(pairs["validation"]), "pairs")
    splits = {}
    for split, key in (("train", "train_data"), ("validation", "eval_data")):
        if not pairs[split]:
            raise UserError(f"{key} has no pairs; give it rows with anchor and positive")
        names = [name for name in pairs[split][0] if name in ("anchor", "positive") or NEGATIVE.fullmatch(name)]
        truncated = 0
        size = sum(len(pair[name].encode()) for pair in pairs[split] for name in names)
        for pair in pairs[split]:
            # Training encodes a text each time it meets it, and cuts it only then.
            pair |= {name: keep_beginning(tokenizer.backend_tokenizer, pair[name], max_length) for name in names}
            ids = tokenizer([pair[name] for name in names], verbose=False)["input_ids"]
            truncated += sum(len(text) > max_length for text in ids)
            pair["tokens"] = sum(min(len(text), max_length) for text in ids)
        splits[split] = {
            "left_out": dict(left_out[split]),
            "truncated": truncated,
            "negatives": len(names) - 2,
            "documents": len(pairs[split]),
            "rows": len(pairs[split]),
            "text_tokens": sum(pair["tokens"] for pair in pairs[split]),
            "bytes": size,
        }
    rows = {split: Dataset.from_list(pairs[split]) for split in pairs}
    more = {"skipped_files": skipped_files(every_source), "repaired": dict(repaired)}
    return rows, plan | {"fingerprint": fingerprint(plan), "splits": splits} | more


def order_of_pairs(size: int, args, texts: Sequence[Sequence[str]] | None = None) -> np.ndarray:
    """The rows of a whole run, int64 (train_pairs,): of each epoch the batches that are full.

    So no batch reaches from one epoch into the next, where it could hold a pair twice: a wrong answer to itself. What
    is left of an epoch, less than a batch, is left out of it; which pairs those are is another matter in each epoch.

    Args:
        args: `EmbedArguments`.
        texts: the texts of each row, where one of them may be in several rows, as hard negatives are: these rows are
            put into different batches, the later one into the next batch that has room for it.

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
                    f"batch_pairs is {args.batch_pairs}, and no so many rows of train_data are without a text in "
                    "common; lower it, or give them other negatives"
                )
        order = np.concatenate([order, rows])
        epoch += 1
    return order[: args.train_pairs]


def left_out_of_epoch(size: int, args, texts: Sequence[Sequence[str]]) -> int:
    """How many pairs are in no batch of the first epoch, beside what is less than a batch."""
    rows = batches_without_repeats(epoch_permutation(args.seed, 0, size).tolist(), texts, args.batch_pairs)
    return size - size % args.batch_pairs - len(rows)


def batches_without_repeats(order: list[int], texts: Sequence[Sequence[str]], batch: int) -> np.ndarray:
    """Full batches in which no text is twice, int64 (batches · batch,), in this order as far as that goes."""
    waiting = deque(order)
    rows: list[int] = []
    while True:
        taken: list[int] = []
        passed: list[int] = []
        used: set[str] = set()
        while waiting and len(taken) < batch:
            row = waiting.popleft()
            if used.isdisjoint(texts[row]):
                taken.append(row)
                used.update(texts[row])
            else:
                passed.append(row)
        if len(taken) < batch:
            return np.array(rows, dtype=np.int64)
        rows += taken
        waiting.extendleft(reversed(passed))
