"""Labeled rows: texts with a class or a number each, or words with tags, read, checked and tokenized."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerFast

from unlabeled.data.files import skipped_files
from unlabeled.data.held_out import check_held_out, unit_hash
from unlabeled.data.identity import fingerprint, identity
from unlabeled.data.label_encoding import FramedText, encode_framed
from unlabeled.data.labels import Label, Task, infer_task, parse_label, target_of
from unlabeled.data.readers import class_names, is_untyped, read_rows
from unlabeled.data.sources import Source
from unlabeled.data.targets import IGNORE_INDEX
from unlabeled.data.tokenization import tokenizer_fingerprint
from unlabeled.errors import UserError

SHOWN_LABELS = 10  # in the run plan


@dataclass
class LabeledSplit:
    """The labeled rows of a split, and what is needed to score predictions.

    Attributes:
        texts: of each row: one text, a pair of texts, or words.
        rows: for the collator: `input_ids` and `type_ids`, int32 (tokens,), and `labels`: a class, a number, or a class
            for each token, -100 where no word starts and for a word without a tag.
        truth: (targets,), the class or number of every target of the split.
        counts: int (rows,), targets of each row.
        visible_targets: for each row the indices in `truth` of the targets that one of its tokens stands for.
        words: int (targets,), which word of its row each target belongs to; 0 for a text.
        truncated: rows that were cut.
        unseen: tagged words without a token, because they were cut off or consist of characters that the tokenizer
            drops.
        untagged: words whose tag is -100.
        left_out: rows that are left out, by reason.
    """

    texts: list
    rows: list[dict]
    truth: np.ndarray
    counts: np.ndarray
    visible_targets: list[np.ndarray]
    words: np.ndarray
    truncated: int = 0
    unseen: int = 0
    untagged: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def lengths(self) -> np.ndarray:
        """int (rows,): tokens of each row."""
        return np.array([len(row["input_ids"]) for row in self.rows])


@dataclass(frozen=True)
class Example:
    """A row as it is read.

    Attributes:
        text: one text, a pair of texts, or words.
        labels: of the text, or of each word.
        row_name: the row, for messages.
    """

    text: list[str]
    labels: list[Label]
    row_name: str


def read_task(
    train: list[Source],
    evaluation: list[Source],
    test: list[Source],
    columns: list[str],
    label_column: str,
    words: bool,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    eval_fraction: float = 0.0,
    problem_type: str | None = None,
) -> tuple[Task, dict[str, LabeledSplit], dict]:
    """Read and tokenize labeled data.

    Texts, bools and whole numbers are classes, and numbers with a fraction are learned as numbers, unless
    `problem_type` says otherwise. A class has one name in every format: 1 in .jsonl, "1" in .csv, 1.0 in .parquet.
    Where the data name their classes (`ClassLabel`), these are the classes, in this order, also those without examples.
    -100 is no target, and rows without any target are left out and counted; -1 is refused. Longer texts are truncated
    to `max_length` tokens, and counted.

    Args:
        train, evaluation, test: the sources of each split.
        columns: of the text, of the two texts of a pair, or of the words.
        label_column: of the labels.
        words: whether each word has a label.
        tokenizer: of the model.
        max_length: tokens of a row at most.
        eval_fraction: share of the training data to hold out if there is no `evaluation`.
        problem_type: "regression", "single_label_classification" or None.

    Returns:
        The task; {"train": ..., "validation": ..., and "test" if there is one}; and the manifest.

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
            if split == "train" and names:
                class_lists[source.path] = names
            for example in _read_examples(source, columns, label_column, words, names, repaired):
                is_held_out = split == "train" and unit_hash(json.dumps(example.text).encode()) < eval_fraction
                examples["validation" if is_held_out else split].append(example)
    check_held_out(eval_fraction, len(examples["train"]), len(examples["validation"]), "examples")
    for split, key in (("train", "train_data"), ("validation", "eval_data")):
        if not examples[split]:
            raise UserError(f"{key} has no examples; set it to a file with some")
    train_labels = ((label, example.row_name) for example in examples["train"] for label in example.labels)
    task = infer_task(train_labels, label_column, words, problem_type, class_lists)
    splits = {
        split: _encode_split(task, split_examples, label_column, tokenizer, max_length, is_training=split == "train")
        for split, split_examples in examples.items()
        if split_examples
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
    manifest = plan | {
        "fingerprint": fingerprint(plan),
        "splits": {name: _count(split) for name, split in splits.items()},
        "skipped_files": skipped_files([*train, *evaluation, *test]),
        "repaired": dict(repaired),
        "labels": task.names,
    }
    return task, splits, manifest


def _count(split: LabeledSplit) -> dict:
    """The counts of a split for the manifest."""
    return {
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


# --- Reading ----------------------------------------------------------------------------------------------------------


def _read_examples(
    source: Source, columns: list[str], label_column: str, words: bool, names: list[str] | None, repaired: Counter
) -> Iterator[Example]:
    untyped = is_untyped(source)
    for row_name, row in read_rows(source, [*columns, label_column], repaired):
        for key, column in [("text_column", column) for column in columns] + [("label_column", label_column)]:
            if column not in row:
                raise UserError(f"{row_name} has no column {column!r}; set {key} to one of: {', '.join(row)}")
        if words:
            yield _read_words(row, columns[0], label_column, names, row_name)
        else:
            text = [row[column] for column in columns]
            if not all(isinstance(part, str) and part.strip() for part in text):
                raise UserError(f"{row_name} has no text in {' and '.join(columns)}; fill it in or leave the row out")
            label = parse_label(row[label_column], label_column, names, untyped, row_name)
            yield Example(text, [label], row_name)


def _read_words(row: dict, column: str, label_column: str, names: list[str] | None, row_name: str) -> Example:
    words = row[column]
    tags = row[label_column]
    for name, value in ((column, words), (label_column, tags)):
        if not isinstance(value, list) or None in value or not value:
            raise UserError(f"{row_name} has no list of words or tags in {name}; correct it or leave the row out")
    if not all(isinstance(word, str) for word in words) or len(words) != len(tags):
        raise UserError(f"{row_name} has {len(words)} words and {len(tags)} tags; each word, a text, needs one tag")
    labels = [parse_label(tag, label_column, names, False, row_name) for tag in tags]
    return Example(words, labels, row_name)


# --- Tokens and targets -----------------------------------------------------------------------------------------------

Targets = dict[int, int | float]  # {word: its class or number}; 0 for a text


def _encode_split(
    task: Task,
    examples: list[Example],
    label_column: str,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    is_training: bool,
) -> LabeledSplit:
    """The tokens and labels of a split.

    Rows without a target are left out; of the training data also those of which no target is among the tokens, since a
    batch of them would have no loss.
    """
    with_targets, left_out, untagged = _find_targets(task, examples, label_column)
    framed_texts = encode_framed(tokenizer, [example.text for example, _ in with_targets], max_length, task.words)
    rows: list[tuple[Example, Targets, FramedText]] = []
    for (example, targets), framed in zip(with_targets, framed_texts, strict=True):
        if is_training and task.words and not any(word in targets for word in framed.first_tokens):
            left_out["no target within max_length"] += 1
        else:
            rows.append((example, targets, framed))
    split = LabeledSplit(
        texts=[example.text for example, _, _ in rows],
        rows=[],
        truth=np.array([target for _, targets, _ in rows for target in targets.values()]),
        counts=np.array([len(targets) for _, targets, _ in rows], dtype=int),
        visible_targets=[],
        words=np.array([word for _, targets, _ in rows for word in targets], dtype=int),
        untagged=untagged,
        left_out=dict(left_out),
    )
    first_target = 0
    for _, targets, framed in rows:
        split.truncated += framed.is_truncated
        row = {"input_ids": framed.input_ids, "type_ids": framed.type_ids}
        if task.words:
            seen = [word for word in framed.first_tokens if word in targets]
            labels = np.full(len(framed.input_ids), IGNORE_INDEX)
            labels[[framed.first_tokens[word] for word in seen]] = [targets[word] for word in seen]
            index_of_word = {word: first_target + index for index, word in enumerate(targets)}
            split.visible_targets.append(np.array([index_of_word[word] for word in seen], dtype=int))
            split.unseen += len(targets) - len(seen)
        else:
            labels = split.truth[first_target]
            split.visible_targets.append(np.array([first_target]))
        split.rows.append(row | {"labels": labels})
        first_target += len(targets)
    return split


def _find_targets(
    task: Task, examples: list[Example], label_column: str
) -> tuple[list[tuple[Example, Targets]], Counter, int]:
    """The examples that have a target, those left out by reason, and the number of words without a target."""
    with_targets: list[tuple[Example, Targets]] = []
    left_out: Counter = Counter()
    untagged = 0
    known: dict[Label, int | float] = {}  # there are few labels and many words
    for example in examples:
        targets: Targets = {}
        for word, label in enumerate(example.labels):
            if task.names and label.is_no_target:
                continue
            if label not in known:
                known[label] = target_of(task, label, label_column, example.row_name)
            targets[word] = known[label]
        if targets:
            with_targets.append((example, targets))
            untagged += len(example.labels) - len(targets)
        else:
            left_out[f"no target ({label_column} {IGNORE_INDEX})"] += 1
    return with_targets, left_out, untagged


# --- Lines for the run plan -------------------------------------------------------------------------------------------


def task_lines(task: Task, splits: dict[str, LabeledSplit]) -> dict[str, str]:
    """Lines for the run plan: the labels and their distribution, a baseline, and what was cut off."""
    lines = _describe_labels(task, splits)
    untagged = [f"{split.untagged:,} words of {name}" for name, split in splits.items() if split.untagged]
    if untagged:
        lines["no target"] = f"{', '.join(untagged)}: their tag is {IGNORE_INDEX}"
    cut = []
    for name, split in splits.items():
        if split.truncated or split.unseen:
            line = f"{split.truncated:,} of {len(split.rows):,} {name} examples"
            if split.unseen:
                line += f" ({split.unseen:,} words scored as {task.names[task.outside]})"
            cut.append(line)
    if cut:
        lines["cut"] = f"to max_length: {', '.join(cut)}"
    return lines


def _describe_labels(task: Task, splits: dict[str, LabeledSplit]) -> dict[str, str]:
    truth = splits["train"].truth
    if not task.names:
        return {"labels": f"numbers from {truth.min():.4g} to {truth.max():.4g}, mean {truth.mean():.4g}"}
    counts = Counter(truth.tolist())
    most_common = counts.most_common(SHOWN_LABELS)
    shown = ", ".join(f"{task.names[class_id]} {count:,}" for class_id, count in most_common)
    if len(counts) > SHOWN_LABELS:
        shown += ", ..."
    majority = most_common[0][0]
    held_out = splits.get("test", splits["validation"]).truth
    return {
        "labels": f"{len(task.names)}: {shown}",
        "baseline": f"always {task.names[majority]}: accuracy {(held_out == majority).mean():.4f}",
    }
