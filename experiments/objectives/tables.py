"""Tables with paired intervals, and the figure."""

import json
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from run import TASKS
from scipy import stats

from unlabeled.runtime.checkpoints import write_json

SCORES = {**{task: key for task, (*_, key) in TASKS.items()}, "bits per byte": "bits_per_byte"}
BASE = "masked .30"  # what the others are compared with
COLOURS = {"no pretraining": "#8b949e", "causal": "#3b6fb6", "causal, attention as trained": "#9db8dc",
           "masked .15": "#e6a15c", "masked .30": "#d1603d", "causal, then masked": "#6a4c93",
           "span corruption": "#4f8f5b"}  # fmt: skip
UNMATCHED = ("no pretraining", "causal", "causal, attention as trained")  # one row of both tables
EQUAL = " at equal FLOPs"
ROWS = [*COLOURS, *(arm + EQUAL for arm in COLOURS if arm not in UNMATCHED)]
HERE = Path(__file__).parent


def collect(folder: Path, seeds: int) -> dict[str, dict[str, list[float]]]:
    """{arm and how it is matched: {score: one for each seed}}, of every score that all seeds have."""
    found: dict = {}
    for name in ROWS:
        for score, key in SCORES.items():
            file = f"{name}/left_to_right.json" if score == "bits per byte" else f"{name} - {score}/metrics.json"
            files = [folder / f"seed-{seed}" / file for seed in range(seeds)]
            if all(path.exists() for path in files):
                found.setdefault(name, {})[score] = [json.loads(path.read_text())[key] for path in files]
    return found


def rows(found: dict, matched: str) -> dict[str, dict[str, np.ndarray]]:
    """{arm: {score: float64 (seeds,)}} of the arms that are matched so, and of those that need not be."""
    ending = EQUAL if matched == "flops" else ""
    picked = {arm: found.get(arm + ending, found.get(arm) if arm in UNMATCHED else None) for arm in COLOURS}
    return {arm: {k: np.array(v) for k, v in scores.items()} for arm, scores in picked.items() if scores}


def interval(difference: np.ndarray) -> float:
    """Half of the 95 % interval of the mean (Student's t)."""
    count = len(difference)
    return float(stats.t.ppf(0.975, count - 1) * difference.std(ddof=1) / count**0.5) if count > 1 else float("nan")


def show(folder: Path, seeds: int) -> None:
    """Print a table for each way to match; write results.json and the figure beside this file."""
    found = collect(folder, seeds)
    write_json(HERE / "results.json", found)
    for matched in ("tokens", "flops"):
        print(f"\nMatched in {matched}, {seeds} seeds: mean (paired difference from `{BASE}` ± 95 % interval)\n")
        print("| arm | " + " | ".join(SCORES) + " |\n|---|" + "---|" * len(SCORES))
        table = rows(found, matched)
        for arm, scores in table.items():
            cells = []
            for score in SCORES:
                values, base = scores.get(score), table[BASE].get(score)
                if values is None:
                    cells.append("—")
                elif arm == BASE or base is None:
                    cells.append(f"{values.mean():.3f}")
                else:
                    gain = values - base
                    cells.append(f"{values.mean():.3f} ({gain.mean():+.3f} ± {interval(gain):.3f})")
            print(f"| {arm} | " + " | ".join(cells) + " |")
    draw(found, HERE / "objectives.png")


def draw(found: dict, path: Path) -> None:
    """A panel a score: each arm's seeds as dots, their mean as a bar; matched in tokens above, in FLOPs below."""
    figure = Figure(figsize=(13, 6.8), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(SCORES), sharey=True)
    arms = list(COLOURS)[::-1]
    names = {"topics": "topics (accuracy)", "sentiment": "sentiment (accuracy)", "entities": "entities (F1)",
             "similarity": "similarity (MRR)", "bits per byte": "bits per byte (less is better)"}  # fmt: skip
    for row, matched in zip(panels, ("tokens", "flops"), strict=True):
        table = rows(found, matched)
        for axes, score in zip(row, SCORES, strict=True):
            for place, arm in enumerate(arms):
                values = table.get(arm, {}).get(score)
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
