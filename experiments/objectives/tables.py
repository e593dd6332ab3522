"""The results of the objectives experiment: tables with paired confidence intervals, and the figure.

python -m experiments.objectives.tables    # prints the tables and draws the figure of the committed results.json
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from experiments.objectives.settings import TASKS
from unlabeled.runtime.files import write_json

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.json"
METRIC_KEYS = {name: task.metric for name, task in TASKS.items()} | {"bits per byte": "bits_per_byte"}
METRIC_TITLES = {
    "topics": "topics (accuracy)",
    "sentiment": "sentiment (accuracy)",
    "entities": "entities (F1)",
    "similarity": "similarity (MRR)",
    "bits per byte": "bits per byte (lower is better)",
}
BASELINE = "masked 0.30"  # which the other arms are compared with
COLORS = {
    "no pretraining": "#8b949e",
    "causal": "#3b6fb6",
    "causal, attention as trained": "#9db8dc",
    "masked 0.15": "#e6a15c",
    "masked 0.30": "#d1603d",
    "causal, then masked": "#6a4c93",
    "span corruption": "#4f8f5b",
}
UNMATCHED = ("no pretraining", "causal", "causal, attention as trained")  # the same in both tables
EQUAL_FLOPS = " at equal FLOPs"
MATCHED = {"tokens": "tokens", "flops": "FLOPs"}
INK, GREY, RULE = "#1f2328", "#656d76", "#e4e7eb"


def collect(folder: Path, seeds: int) -> dict[str, dict[str, list[float]]]:
    """{arm, with the suffix of how it is matched: {metric: one value per seed}}, of metrics that all seeds have."""
    names = [*COLORS, *(arm + EQUAL_FLOPS for arm in COLORS if arm not in UNMATCHED)]
    results: dict[str, dict[str, list[float]]] = {}
    for name in names:
        for metric, key in METRIC_KEYS.items():
            file = f"{name}/left_to_right.json" if metric == "bits per byte" else f"{name} - {metric}/metrics.json"
            paths = [folder / f"seed-{seed}" / file for seed in range(seeds)]
            if all(path.exists() for path in paths):
                values = [json.loads(path.read_text(encoding="utf-8"))[key] for path in paths]
                results.setdefault(name, {})[metric] = values
    return results


def select_arms(results: dict, matched: str) -> dict[str, dict[str, np.ndarray]]:
    """{arm: {metric: float64 (seeds,)}} of the arms that are matched in "tokens" or "flops", and of the unmatched."""
    selected = {}
    for arm in COLORS:
        name = arm + EQUAL_FLOPS if matched == "flops" and arm not in UNMATCHED else arm
        if name in results:
            selected[arm] = {metric: np.array(values) for metric, values in results[name].items()}
    return selected


def confidence_interval(differences: np.ndarray) -> float:
    """Half the width of the 95 % interval of the mean, by Student's t."""
    count = len(differences)
    if count < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, count - 1) * differences.std(ddof=1) / count**0.5)


def format_cell(values: np.ndarray | None, baseline: np.ndarray | None) -> str:
    """The mean, with the paired difference from the baseline where there is one."""
    if values is None:
        return "—"
    if baseline is None:
        return f"{values.mean():.3f}"
    differences = values - baseline
    return f"{values.mean():.3f} ({differences.mean():+.3f} ± {confidence_interval(differences):.3f})"


def print_table(results: dict, matched: str) -> None:
    arms = select_arms(results, matched)
    print("| arm | " + " | ".join(METRIC_KEYS) + " |\n|---|" + "---|" * len(METRIC_KEYS))
    for arm, metrics in arms.items():
        cells = []
        for metric in METRIC_KEYS:
            baseline = None if arm == BASELINE else arms[BASELINE].get(metric)
            cells.append(format_cell(metrics.get(metric), baseline))
        print(f"| {arm} | " + " | ".join(cells) + " |")


def print_tables(results: dict) -> None:
    """Print a table for each way to match the arms."""
    seeds = len(next(iter(results[BASELINE].values())))
    for matched, label in MATCHED.items():
        print(f"\nMatched in {label}, {seeds} seeds: mean (paired difference from `{BASELINE}` ± 95 % interval)\n")
        print_table(results, matched)


def draw_figure(results: dict, path: Path) -> None:
    """Draw a panel for each metric: seeds as dots, their mean as a bar; matched in tokens above, in FLOPs below."""
    figure = Figure(figsize=(13, 6.8), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(METRIC_KEYS), sharey=True)
    arms = list(COLORS)[::-1]
    for row, (matched, label) in zip(panels, MATCHED.items(), strict=True):
        selected = select_arms(results, matched)
        for axes, metric in zip(row, METRIC_KEYS, strict=True):
            for height, arm in enumerate(arms):
                values = selected.get(arm, {}).get(metric)
                if values is not None:
                    axes.plot(values, [height] * len(values), "o", color=COLORS[arm], alpha=0.45, ms=5, mew=0)
                    axes.plot([values.mean()] * 2, [height - 0.32, height + 0.32], color=COLORS[arm], lw=2.5)
            axes.set_yticks(range(len(arms)), arms, fontsize=9, color=INK)
            style_axes(axes)
            if matched == "tokens":
                axes.set_title(METRIC_TITLES[metric], fontsize=10, color=INK, loc="left")
        row[0].set_ylabel(f"matched in {label}", fontsize=10, color=INK)
    figure.savefig(path)


def style_axes(axes: Axes) -> None:
    axes.tick_params(length=0, labelcolor=GREY, labelsize=9)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(axis="x", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def report(folder: Path, seeds: int) -> None:
    """Write results.json, print the tables and draw objectives.png."""
    results = collect(folder, seeds)
    write_json(RESULTS, results)
    print_tables(results)
    draw_figure(results, FOLDER / "objectives.png")


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    print_tables(results)
    draw_figure(results, FOLDER / "objectives.png")


if __name__ == "__main__":
    main()
