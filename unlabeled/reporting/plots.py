"""Pictures as PNG: the loss of a run, the confusion of its classes, its numbers against the true ones, a budget."""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from unlabeled.planning import format_count

INK, GREY, RULE, TRAIN, EVAL = "#1f2328", "#656d76", "#e4e7eb", "#3b6fb6", "#d1603d"
HALO = [withStroke(linewidth=3, foreground="white")]  # keeps a label readable where a line passes behind it


def plot_loss(
    history: list[dict],
    path: str | os.PathLike,
    title: str,
    unit: str = "nats per token",
    references: Mapping[str, float] | None = None,
    over: str = "tokens",
) -> None:
    """Draw the loss against the tokens (or what `over` names) trained on, and write it to `path` whole or not at all.

    `history` holds points {"tokens": int, "loss": float} of the training loss and {"tokens": int, "eval_loss": float}
    of the evaluation loss, in any order; other entries, such as Trainer's summary, are left out, and a loss that is not
    finite leaves a gap in the line. `references` are horizontal lines, label to value in `unit`. The picture is
    1600 x 900 pixels, for display at half that size.

    Raises `OSError` where the file cannot be written.
    """
    figure = Figure(figsize=(8, 4.5), dpi=200, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own, so that pyplot and its choice of backend are never involved
    figure.get_layout_engine().set(w_pad=0.18, h_pad=0.15)
    axes = figure.add_subplot()
    tokens, loss = _points(history, "loss", over)
    eval_tokens, eval_loss = _points(history, "eval_loss", over)
    smooth = _smooth(loss)
    _style(axes, title, unit, over, last_token=max([*tokens, *eval_tokens], default=0))

    if len(tokens) > 1:
        axes.plot(tokens, loss, color=TRAIN, alpha=0.28, linewidth=0.8)
    if len(tokens):  # a line through one point would be invisible
        axes.plot(tokens, smooth, "-" if len(tokens) > 1 else "o", color=TRAIN, linewidth=1.8, label="training")
    if len(eval_tokens):
        axes.plot(eval_tokens, eval_loss, "o", color=EVAL, ms=5.5, mec="white", label="evaluation", clip_on=False)
    if axes.lines:
        # Between title and axes, where neither curve nor reference lines come.
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, borderpad=0, ncols=2, frameon=False,
            fontsize=10, labelcolor=GREY, handlelength=1.4, handletextpad=0.6, columnspacing=1.6,
        )  # fmt: skip
    evaluated = np.isfinite(eval_loss).any()
    last = _annotate_last(axes, *((eval_tokens, eval_loss, EVAL) if evaluated else (tokens, smooth, TRAIN)))
    if last is None:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no finite loss", transform=axes.transAxes, ha="center", color=GREY, fontsize=11)
    for label, value in (references or {}).items():
        axes.axhline(value, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        under = last is not None and value <= last  # on the side of the line that the curve does not come from
        axes.annotate(
            f"{label} {value:.3f}", (1, value), xycoords=("axes fraction", "data"), xytext=(-2, -4 if under else 4),
            textcoords="offset points", ha="right", va="top" if under else "bottom", color=GREY, fontsize=10,
            parse_math=False, path_effects=HALO,
        )  # fmt: skip
    _write(figure, Path(path))


def _points(history: Iterable[dict], key: str, over: str) -> tuple[np.ndarray, np.ndarray]:
    points = sorted((entry[over], float(entry[key])) for entry in history if key in entry and over in entry)
    tokens, values = np.array(points, dtype=float).reshape(-1, 2).T
    return tokens, np.where(np.isfinite(values), values, math.nan)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving mean over about a twentieth of the points, centred, so that it does not lag behind a falling loss."""
    half = len(values) // 40
    smooth = np.full(len(values), math.nan)
    for i in np.flatnonzero(~np.isnan(values)):
        reach = min(half, i // 4)  # narrow at the start, where the curve is steep and bent
        smooth[i] = np.nanmean(values[i - reach : i + reach + 1])
    return smooth


def _style(axes: Axes, title: str, unit: str, over: str, last_token: float) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=13, fontweight="bold", pad=28, parse_math=False)
    axes.set_xlim(0, 1.06 * last_token or 1)
    axes.margins(y=0.08)
    axes.set_xlabel(over, color=GREY, fontsize=11)
    axes.set_ylabel(f"loss ({unit})", color=GREY, fontsize=11)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.tick_params(length=0, labelcolor=GREY, labelsize=10, pad=6)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def _annotate_last(axes: Axes, tokens: np.ndarray, values: np.ndarray, color: str) -> float | None:
    finite = np.flatnonzero(~np.isnan(values))
    if not len(finite):
        return None
    last = finite[-1]
    axes.annotate(
        f"{values[last]:.3f}", (tokens[last], values[last]), xytext=(0, 8), textcoords="offset points",
        ha="center", color=color, fontsize=11, fontweight="bold", path_effects=HALO,
    )  # fmt: skip
    return values[last]


def plot_confusion(counts: np.ndarray, names: list[str], path: str | os.PathLike, title: str) -> None:
    """Draw how often each class (row) was predicted as each (column), whole or not at all.

    `counts` is int (classes, classes). The colour is the share of the row, the text the count. Of more than 20 classes
    the 19 with most examples are drawn, and the others as one.
    """
    if len(names) > 20:
        order = np.argsort(-counts.sum(axis=1), kind="stable")
        place = np.full(len(names), 19)
        place[order[:19]] = np.arange(19)
        merged = np.zeros((20, 20), dtype=counts.dtype)
        np.add.at(merged, (place[:, None], place[None, :]), counts)
        counts, names = merged, [*(names[i] for i in order[:19]), f"{len(names) - 19} others"]
    side = max(4.5, 1.8 + 0.42 * len(names))
    figure = Figure(figsize=(side + 0.6, side), dpi=200, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    axes = figure.add_subplot()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap=LinearSegmentedColormap.from_list("shares", ["white", TRAIN]), vmin=0, vmax=1)
    size = 11 if len(names) <= 6 else 9 if len(names) <= 12 else 7
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = "white" if share[row, column] > 0.55 else INK
        axes.text(column, row, format_count(counts[row, column]), ha="center", va="center", color=color, fontsize=size)
    axes.set_title(title, loc="left", color=INK, fontsize=13, fontweight="bold", pad=12, parse_math=False)
    shown = [name if len(name) <= 18 else f"{name[:17]}…" for name in names]
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, shown)) > 4 else {}
    axes.set_xticks(range(len(names)), shown, parse_math=False, **turned)
    axes.set_yticks(range(len(names)), shown, parse_math=False)
    axes.set_xticks(np.arange(0.5, len(names) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(names) - 1), minor=True)
    axes.grid(which="minor", color=RULE, linewidth=0.8)
    axes.tick_params(which="both", length=0, labelcolor=GREY, labelsize=size, pad=4)
    axes.set_xlabel("predicted", color=GREY, fontsize=11)
    axes.set_ylabel("true", color=GREY, fontsize=11)
    for spine in axes.spines.values():
        spine.set_color(RULE)
    _write(figure, Path(path))


def plot_scatter(truth: np.ndarray, predicted: np.ndarray, path: str | os.PathLike, title: str) -> None:
    """Draw predicted numbers against the true ones, float (examples,) each, whole or not at all."""
    figure = Figure(figsize=(5.6, 5), dpi=200, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    axes = figure.add_subplot()
    low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
    axes.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.scatter(truth, predicted, s=8, color=TRAIN, alpha=max(0.15, min(1.0, 150 / len(truth))), linewidths=0)
    axes.set_title(title, loc="left", color=INK, fontsize=13, fontweight="bold", pad=12, parse_math=False)
    axes.set_xlabel("true", color=GREY, fontsize=11)
    axes.set_ylabel("predicted", color=GREY, fontsize=11)
    axes.tick_params(length=0, labelcolor=GREY, labelsize=10, pad=6)
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_color(RULE)
    _write(figure, Path(path))


def plot_budget(law, parameters: float, tokens: float, path: str | os.PathLike) -> None:
    """Draw the loss of a `ScalingLaw` over size and tokens, the budget of the point (`parameters`, `tokens`) as a line,
    the optimum on it and the optima of all budgets; whole or not at all."""
    flops = 6 * parameters * tokens
    best_n, best_d = law.optimum(flops)
    reach = max(30, 3 * max(best_n / parameters, parameters / best_n))
    n = best_n * np.geomspace(1 / reach, reach, 200)
    d = best_d * np.geomspace(1 / reach, reach, 200)
    surface = law.loss(n[:, None], d[None, :])
    figure = Figure(figsize=(8, 5), dpi=200, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.18, h_pad=0.15)
    axes = figure.add_subplot()
    shades = LinearSegmentedColormap.from_list("loss", ["#dbe7f5", "#ffffff"])
    levels = np.quantile(surface, np.linspace(0, 1, 14))
    axes.contourf(n, d, surface.T, levels=levels, cmap=shades)
    lines = axes.contour(n, d, surface.T, levels=levels[1:-1], colors="#b9c7d6", linewidths=0.7)
    axes.clabel(lines, fmt="%.2f", fontsize=8, colors=GREY)
    inside = (flops / 6 / n >= d[0]) & (flops / 6 / n <= d[-1])
    axes.plot(n[inside], (flops / 6 / n)[inside], color=INK, linewidth=1.4, label=f"{format_count(flops)} FLOPs")
    ridge = np.array([law.optimal_tokens(size) for size in n])
    kept = (ridge >= d[0]) & (ridge <= d[-1])
    axes.plot(n[kept], ridge[kept], color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="optima")
    optimum = f"optimum: {format_count(best_n)} on {format_count(best_d)} tokens"
    axes.plot(best_n, best_d, "o", color=TRAIN, ms=7, mec="white", label=optimum)
    chosen = (
        f"chosen: {format_count(parameters)} on {format_count(tokens)} tokens, loss {law.loss(parameters, tokens):.3f}"
    )
    axes.plot(parameters, tokens, "D", color=EVAL, ms=7, mec="white", label=chosen)
    axes.set(xscale="log", yscale="log", xlim=(n[0], n[-1]), ylim=(d[0], d[-1]))
    axes.set_xlabel("parameters", color=GREY, fontsize=11)
    axes.set_ylabel("tokens", color=GREY, fontsize=11)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axes.tick_params(which="both", length=0, labelcolor=GREY, labelsize=10, pad=6)
    for spine in axes.spines.values():
        spine.set_color(RULE)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, borderpad=0, ncols=2, frameon=False, fontsize=10,
        labelcolor=GREY, handlelength=1.4, handletextpad=0.6, columnspacing=1.6,
    )  # fmt: skip
    _write(figure, Path(path))


def _write(figure: Figure, path: Path) -> None:
    # A temporary file beside the target, renamed when it is complete: a reader never sees half a picture.
    temporary = path.with_name(f"{path.name}.tmp")  # written over by the next run where this one is killed
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
