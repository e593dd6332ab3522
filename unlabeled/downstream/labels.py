"""Labelled data: the keys that name it, texts with a class or a number or words with tags, and their tokens."""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from transformers import TrainingArguments

from unlabeled import UserError
from unlabeled.arguments import REFUSED, SourceArguments, TuningArguments
from unlabeled.budget import Budget, plan_steps
from unlabeled.corpus import Source, check_held_out, identity, read_examples, unit_hash
from unlabeled.data.files import skipped_files
from unlabeled.data.identity import fingerprint
from unlabeled.losses import IGNORE
from unlabeled.parsing import yaml_value
from unlabeled.tokenization import tokenizer_fingerprint


@dataclass
class TaskArguments(SourceArguments):
    """Labelled data: rows of .jsonl, .parquet or .csv."""

    text_column: str = field(default="text", metadata={"help": "the column of texts, a list of two, or that of words"})
    label_column: str = field(default="label", metadata={"help": "their classes or numbers, or a tag for each word"})
    test_data: str | None = field(default=None, metadata={"help": "scored once, at the end; like train_data"})
    is_causal: bool | None = field(
        default=None, metadata={"help": "false lets each token see those after it, true forbids it; as the model is"}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("test_data", "text_column"):
            value = getattr(self, name)
            if isinstance(value, str) and value[:1] in ("[", "{"):
                setattr(self, name, yaml_value(name, value))
        self.columns = self.text_column if isinstance(self.text_column, list) else [self.text_column]
        if len(self.columns) not in (1, 2) or not all(isinstance(column, str) for column in self.columns):
            raise UserError(f"text_column is {self.text_column!r}; name one column, or a list of two")


@dataclass
class DownstreamArguments(TuningArguments, TrainingArguments):
    """`TrainingArguments` with a budget in examples."""

    train_examples: int | None = field(default=None, metadata={"help": "to train on, a multiple of batch_examples"})
    batch_examples: int | None = field(default=None, metadata={"help": "examples in a step over all processes"})
    early_stopping_patience: int = field(
        default=0, metadata={"help": "stop after so many evaluations without a better one, keep the best (0: never)"}
    )
    max_loss_rise: float = field(default=0.0, metadata={"help": "as in pretraining; the loss of a few examples jumps"})

    refused: ClassVar[dict[str, str]] = REFUSED | {
        "train_tokens": "set train_examples instead", "batch_tokens": "set batch_examples instead",
        "metric_for_best_model": "it follows from the labels", "load_best_model_at_end": "set early_stopping_patience",
    }  # fmt: skip
    unit: ClassVar[str] = "examples"

    def __post_init__(self):
        super().__post_init__()
        if self.early_stopping_patience < 0:
            raise UserError(f"early_stopping_patience is {self.early_stopping_patience}; set it to 0 or more")
        if self.early_stopping_patience:
            if self.eval_strategy != "steps" or self.save_strategy != "steps" or self.eval_steps != self.save_steps:
                raise UserError(
                    "early_stopping_patience needs eval_strategy: steps, and save_steps equal to eval_steps"
                )
            self.load_best_model_at_end = self.restore_callback_states_from_checkpoint = True

    def plan_budget(self) -> Budget:
        rows = (1, self.per_device_train_batch_size, self.processes)
        return plan_steps(self.train_examples, self.batch_examples, *rows, unit=self.unit)

    def count_tokens(self, lengths: np.ndarray) -> None:
        """Set the tokens that follow from the examples of the run: the length of each."""
        self.train_tokens = int(lengths.sum())
        self.batch_tokens = self.train_tokens / self.max_steps


@dataclass
class Split:
    """Labelled examples: `rows` for the model, and for the score the `truth` of every target, `counts[i]` of row i.

    A row has `input_ids`, `type_ids` (both int32) and `labels`: a class, a number, or a class for each token with -100
    where no word begins. `places[i]` are the targets of row i that a token stands for, among all targets of the split.
    """

    texts: list
    rows: list[dict]
    truth: np.ndarray
    counts: np.ndarray
    places: list[np.ndarray]
    truncated: int
    unseen: int  # words without a token: too far to the right, or of characters that the tokenizer drops

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
) -> tuple[Task, dict[str, Split], dict]:
    """Labelled examples: (task, {"train": Split, "validation": Split, "test": Split if there is one}, manifest).

    Texts, bools and whole numbers are classes, numbers with a fraction are learned as numbers. Longer texts are cut to
    `max_length` tokens, and counted.

    Raises:
        UserError: naming file and row, for what is missing, does not fit together, or is unknown to the training data.
    """
    if words and len(columns) > 1:
        raise UserError(f"text_column names {' and '.join(columns)}; words are in one column")
    if max_length < tokenizer.num_special_tokens_to_add(len(columns) > 1) + len(columns):
        raise UserError(f"max_length {max_length} has no room for a token of the text beside its frame; raise it")
    read: dict[str, list] = {"train": [], "validation": [], "test": []}
    for given, sources in (("train", train), ("validation", evaluation), ("test", test)):
        for source in sources:
            for number, (where, row) in enumerate(read_examples(source)):
                text, label = _example(row, columns, label_column, words, f"row {number} of {where}")
                held_out = given == "train" and unit_hash(json.dumps(text).encode()) < eval_fraction
                read["validation" if held_out else given].append((text, label, f"row {number} of {where}"))
    check_held_out(eval_fraction, len(read["train"]), len(read["validation"]), "examples")
    for split, key in (("train", "train_data"), ("validation", "eval_data")):
        if not read[split]:
            raise UserError(f"{key} has no examples; set it to a file with some")
    task = _find_task(read["train"], label_column, words)
    splits = {
        name: _encode(task, examples, label_column, tokenizer, max_length)
        for name, examples in read.items()
        if examples
    }
    plan = {
        "objective": "tag" if words else "classify",
        "max_length": max_length,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "columns": [*columns, label_column],
        "train": [identity(source) for source in train],
        "evaluation": [identity(source) for source in evaluation],
        "test": [identity(source) for source in test],
        "eval_fraction": eval_fraction,
    }
    counts = {
        name: {
            "documents": len(split.rows),
            "rows": len(split.rows),
            "text_tokens": int(split.lengths.sum()),
            "bytes": sum(len(" ".join(text).encode()) for text in split.texts),
            "targets": len(split.truth),
            "left_out": {},
            "truncated": split.truncated,
            "unseen_words": split.unseen,
        }
        for name, split in splits.items()
    }
    more = {"skipped_files": skipped_files([*train, *evaluation, *test]), "labels": task.names}
    return task, splits, plan | {"fingerprint": fingerprint(plan), "splits": counts} | more


