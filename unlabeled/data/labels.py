"""Labels of texts and words: their types in different file formats, and what task they define."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from unlabeled.data.targets import IGNORE_INDEX
from unlabeled.errors import UserError

NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
PLAIN_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)(\.0+)?")
ENTITY_PREFIXES = ("B-", "I-")


@dataclass
class Task:
    """What is learned.

    Attributes:
        names: of the classes or tags, in the order of their ids; empty if numbers are learned.
        words: whether each word has a label.
    """

    names: list[str]
    words: bool

    @property
    def metric(self) -> str:
        """The module in `training/metrics` that scores it."""
        if self.words and any(name.startswith(ENTITY_PREFIXES) for name in self.names):
            return "entities"
        return "classification" if self.names else "regression"

    @property
    def outside(self) -> int:
        """The id of the tag of a word that the model does not see."""
        return self.names.index("O") if "O" in self.names else 0

    @property
    def config(self) -> dict:
        """The keys of the model's config that follow from the task."""
        if not self.names:
            return {"num_labels": 1, "problem_type": "regression"}
        config = {
            "num_labels": len(self.names),
            "label2id": {name: class_id for class_id, name in enumerate(self.names)},
            "id2label": dict(enumerate(self.names)),
        }
        if not self.words:
            config["problem_type"] = "single_label_classification"
        return config


@dataclass(frozen=True)
class Label:
    """The label of a text or a word.

    Attributes:
        text: the label as text; the name of the class if it is one.
        number: its value where it is a number.
        untyped: from a file without types, where "0.5" may be a number or a text.
    """

    text: str
    number: float | None = None
    untyped: bool = False

    @property
    def whole(self) -> str | None:
        """The name of the class that a whole number is in any format: 1, 1.0 and, in a .csv, "1.0" are "1".

        None for a number with a fraction and for a text such as "007".
        """
        if self.number is None or not PLAIN_WHOLE.fullmatch(self.text):
            return None
        return str(int(self.number))

    @property
    def is_fraction(self) -> bool:
        """Whether it is a number with a fraction."""
        return self.number is not None and not self.number.is_integer()

    @property
    def is_no_target(self) -> bool:
        """Whether it is -100, which stands for no label."""
        return self.number == IGNORE_INDEX


def parse_label(value: object, column: str, class_names: list[str] | None, untyped: bool, row_name: str) -> Label:
    """The label in a column of a row.

    Args:
        value: what the row holds.
        column: of the labels.
        class_names: those of a `ClassLabel`, of which the values are indices.
        untyped: whether the values are texts because the file has no types.
        row_name: the row, for messages.

    Raises:
        UserError: there is no label, or something that cannot be one.
    """
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise UserError(f"{row_name} has no label in {column}; fill it in or leave the row out")
    if not isinstance(value, str | int | float) or (isinstance(value, float) and math.isinf(value)):
        kind = value if isinstance(value, float) else f"a {type(value).__name__}"
        raise UserError(f"{row_name} has {kind} as {column}; a label is a text or a number")
    if isinstance(value, bool):
        return Label(str(value))
    if isinstance(value, int | float):
        if class_names and value != IGNORE_INDEX:
            return Label(_class_name(value, class_names, row_name))
        text = str(int(value)) if float(value).is_integer() else str(value)
        return Label(text, float(value))
    if untyped and NUMBER.fullmatch(value.strip()):
        return Label(value.strip(), float(value), untyped=True)
    return Label(value, untyped=untyped)


def _class_name(value: int | float, class_names: list[str], row_name: str) -> str:
    if value not in range(len(class_names)):
        raise UserError(
            f"{row_name} has the label {value}, and the features of its file name the classes 0 to "
            f"{len(class_names) - 1}; leave the row out, or write {IGNORE_INDEX} where there is no label"
        )
    return class_names[int(value)]


def infer_task(
    labels: Iterable[tuple[Label, str]],
    label_column: str,
    words: bool,
    problem_type: str | None,
    class_lists: dict[str, list[str]],
) -> Task:
    """The task of the training data: its classes, or that it has numbers.

    Args:
        labels: all labels, each with the name of its row.
        label_column: for messages.
        words: whether each word has a label.
        problem_type: "regression", "single_label_classification" or None, which follows the labels.
        class_lists: the class names of each source that brings its own, by path.

    Raises:
        UserError: the labels do not fit together, or to `problem_type`, or there is only one class.
    """
    if class_lists:
        if problem_type == "regression":
            raise UserError(f"problem_type: regression, but the data name the classes of {label_column}; remove it")
        return Task(_common_class_names(class_lists, label_column), words)
    labels = [(label, row_name) for label, row_name in labels if not label.is_no_target]
    rows_with_text = [row_name for label, row_name in labels if label.number is None]
    fractions = [(label, row_name) for label, row_name in labels if label.is_fraction]
    if words and fractions and not rows_with_text:
        label, row_name = fractions[0]
        raise UserError(f"{row_name} has the tag {label.text}; a tag is a text or a whole number")
    if problem_type == "regression":
        if rows_with_text:
            raise UserError(
                f"{rows_with_text[0]} has a text as {label_column}, and problem_type is regression; correct either"
            )
        return Task([], words=False)
    if problem_type is None and fractions and not rows_with_text:
        return Task([], words=False)
    if problem_type is None and any(not label.untyped for label, _ in fractions):
        raise UserError(f"{rows_with_text[0]} has a text as {label_column} where others have numbers; correct it")
    if rows_with_text:  # beside texts, "1.0" in a .csv is a text as well
        names = {label.text for label, _ in labels}
    else:
        names = {label.text if label.whole is None else label.whole for label, _ in labels}
    if len(names) < 2:
        name = f"the label {min(names)!r}" if names else f"no label, or {IGNORE_INDEX},"
        raise UserError(f"all of train_data has {name} in {label_column}; there is nothing to learn")
    return Task(_sort_names(names), words)


def _sort_names(names: set[str]) -> list[str]:
    """Numbers by value, otherwise in alphabetical order."""
    if all(NUMBER.fullmatch(name) for name in names):
        return sorted(names, key=lambda name: (float(name), name))
    return sorted(names)


def _common_class_names(class_lists: dict[str, list[str]], label_column: str) -> list[str]:
    (first_path, first_names), *others = class_lists.items()
    for path, names in others:
        if names != first_names:
            raise UserError(
                f"train_data: {first_path} and {path} name the classes of {label_column} differently; give them the "
                "same"
            )
    if len(set(first_names)) < len(first_names):
        raise UserError(f"{first_path} has a name of {label_column} twice in its features; give each class its own")
    return first_names


def target_of(task: Task, label: Label, label_column: str, row_name: str) -> int | float:
    """The id of the class, or the number, that a label stands for.

    Raises:
        UserError: the training data have no such class, or it is not a number.
    """
    if not task.names:
        if label.number is None or label.is_no_target:  # Trainer does not count -100 as a target
            raise UserError(
                f"{row_name} has {label.text!r} as {label_column}; it has to be a number, and not {IGNORE_INDEX}"
            )
        return label.number
    if label.number == -1:
        raise UserError(
            f"{row_name} has the label -1 in {label_column}, which stands for a missing one in many data sets; leave "
            f"the row out or write {IGNORE_INDEX} there, or give the class another name"
        )
    for name in (label.text, label.whole):
        if name in task.names:
            return task.names.index(name)
    message = f"{row_name} has the label {label.text!r}, which train_data does not have; correct {label_column}"
    if label.is_fraction and not task.words:
        message += ", or set problem_type: regression"
    raise UserError(message)
