"""Plots as PNG files: the loss of a run, a confusion matrix, predicted against true numbers, and a budget.

Each file is written as a whole or not at all. pyplot, and with it the choice of a backend, is never involved.
"""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from unlabeled.planning import format_count

if TYPE_CHECKING:
    from unlabeled.planning.scaling_laws import ScalingLaw

INK = "#1f2328"
GREY = "#656d76"
RULE = "#e4e7eb"
TRAINING_COLOR = "#3b6fb6"
EVALUATION_COLOR = "#d1603d"
CONTOUR_COLOR = "#b9c7d6"
DASHES = (0, (4, 3))
HALO = [withStroke(linewidth=3, foreground="white")]  # keeps a label readable where a line passes behind it
MAX_CLASSES = 20  # of a confusion matrix
STYLE = {
    "figure.dpi": 200,
    "savefig.dpi": 200,
    "figure.facecolor": "white",
    "figure.constrained_layout.w_pad": 0.18,
    "figure.constrained_layout.h_pad": 0.15,
    "text.parse_math": False,  # names may contain "$"
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlepad": 12,
    "axes.labelsize": 11,
    "axes.labelcolor": GREY,
    "axes.edgecolor": RULE,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.labelcolor": GREY,
    "ytick.labelcolor": GREY,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
    "legend.fontsize": 10,
    "legend.labelcolor": GREY,
    "legend.frameon": False,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0.2,
    "legend.handlelength": 1.4,
    "legend.handletextpad": 0.6,
    "legend.columnspacing": 1.6,
}


def plot_loss(
    history: list[dict],
    path: str | os.PathLike,
    title: str,
    unit: str = "nats per token",
    references: Mapping[str, float] | None = None,
    over: str = "tokens",
) -> None:
    """Plot the training loss and the evaluation loss of a run.

    Args:
        history: the log of the run, in any order. Entries without a loss are left out, and a loss that is not finite
            leaves a gap in the line.
        path: the PNG file, of 1600 x 900 pixels.
        unit: of the loss.
        references: horizontal lines, by their labels.
        over: the key of the history that counts what was trained on.

    Raises:
        OSError: the file cannot be written.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        counts, losses = _history_arrays(history, "loss", over)
        eval_counts, eval_losses = _history_arrays(history, "eval_loss", over)
        smooth_losses = moving_average(losses)
        _format_loss_axes(axes, title, unit, over, last_count=max([*counts, *eval_counts], default=0))
        if len(counts) > 1:
            axes.plot(counts, losses, color=TRAINING_COLOR, alpha=0.28, linewidth=0.8)
        if len(counts):
            style = "-" if len(counts) > 1 else "o"  # a line through one point would be invisible
            axes.plot(counts, smooth_losses, style, color=TRAINING_COLOR, linewidth=1.8, label="training")
        if len(eval_counts):
            axes.plot(
                eval_counts,
                eval_losses,
                "o",
                color=EVALUATION_COLOR,
                markersize=5.5,
                markeredgecolor="white",
                label="evaluation",
                clip_on=False,
            )
        if axes.lines:
            _add_legend_above(axes)
        if np.isfinite(eval_losses).any():
            last_loss = _annotate_last_value(axes, eval_counts, eval_losses, EVALUATION_COLOR)
        else:
            last_loss = _annotate_last_value(axes, counts, smooth_losses, TRAINING_COLOR)
        if last_loss is None:
            axes.set_yticks([])
            axes.text(0.5, 0.5, "no finite loss", transform=axes.transAxes, ha="center", color=GREY, fontsize=11)
        for label, value in (references or {}).items():
            _add_reference(axes, label, value, last_loss)
        save_figure(figure, Path(path))


def _history_arrays(history: Iterable[dict], key: str, over: str) -> tuple[np.ndarray, np.ndarray]:
    """The counts and the values of a key of the history, with NaN for a value that is not finite."""
    points = sorted((entry[over], float(entry[key])) for entry in history if key in entry and over in entry)
    counts, values = np.array(points, dtype=float).reshape(-1, 2).T
    return counts, np.where(np.isfinite(values), values, math.nan)


def moving_average(values: np.ndarray) -> np.ndarray:
    """The mean over about a twentieth of the values, centred, so that it does not lag behind a falling loss."""
    half_width = len(values) // 40
    averages = np.full(len(values), math.nan)
    for i in np.flatnonzero(~np.isnan(values)):
        reach = min(half_width, i // 4)  # narrow at the start, where the curve is steep
        averages[i] = np.nanmean(values[i - reach : i + reach + 1])
    return averages


def _format_loss_axes(axes: Axes, title: str, unit: str, over: str, last_count: float) -> None:
    axes.set_title(title, pad=28)
    axes.set_xlim(0, 1.06 * last_count or 1)
    axes.margins(y=0.08)
    axes.set_xlabel(over)
    axes.set_ylabel(f"loss ({unit})")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.grid(axis="y")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _add_legend_above(axes: Axes) -> None:
    """Add the legend between the title and the axes, where it covers no line."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def _annotate_last_value(axes: Axes, counts: np.ndarray, values: np.ndarray, color: str) -> float | None:
    """Write the last finite value beside its point, and return it."""
    finite = np.flatnonzero(~np.isnan(values))
    if not len(finite):
        return None
    last = finite[-1]
    axes.annotate(
        f"{values[last]:.3f}",
        (counts[last], values[last]),
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
        color=color,
        fontsize=11,
        fontweight="bold",
        path_effects=HALO,
    )
    return values[last]