def _example(row: dict, columns: list[str], label_column: str, words: bool, place: str) -> tuple[list[str], object]:
    """The one or two texts of a row, or its words; and its label, or theirs."""
    for key, name in [("text_column", name) for name in columns] + [("label_column", label_column)]:
        if name not in row:
            raise UserError(f"{place} has no column {name!r}; set {key} to one of: {', '.join(row)}")
    label = row[label_column]
    if not words:
        text = [row[name] for name in columns]
        if not all(isinstance(part, str) and part.strip() for part in text):
            raise UserError(f"{place} has no text in {' and '.join(columns)}; fill it in or leave the row out")
        if (isinstance(label, str) and not label) or label is None or (isinstance(label, float) and math.isnan(label)):
            raise UserError(f"{place} has no label in {label_column}; fill it in or leave the row out")
        if not isinstance(label, str | int | float):
            raise UserError(f"{place} has a {type(label).__name__} as {label_column}; a label is a text or a number")
        return text, label
    text = row[columns[0]]
    for name, value in ((columns[0], text), (label_column, label)):
        if not isinstance(value, list) or None in value or not value:
            raise UserError(f"{place} has no list of words or tags in {name}; correct it or leave the row out")
    if not all(isinstance(word, str) for word in text) or len(text) != len(label):
        raise UserError(f"{place} has {len(text)} words and {len(label)} tags; each word, a text, needs one tag")
    return text, label


def _find_task(examples: list, label_column: str, words: bool) -> Task:
    labels = [label for _, found, _ in examples for label in (found if words else [found])]
    if not words and any(isinstance(label, float) for label in labels):
        texts = next((place for _, label, place in examples if isinstance(label, str)), None)
        if texts:
            raise UserError(f"{texts} has a text as {label_column} where others have numbers; correct it")
        return Task([], words=False)
    kinds = {type(label) for label in labels}
    names = sorted(set(labels), key=str if len(kinds) > 1 else None)
    if len(names) < 2:
        raise UserError(f"all of train_data has the label {names[0]!r} in {label_column}; there is nothing to learn")
    return Task([str(name) for name in names], words)


