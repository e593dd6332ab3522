"""Labelled data: the keys that name it, texts with a class or a number or words with tags, and their tokens."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from unlabeled.data.control_tokens import control_tokens, is_markup
from unlabeled.data.encoding import BATCH_CHARACTERS, keep_beginning
from unlabeled.data.files import skipped_files
from unlabeled.data.held_out import check_held_out, unit_hash
from unlabeled.data.identity import fingerprint, identity
from unlabeled.data.readers import class_names, is_untyped, read_rows
from unlabeled.data.sources import Source
from unlabeled.data.targets import IGNORE_INDEX
from unlabeled.data.tokenization import tokenizer_fingerprint
from unlabeled.errors import UserError


@dataclass
class Split:
    """Labelled examples: `rows` for the model, and for the score the `truth` of every target, `counts[i]` of row i.

    A row has `input_ids`, `type_ids` (both int32) and `labels`: a class, a number, or a class for each token with -100
    where no word begins, or one without a tag. `places[i]` are the targets of row i that a token stands for, among all
    targets of the split, and `words` (int, targets) says which word of its row each target belongs to (0 for a text).
    """

    texts: list
    rows: list[dict]
    truth: np.ndarray
    counts: np.ndarray
    places: list[np.ndarray]
    words: np.ndarray
    truncated: int = 0
    unseen: int = 0  # tagged words without a token: too far to the right, or of characters that the tokenizer drops
    untagged: int = 0  # words with -100 for a tag
    left_out: dict[str, int] = field(default_factory=dict)  # rows, by reason

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row["input_ids"]) for row in self.rows])


@dataclass
class Task:
    """What is learned: `names` of the classes or tags (empty: a number), `words` whether each word has one."""

    names: list[str]
    words: bool

    @property
    def metric(self) -> str:
        """The module in `metrics` that scores it."""
        entities = self.words and any(name[:2] in ("B-", "I-") for name in self.names)
        return "entities" if entities else "classification" if self.names else "regression"

    @property
    def outside(self) -> int:
        """The tag of a word that the model does not see."""
        return self.names.index("O") if "O" in self.names else 0

    @property
    def config(self) -> dict:
        """What `AutoConfig` has to know."""
        if not self.names:
            return {"num_labels": 1, "problem_type": "regression"}
        kind = {} if self.words else {"problem_type": "single_label_classification"}
        ids = {"label2id": {name: i for i, name in enumerate(self.names)}, "id2label": dict(enumerate(self.names))}
        return {"num_labels": len(self.names), **ids, **kind}


@dataclass(frozen=True)
class Label:
    """What a row says: its `text`, the class if it is one; and its `number` where it is one.

    `whole` is the name of the class that a whole number is in any format: 1, 1.0 and, in a .csv, "1.0" are "1". A text
    such as "007" has none. `untyped`: from a file without types, where "0.5" may be a number or a text.
    """

    text: str
    number: float | None = None
    untyped: bool = False

    @property
    def whole(self) -> str | None:
        if self.number is None or not PLAIN_WHOLE.fullmatch(self.text):
            return None
        return str(int(self.number))

    @property
    def is_fraction(self) -> bool:
        return self.number is not None and not self.number.is_integer()

    @property
    def is_no_target(self) -> bool:
        return self.number == IGNORE_INDEX


NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
PLAIN_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)(\.0+)?")


@dataclass(frozen=True)
class Example:
    """A row: one or two texts, or words; its label, or one for each word; and where it stands, for messages."""

    text: list[str]
    labels: list[Label]
    place: str


def read_task(
    train: list[Source],
    evaluation: list[Source],
    test: list[Source],
    columns: list[str],
    label_column: str,
    words: bool,
    tokenizer,
    max_length: int,
    eval_fraction: float = 0.0,
    problem_type: str | None = None,
) -> tuple[Task, dict[str, Split], dict]:
    """Labelled examples: (task, {"train": Split, "validation": Split, "test": Split if there is one}, manifest).

    Texts, bools and whole numbers are classes, numbers with a fraction are learned as numbers, unless `problem_type`
    says otherwise. A class has one name in every format: 1 in .jsonl, "1" in .csv, 1.0 in .parquet. Where the data name
    their classes (`ClassLabel`), these are the classes, in this order, also those without examples. -100 is no target,
    and rows without any are left out and counted; -1 is refused. Longer texts are cut to `max_length` tokens, and
    counted.

    Raises:
        UserError: naming file and row, for what is missing, does not fit together, or is unknown to the training data.
    """
    if words and len(columns) > 1:
        raise UserError(f"text_column names {' and '.join(columns)}; words are in one column")
    if words and problem_type is not None:
        raise UserError("problem_type is for texts with a label each; remove it")
    if max_length < tokenizer.num_special_tokens_to_add(len(columns) > 1) + len(columns):
        raise UserError(f"max_length {max_length} has no room for a token of the text beside its frame; raise it")
    examples: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    repaired: Counter = Counter()
    class_lists: dict[str, list[str]] = {}  # of the training data, by path
    for split, sources in (("train", train), ("validation", evaluation), ("test", test)):
        for source in sources:
            names = class_names(source, label_column)
            untyped = is_untyped(source)
            if split == "train" and names:
                class_lists[source.path] = names
            for place, row in read_rows(source, [*columns, label_column], repaired):
                example = _example(row, columns, label_column, words, names, untyped, place)
                held_out = split == "train" and unit_hash(json.dumps(example.text).encode()) < eval_fraction
                examples["validation" if held_out else split].append(example)
    check_held_out(eval_fraction, len(examples["train"]), len(examples["validation"]), "examples")
    for split, key in (("train", "train_data"), ("validation", "eval_data")):
        if not examples[split]:
            raise UserError(f"{key} has no examples; set it to a file with some")
    task = _find_task(examples["train"], label_column, words, problem_type, class_lists)
    splits = {
        split: _encode(task, rows, label_column, tokenizer, max_length, training=split == "train")
        for split, rows in examples.items()
        if rows
    }
    for split, key in (("train", "train_data"), ("validation", "eval_data"), ("test", "test_data")):
        if split in splits and not splits[split].rows:
            raise UserError(
                f"{key} has no {label_column} but {IGNORE_INDEX}, which is no target; give it examples with labels"
            )
    plan = {
        "objective": "tag" if words else "classify",
        "max_length": max_length,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "columns": [*columns, label_column],
        "train": [identity(source) for source in train],
        "evaluation": [identity(source) for source in evaluation],
        "test": [identity(source) for source in test],
        "eval_fraction": eval_fraction,
        "problem_type": problem_type,
    }
    counts = {
        name: {
            "documents": len(split.rows),
            "rows": len(split.rows),
            "text_tokens": int(split.lengths.sum()),
            "bytes": sum(len(" ".join(text).encode()) for text in split.texts),
            "targets": len(split.truth),
            "truncated": split.truncated,
            "unseen_words": split.unseen,
            "untagged_words": split.untagged,
            "left_out": split.left_out,
        }
        for name, split in splits.items()
    }
    skipped = skipped_files([*train, *evaluation, *test])
    more = {"skipped_files": skipped, "repaired": dict(repaired), "labels": task.names}
    return task, splits, plan | {"fingerprint": fingerprint(plan), "splits": counts} | more


def _example(
    row: dict,
    columns: list[str],
    label_column: str,
    words: bool,
    names: list[str] | None,
    untyped: bool,
    place: str,
) -> Example:
    """One row, checked. `names` are those of a `ClassLabel`."""
    for key, name in [("text_column", name) for name in columns] + [("label_column", label_column)]:
        if name not in row:
            raise UserError(f"{place} has no column {name!r}; set {key} to one of: {', '.join(row)}")
    label = row[label_column]
    if not words:
        text = [row[name] for name in columns]
        if not all(isinstance(part, str) and part.strip() for part in text):
            raise UserError(f"{place} has no text in {' and '.join(columns)}; fill it in or leave the row out")
        return Example(text, [_label(label, label_column, names, untyped, place)], place)
    text = row[columns[0]]
    for name, value in ((columns[0], text), (label_column, label)):
        if not isinstance(value, list) or None in value or not value:
            raise UserError(f"{place} has no list of words or tags in {name}; correct it or leave the row out")
    if not all(isinstance(word, str) for word in text) or len(text) != len(label):
        raise UserError(f"{place} has {len(text)} words and {len(label)} tags; each word, a text, needs one tag")
    return Example(text, [_label(tag, label_column, names, False, place) for tag in label], place)


def _label(value: object, column: str, names: list[str] | None, untyped: bool, place: str) -> Label:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise UserError(f"{place} has no label in {column}; fill it in or leave the row out")
    if not isinstance(value, str | int | float) or (isinstance(value, float) and math.isinf(value)):
        kind = value if isinstance(value, float) else f"a {type(value).__name__}"
        raise UserError(f"{place} has {kind} as {column}; a label is a text or a number")
    if isinstance(value, bool):
        return Label(str(value))
    if isinstance(value, int | float) and names and value != IGNORE_INDEX:
        if value not in range(len(names)):
            raise UserError(
                f"{place} has the label {value}, and the features of its file name the classes 0 to {len(names) - 1}; "
                f"leave the row out, or write {IGNORE_INDEX} where there is no label"
            )
        return Label(names[int(value)])
    if isinstance(value, int | float):
        whole = float(value).is_integer()
        return Label(str(int(value)) if whole else str(value), float(value))
    is_number = untyped and NUMBER.fullmatch(value.strip())
    return Label(value.strip(), float(value), untyped=True) if is_number else Label(value, untyped=untyped)


def _find_task(
    examples: list[Example],
    label_column: str,
    words: bool,
    problem_type: str | None,
    class_lists: dict[str, list[str]],
) -> Task:
    """The classes of the training data, or that it has numbers."""
    labels = [(label, example.place) for example in examples for label in example.labels if not label.is_no_target]
    if class_lists:
        if problem_type == "regression":
            raise UserError(f"problem_type: regression, but the data name the classes of {label_column}; remove it")
        return Task(_common_names(class_lists, label_column), words)
    texts = [place for label, place in labels if label.number is None]
    fractions = [(label, place) for label, place in labels if label.is_fraction]
    if words and fractions and not texts:
        label, place = fractions[0]
        raise UserError(f"{place} has the tag {label.text}; a tag is a text or a whole number")
    if problem_type == "regression":
        if texts:
            raise UserError(f"{texts[0]} has a text as {label_column}, and problem_type is regression; correct either")
        return Task([], words=False)
    if problem_type is None and fractions and not texts:
        return Task([], words=False)
    if problem_type is None and any(not label.untyped for label, _ in fractions):
        raise UserError(f"{texts[0]} has a text as {label_column} where others have numbers; correct it")
    # In a column of numbers, 1.0 is the class 1; beside texts, a .csv has texts only.
    names = {label.text if texts or label.whole is None else label.whole for label, _ in labels}
    if len(names) < 2:
        name = f"the label {min(names)!r}" if names else f"no label, or {IGNORE_INDEX},"
        raise UserError(f"all of train_data has {name} in {label_column}; there is nothing to learn")
    numeric = all(NUMBER.fullmatch(name) for name in names)
    return Task(sorted(names, key=(lambda name: (float(name), name)) if numeric else None), words)


def _common_names(class_lists: dict[str, list[str]], label_column: str) -> list[str]:
    first, *others = class_lists.items()
    for path, names in others:
        if names != first[1]:
            raise UserError(
                f"train_data: {first[0]} and {path} name the classes of {label_column} differently; give them the same"
            )
    if len(set(first[1])) < len(first[1]):
        raise UserError(f"{first[0]} has a name of {label_column} twice in its features; give each class its own")
    return first[1]


def _target(task: Task, label: Label, label_column: str, place: str) -> int | float:
    """The id of a class, or the number."""
    if not task.names:
        if label.number is None or label.is_no_target:  # Trainer does not count a -100
            raise UserError(
                f"{place} has {label.text!r} as {label_column}; it has to be a number, and not {IGNORE_INDEX}"
            )
        return label.number
    if label.number == -1:
        raise UserError(
            f"{place} has the label -1 in {label_column}, which stands for a missing one in many data sets; leave the "
            f"row out or write {IGNORE_INDEX} there, or give the class another name"
        )
    for name in (label.text, label.whole):
        if name in task.names:
            return task.names.index(name)
    raise UserError(
        f"{place} has the label {label.text!r}, which train_data does not have; correct {label_column}"
        + (", or set problem_type: regression" if label.is_fraction and not task.words else "")
    )


def _encode(
    task: Task, examples: list[Example], label_column: str, tokenizer, max_length: int, training: bool
) -> Split:
    """Tokens and labels of one split. The frame around a text is the tokenizer's own, as in a pipeline.

    Rows without a target are left out; of the training data also those of which no target is among the tokens, since a
    batch of them would have no loss.
    """
    targets, left_out, untagged = _targets(task, examples, label_column)
    encodings = encode(tokenizer, [example.text for example, _ in targets], max_length, task.words)
    rows = []
    for (example, classes), encoding in zip(targets, encodings, strict=True):
        if training and task.words and not any(word in classes for word in encoding["first"]):
            left_out["no target within max_length"] += 1
        else:
            rows.append((example, classes, encoding))
    split = Split(
        texts=[example.text for example, *_ in rows],
        rows=[],
        truth=np.array([target for _, classes, _ in rows for target in classes.values()]),
        counts=np.array([len(classes) for _, classes, _ in rows], dtype=int),
        places=[],
        words=np.array([word for _, classes, _ in rows for word in classes], dtype=int),
        untagged=untagged,
        left_out=dict(left_out),
    )
    start = 0
    for _, classes, encoding in rows:
        split.truncated += encoding["truncated"]
        ids = encoding["input_ids"]
        row = {"input_ids": ids, "type_ids": encoding["type_ids"]}
        if task.words:
            first = encoding["first"]
            place_of = {word: start + number for number, word in enumerate(classes)}
            seen = [word for word in first if word in classes]
            labels = np.full(len(ids), IGNORE_INDEX)
            labels[[first[word] for word in seen]] = [classes[word] for word in seen]
            split.places.append(np.array([place_of[word] for word in seen], dtype=int))
            split.unseen += len(classes) - len(seen)
        else:
            labels = split.truth[start]
            split.places.append(np.array([start]))
        split.rows.append(row | {"labels": labels})
        start += len(classes)
    return split


def _targets(
    task: Task, examples: list[Example], label_column: str
) -> tuple[list[tuple[Example, dict[int, int | float]]], Counter, int]:
    """The examples that have a target, with {word: its class or number}; those left out; words without a target."""
    targets: list[tuple[Example, dict[int, int | float]]] = []
    left_out: Counter = Counter()
    untagged = 0
    known: dict[Label, int | float] = {}  # few labels, many words
    for example in examples:
        classes = {}
        for word, label in enumerate(example.labels):
            if task.names and label.is_no_target:
                continue
            if label not in known:
                known[label] = _target(task, label, label_column, example.place)
            classes[word] = known[label]
        if classes:
            targets.append((example, classes))
            untagged += len(example.labels) - len(classes)
        else:
            left_out[f"no target ({label_column} {IGNORE_INDEX})"] += 1
    return targets, left_out, untagged


def encode(tokenizer, texts: list[list[str]], max_length: int, words: bool) -> list[dict]:
    """Tokens of texts, of pairs of texts, or of words, with the tokenizer's frame, cut on the right to `max_length`.

    Words after the first are given a space, so that each tokenizer cuts them as it would in a running text; byte-level
    ones have other tokens for the beginning of a text. A control token that is written in a text is text, or nothing.

    Returns:
        For each `input_ids` and `type_ids`, int32 (tokens,), `first` {word: the place of its first token}, `truncated`.
    """
    backend = tokenizer.backend_tokenizer
    truncation, padding, split = backend.truncation, backend.padding, backend.encode_special_tokens
    backend.no_padding()
    backend.enable_truncation(max_length, strategy="longest_first", direction="right")
    backend.encode_special_tokens = True  # a misnomer, see `tokenization.encode_batch`
    control = {index for token, index in control_tokens(tokenizer).items() if not is_markup(token, tokenizer)}
    control -= {tokenizer.unk_token_id}
    rows: list[dict] = []
    try:
        for batch in _batches(backend, texts, max_length, words):
            encodings = backend.encode_batch(batch, is_pretokenized=words)
            rows += [_row(encoding, tokenizer, control, words) for encoding in encodings]
    finally:
        backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
        backend.encode_special_tokens = split
    return rows


def _batches(backend: Tokenizer, texts: list[list[str]], max_length: int, words: bool) -> Iterator[list]:
    """What `encode_batch` takes, in batches of bounded size; of long texts the beginning."""
    batch: list = []
    size = 0
    for text in texts:
        if words:
            item: Any = [word if i == 0 else f" {word}" for i, word in enumerate(text)]
        else:
            parts = [keep_beginning(backend, part, max_length) for part in text]
            item = parts[0] if len(parts) == 1 else tuple(parts)
        length = len(item) if isinstance(item, str) else sum(map(len, item))
        if batch and size + length > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += length
    if batch:
        yield batch


def _row(encoding: Encoding, tokenizer, control: set[int], words: bool) -> dict:
    keep = np.array(encoding.special_tokens_mask, dtype=bool) | ~np.isin(encoding.ids, list(control))
    ids = np.array(encoding.ids, dtype=np.int32)[keep]
    types = np.array(encoding.type_ids, dtype=np.int32)[keep]
    first: dict[int, int] = {}
    for place, word in enumerate(np.array(encoding.word_ids, dtype=float)[keep]):  # NaN in the frame
        if words and not np.isnan(word):
            first.setdefault(int(word), place)
    if not len(ids):  # control characters, for a tokenizer without a frame
        ids, types = np.array([tokenizer.pad_token_id], np.int32), np.zeros(1, np.int32)
    return {"input_ids": ids, "type_ids": types, "first": first, "truncated": bool(encoding.overflowing)}


def task_lines(task: Task, splits: dict[str, Split]) -> dict[str, str]:
    """Lines for the plan: the labels and how they are distributed, and what was cut off."""
    truth = splits["train"].truth
    if not task.names:
        lines = {"labels": f"numbers from {truth.min():.4g} to {truth.max():.4g}, mean {truth.mean():.4g}"}
    else:
        counts = Counter(truth.tolist())
        shown = ", ".join(f"{task.names[i]} {count:,}" for i, count in counts.most_common(10))
        lines = {"labels": f"{len(task.names)}: {shown}" + (", ..." if len(counts) > 10 else "")}
        most_common = counts.most_common(1)[0][0]
        held_out = splits.get("test", splits["validation"]).truth
        lines["baseline"] = f"always {task.names[most_common]}: accuracy {(held_out == most_common).mean():.4f}"
    untagged = [f"{split.untagged:,} words of {name}" for name, split in splits.items() if split.untagged]
    if untagged:
        lines["no target"] = f"{', '.join(untagged)}: their tag is {IGNORE_INDEX}"
    cut = ", ".join(
        f"{split.truncated:,} of {len(split.rows):,} {name} examples"
        + (f" ({split.unseen:,} words scored as {task.names[task.outside]})" if split.unseen else "")
        for name, split in splits.items()
        if split.truncated or split.unseen
    )
    return lines | ({"cut": f"to max_length: {cut}"} if cut else {})
