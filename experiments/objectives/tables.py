"""Tables with paired intervals, and the figure."""

import json
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from run import ARMS, TASKS
from scipy import stats

SCORES = {**{task: key for task, (*_, key) in TASKS.items()}, "bits per byte": "bits_per_byte"}
BASE = "masked .30"  # what the others are compared with
COLOURS = {"causal": "#3b6fb6", "causal, attention as trained": "#9db8dc", "masked .15": "#e6a15c",
           "masked .30": "#d1603d", "causal, then masked": "#6a4c93", "span corruption": "#4f8f5b"}  # fmt: skip


def read(folder: Path, seeds: int) -> dict[tuple[str, str, str], np.ndarray]:
    """(matched, arm, score): float64 (seeds,), for every score that all seeds have."""
    found: dict = {}
    for matched in ("tokens", "flops"):
        for arm in (*ARMS, "causal, attention as trained"):
            name = arm + (" at equal FLOPs" if matched == "flops" and not arm.startswith("causal") else "")
            name += " at equal FLOPs" * (matched == "flops" and arm == "causal, then masked")
            for score, key in SCORES.items():
                file = f"{name}/left_to_right.json" if score == "bits per byte" else f"{name} - {score}/metrics.json"
                files = [folder / f"seed-{seed}" / file for seed in range(seeds)]
                values = [json.loads(path.read_text())[key] for path in files if path.exists()]
                if len(values) == seeds:
                    found[matched, arm, score] = np.array(values)
    return found


def interval(difference: np.ndarray) -> float:
    """Half of the 95 % interval of the mean (Student's t)."""
    count = len(difference)
    return float(stats.t.ppf(0.975, count - 1) * difference.std(ddof=1) / count**0.5) if count > 1 else float("nan")


def show(folder: Path, seeds: int) -> None:
    """Print a table for each way to match, and draw the figure into this folder."""
    found = read(folder, seeds)
    for matched in ("tokens", "flops"):
        print(f"\nMatched in {matched}, {seeds} seeds: mean (paired difference from `{BASE}` ± 95 % interval, seeds in "
              "which it is positive)\n")  # fmt: skip
        print("| arm | " + " | ".join(SCORES) + " |\n|---|" + "---|" * len(SCORES))
        for arm in (*ARMS, "causal, attention as trained"):
            cells = []
            for score in SCORES:
                values, base = found.get((matched, arm, score)), found.get((matched, BASE, score))
                if values is None or base is None:
                    cells.append("—")
                    continue
                gain = values - base
                paired = f" ({gain.mean():+.3f} ± {interval(gain):.3f}, {(gain > 0).sum()} of {seeds})"
                cells.append(f"{values.mean():.3f}" + paired * (arm != BASE))
            print(f"| {arm} | " + " | ".join(cells) + " |")
    draw(found, Path(__file__).with_name("objectives.png"))


def draw(found: dict, path: Path) -> None:
    """A panel a score: each arm's seeds as dots, their mean as a bar; matched in tokens above, in FLOPs below."""
    figure = Figure(figsize=(13, 6.4), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(SCORES), sharey=True)
    arms = list(COLOURS)[::-1]
    names = {"topics": "topics (accuracy)", "sentiment": "sentiment (accuracy)", "entities": "entities (F1)",
             "similarity": "similarity (MRR)", "bits per byte": "bits per byte (less is better)"}  # fmt: skip
    for row, matched in zip(panels, ("tokens", "flops"), strict=True):
        for axes, score in zip(row, SCORES, strict=True):
            for place, arm in enumerate(arms):
                values = found.get((matched, arm, score))
                if values is not None:
                    axes.plot(values, [place] * len(values), "o", color=COLOURS[arm], alpha=0.45, ms=5, mew=0)
                    axes.plot([values.mean()] * 2, [place - 0.32, place + 0.32], color=COLOURS[arm], lw=2.5)
            axes.set_yticks(range(len(arms)), arms, fontsize=9, color="#1f2328")
            axes.tick_params(length=0, labelcolor="#656d76", labelsize=9)
            axes.tick_params(axis="y", labelcolor="#1f2328")
            axes.grid(axis="x", color="#e4e7eb", linewidth=0.8)
            axes.set_axisbelow(True)
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
            axes.spines["bottom"].set_color("#e4e7eb")
            if matched == "tokens":
                axes.set_title(names[score], fontsize=10, color="#1f2328", loc="left")
        row[0].set_ylabel(f"matched in {'tokens' if matched == 'tokens' else 'FLOPs'}", fontsize=10, color="#1f2328")
    figure.savefig(path)