def _encode(task: Task, examples: list, label_column: str, tokenizer, max_length: int) -> Split:
    """Tokens and labels of one split. The frame around a text is the tokenizer's own, as in a pipeline."""
    known = {name: i for i, name in enumerate(task.names)}
    truth, counts = [], []
    for _, found, place in examples:
        labels = found if task.words else [found]
        for label in labels:
            if task.names and str(label) not in known:
                raise UserError(
                    f"{place} has the label {label!r}, which train_data does not have; correct {label_column}"
                )
            if not task.names and (isinstance(label, str) or float(label) == IGNORE):  # Trainer does not count a -100
                raise UserError(f"{place} has {label!r} as {label_column}; it has to be a number, and not {IGNORE}")
        truth += [known[str(label)] if task.names else float(label) for label in labels]
        counts.append(len(labels))
    split = Split([text for text, *_ in examples], [], np.array(truth), np.array(counts), [], 0, 0)
    encodings = encode(tokenizer, split.texts, max_length, task.words)
    start = 0
    for encoding, count in zip(encodings, counts, strict=True):
        split.truncated += encoding["truncated"]
        ids, first = encoding["input_ids"], encoding["first"]
        row = {"input_ids": ids, "type_ids": encoding["type_ids"]}
        if task.words:
            labels = np.full(len(ids), IGNORE)
            labels[list(first.values())] = split.truth[start + np.array(list(first), dtype=int)]
            split.places.append(start + np.array(list(first), dtype=int))
            split.unseen += count - len(first)
        else:
            labels = split.truth[start]
            split.places.append(np.array([start]))
        split.rows.append(row | {"labels": labels})
        start += count
    return split


def encode(tokenizer, texts: list[list[str]], max_length: int, words: bool) -> list[dict]:
    """Tokens of texts, of pairs of texts, or of words, with the tokenizer's frame, cut on the right to `max_length`.

    Words after the first are given a space, so that each tokenizer cuts them as it would in a running text; byte-level
    ones have other tokens for the beginning of a text. A special token that is written in a text is text, or nothing.

    Returns:
        For each `input_ids` and `type_ids`, int32 (tokens,), `first` {word: the place of its first token}, `truncated`.
    """
    backend = tokenizer.backend_tokenizer
    truncation, padding, split = backend.truncation, backend.padding, backend.encode_special_tokens
    backend.no_padding()
    backend.enable_truncation(max_length, strategy="longest_first", direction="right")
    backend.encode_special_tokens = True  # a misnomer, see `tokenization.encode_batch`
    if words:
        inputs = [[word if i == 0 else f" {word}" for i, word in enumerate(text)] for text in texts]
    else:
        inputs = [text[0] if len(text) == 1 else tuple(text) for text in texts]
    try:
        encodings = backend.encode_batch(inputs, is_pretokenized=words)
    finally:
        backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
        backend.encode_special_tokens = split
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= {tokenizer.unk_token_id}
    found = []
    for encoding in encodings:
        keep = np.array(encoding.special_tokens_mask, dtype=bool) | ~np.isin(encoding.ids, list(special))
        ids = np.array(encoding.ids, dtype=np.int32)[keep]
        types = np.array(encoding.type_ids, dtype=np.int32)[keep]
        first: dict[int, int] = {}
        for place, word in enumerate(np.array(encoding.word_ids, dtype=float)[keep]):  # NaN in the frame
            if words and not np.isnan(word):
                first.setdefault(int(word), place)
        if not len(ids):  # control characters, for a tokenizer without a frame
            ids, types = np.array([tokenizer.pad_token_id], np.int32), np.zeros(1, np.int32)
        found.append({"input_ids": ids, "type_ids": types, "first": first, "truncated": bool(encoding.overflowing)})
    return found


def task_lines(task: Task, splits: dict[str, Split]) -> dict[str, str]:
    """Lines for the plan: the labels and how they are distributed, and what was cut off."""
    truth = splits["train"].truth
    if not task.names:
        lines = {"labels": f"numbers from {truth.min():.4g} to {truth.max():.4g}, mean {truth.mean():.4g}"}
    else:
        counts = Counter(truth.tolist())
        shown = ", ".join(f"{task.names[i]} {count:,}" for i, count in counts.most_common(10))
        lines = {"labels": f"{len(task.names)}: {shown}" + (", ..." if len(counts) > 10 else "")}
        usual = counts.most_common(1)[0][0]
        held_out = splits.get("test", splits["validation"]).truth
        lines["baseline"] = f"always {task.names[usual]}: accuracy {(held_out == usual).mean():.4f}"
    cut = ", ".join(
        f"{split.truncated:,} of {len(split.rows):,} {name} examples"
        + (f" ({split.unseen:,} words scored as {task.names[task.outside]})" if split.unseen else "")
        for name, split in splits.items()
        if split.truncated or split.unseen
    )
    return lines | ({"cut": f"to max_length: {cut}"} if cut else {})
