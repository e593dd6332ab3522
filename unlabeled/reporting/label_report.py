"""What a classifier or a tagger gets right and wrong, as Markdown with a figure."""

from itertools import pairwise
from pathlib import Path

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from unlabeled.data.labeled_rows import LabeledSplit
from unlabeled.data.labels import Task
from unlabeled.reporting.plots import plot_confusion, plot_scatter

LONGEST_CELL = 200  # characters


def regression_report(split: LabeledSplit, predicted: np.ndarray, folder: Path, title: str, examples: int = 5) -> str:
    """The texts whose predicted numbers are furthest from the true ones, and a scatter plot in `folder`.

    Args:
        predicted: float (targets,).
        title: names the run and the split.
    """
    plot_scatter(split.truth, predicted, folder / "predictions.png", title)
    furthest = np.argsort(-np.abs(predicted - split.truth), kind="stable")[:examples]
    lines = ["The texts with the largest errors.", "", "| text | true | predicted |", "|---|---|---|"]
    for index in furthest:
        lines.append(f"| {_cell(split.texts[index])} | {split.truth[index]:.3g} | {predicted[index]:.3g} |")
    return "\n".join([*lines, "", "![Predicted against true numbers](predictions.png)", ""])


def class_report(
    task: Task,
    split: LabeledSplit,
    predicted: np.ndarray,
    entities: dict[str, dict] | None,
    folder: Path,
    title: str,
    examples: int = 5,
) -> str:
    """Precision, recall and F1 of each class, some errors, and a confusion matrix in `folder`.

    Args:
        predicted: int (targets,), class ids.
        entities: {type: {"precision", "recall", "f1", "support"}} of whole entities, where the tags mark some.
        title: names the run and the split.
    """
    classes = np.arange(len(task.names))
    matrix = confusion_matrix(split.truth, predicted, labels=classes)
    plot_confusion(matrix, task.names, folder / "confusion.png", title)
    columns = precision_recall_fscore_support(split.truth, predicted, labels=classes, zero_division=0)
    unit = "tag, counted in words" if task.words else "class, counted in texts"
    lines = [f"Each {unit}.", ""]
    lines += _table(dict(zip(task.names, zip(*columns, strict=True), strict=True)))
    if entities:
        rows = {name: (row["precision"], row["recall"], row["f1"], row["support"]) for name, row in entities.items()}
        lines += ["", "Each type of entity, counted in whole entities.", "", *_table(rows)]
    lines += ["", "![Confusion matrix](confusion.png)", "", "Examples of errors.", ""]
    lines += ["| text | true | predicted |", "|---|---|---|"]
    lines += _errors(task, split, predicted, examples)
    return "\n".join([*lines, ""])


def _errors(task: Task, split: LabeledSplit, predicted: np.ndarray, count: int) -> list[str]:
    """Rows of a table: texts whose prediction is wrong, spread over the split."""
    starts = np.concatenate([[0], np.cumsum(split.counts)])
    is_wrong = split.truth != predicted
    wrong_rows = [row for row, (start, end) in enumerate(pairwise(starts)) if is_wrong[start:end].any()]
    step = max(len(wrong_rows) // count, 1)
    lines = []
    for row in wrong_rows[::step][:count]:
        targets = [target for target in range(starts[row], starts[row + 1]) if is_wrong[target]]
        true = _labels(task, split, row, targets, split.truth)
        wrong = _labels(task, split, row, targets, predicted)
        lines.append(f"| {_cell(split.texts[row])} | {_cell([true])} | {_cell([wrong])} |")
    return lines


def _labels(task: Task, split: LabeledSplit, row: int, targets: list[int], ids: np.ndarray) -> str:
    """The labels of some targets of a row; those of words with the word before them."""
    labels = []
    for target in targets:
        word = f"{split.texts[row][split.words[target]]}: " if task.words else ""
        labels.append(f"{word}{task.names[ids[target]]}")
    return "; ".join(labels)


def _table(rows: dict[str, tuple[float, float, float, float]]) -> list[str]:
    lines = ["| | precision | recall | F1 | support |", "|---|---|---|---|---|"]
    for name, (precision, recall, f1, support) in rows.items():
        lines.append(f"| {_cell([name])} | {precision:.3f} | {recall:.3f} | {f1:.3f} | {support:,.0f} |")
    return lines


def _cell(texts: list[str]) -> str:
    """Text in a cell of a Markdown table."""
    text = " ".join(" ".join(texts).split()).replace("|", "\\|")
    return text if len(text) <= LONGEST_CELL else f"{text[: LONGEST_CELL - 1]}…"