def _add_reference(axes: Axes, label: str, value: float, last_loss: float | None) -> None:
    """Add a horizontal line with its label on the side from which the curve does not come."""
    axes.axhline(value, color=GREY, linewidth=1, linestyle=DASHES, zorder=1)
    is_below_curve = last_loss is not None and value <= last_loss
    axes.annotate(
        f"{label} {value:.3f}",
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(-2, -4 if is_below_curve else 4),
        textcoords="offset points",
        ha="right",
        va="top" if is_below_curve else "bottom",
        color=GREY,
        fontsize=10,
        path_effects=HALO,
    )


def plot_confusion(counts: np.ndarray, names: list[str], path: str | os.PathLike, title: str) -> None:
    """Plot a confusion matrix: the color is the share of the row, the text the count.

    Args:
        counts: int (classes, classes), how often each class (row) was predicted as each class (column). If there are
            more than 20, the 19 with the most examples are plotted, and the others together.
        names: of the classes.
        path: the PNG file.
    """
    if len(names) > MAX_CLASSES:
        counts, names = merge_rare_classes(counts, names)
    with rc_context(STYLE):
        side = max(4.5, 1.8 + 0.42 * len(names))
        figure = Figure(figsize=(side + 0.6, side), layout="constrained")
        axes = figure.add_subplot()
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap=LinearSegmentedColormap.from_list("shares", ["white", TRAINING_COLOR]), vmin=0, vmax=1)
        font_size = next(size for count, size in ((6, 11), (12, 9), (MAX_CLASSES, 7)) if len(names) <= count)
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.55 else INK
            text = format_count(counts[row, column])
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=font_size)
        axes.set_title(title)
        labels = [name if len(name) <= 18 else f"{name[:17]}…" for name in names]
        has_long_labels = max(map(len, labels)) > 4
        rotation = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if has_long_labels else {}
        axes.set_xticks(range(len(names)), labels, **rotation)
        axes.set_yticks(range(len(names)), labels)
        borders = np.arange(0.5, len(names) - 1)
        axes.set_xticks(borders, minor=True)
        axes.set_yticks(borders, minor=True)
        axes.grid(which="minor")
        axes.tick_params(labelsize=font_size, pad=4)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        save_figure(figure, Path(path))


def merge_rare_classes(counts: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Merge all classes but the `MAX_CLASSES` - 1 with the most examples into one."""
    kept = MAX_CLASSES - 1
    by_size = np.argsort(-counts.sum(axis=1), kind="stable")
    new_index = np.full(len(names), kept)
    new_index[by_size[:kept]] = np.arange(kept)
    merged = np.zeros((MAX_CLASSES, MAX_CLASSES), dtype=counts.dtype)
    np.add.at(merged, (new_index[:, None], new_index[None, :]), counts)
    return merged, [*(names[i] for i in by_size[:kept]), f"{len(names) - kept} others"]


def plot_scatter(truth: np.ndarray, predicted: np.ndarray, path: str | os.PathLike, title: str) -> None:
    """Plot predicted against true numbers.

    Args:
        truth: float (examples,).
        predicted: float (examples,).
        path: the PNG file.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(5.6, 5), layout="constrained")
        axes = figure.add_subplot()
        low = min(truth.min(), predicted.min())
        high = max(truth.max(), predicted.max())
        axes.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle=DASHES)
        opacity = max(0.15, min(1.0, 150 / len(truth)))
        axes.scatter(truth, predicted, s=8, color=TRAINING_COLOR, alpha=opacity, linewidths=0)
        axes.set_title(title)
        axes.set_xlabel("true")
        axes.set_ylabel("predicted")
        axes.grid()
        save_figure(figure, Path(path))


def plot_budget(law: "ScalingLaw", parameters: float, tokens: float, path: str | os.PathLike) -> None:
    """Plot the loss that a scaling law predicts, over model size and tokens.

    The plot shows the chosen point, all points that take as many FLOPs, the optimum among these, and the optima of all
    budgets.

    Args:
        parameters: of the chosen point.
        tokens: of the chosen point.
        path: the PNG file.
    """
    flops = 6 * parameters * tokens
    best_size, best_tokens = law.optimum(flops)
    reach = max(30, 3 * max(best_size / parameters, parameters / best_size))
    sizes = best_size * np.geomspace(1 / reach, reach, 200)
    token_counts = best_tokens * np.geomspace(1 / reach, reach, 200)
    losses = law.loss(sizes[:, None], token_counts[None, :])
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        shades = LinearSegmentedColormap.from_list("loss", ["#dbe7f5", "#ffffff"])
        levels = np.quantile(losses, np.linspace(0, 1, 14))
        axes.contourf(sizes, token_counts, losses.T, levels=levels, cmap=shades)
        contours = axes.contour(
            sizes, token_counts, losses.T, levels=levels[1:-1], colors=CONTOUR_COLOR, linewidths=0.7
        )
        axes.clabel(contours, fmt="%.2f", fontsize=8, colors=GREY)

        def plot_inside(tokens_of_size: np.ndarray, **options) -> None:
            is_inside = (tokens_of_size >= token_counts[0]) & (tokens_of_size <= token_counts[-1])
            axes.plot(sizes[is_inside], tokens_of_size[is_inside], **options)

        plot_inside(flops / 6 / sizes, color=INK, linewidth=1.4, label=f"{format_count(flops)} FLOPs")
        optimal_tokens = np.array([law.optimal_tokens(size) for size in sizes])
        plot_inside(optimal_tokens, color=GREY, linewidth=1, linestyle=DASHES, label="optima")
        marker = {"markersize": 7, "markeredgecolor": "white", "linestyle": ""}
        optimum = f"optimum: {format_count(best_size)} on {format_count(best_tokens)} tokens"
        axes.plot(best_size, best_tokens, marker="o", color=TRAINING_COLOR, label=optimum, **marker)
        chosen = f"chosen: {format_count(parameters)} on {format_count(tokens)} tokens"
        chosen += f", loss {law.loss(parameters, tokens):.3f}"
        axes.plot(parameters, tokens, marker="D", color=EVALUATION_COLOR, label=chosen, **marker)
        axes.set(xscale="log", yscale="log", xlim=(sizes[0], sizes[-1]), ylim=(token_counts[0], token_counts[-1]))
        axes.set(xlabel="parameters", ylabel="tokens")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
        _add_legend_above(axes)
        save_figure(figure, Path(path))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to a temporary file beside the target, and rename that when it is complete."""
    temporary = path.with_name(f"{path.name}.tmp")  # overwritten by the next run if this one is killed
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
