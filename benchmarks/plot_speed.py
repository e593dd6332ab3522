"""Draw the results of `python -m benchmarks.speed`: tokens per second of each variant as a multiple of stock `Trainer`.

python -m benchmarks.plot_speed --output benchmarks/results/speed.png
"""

import argparse
import json
import statistics
from typing import TYPE_CHECKING

from benchmarks.settings import FOLDER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"stock": "#9a9a9a", "loop": "#c9c3b8"}
DEFAULT_COLOR = "#0b5fa5"


def draw_setting(axes: "Axes", title: str, results: dict) -> None:
    """Draw a bar for each variant: the median over the rounds, with the range as a line."""
    names = list(results["reports"])[::-1]
    ratios = {name: [turn["stock"] / turn[name] for turn in results["turns"]] for name in names}
    medians = [statistics.median(ratios[name]) for name in names]
    axes.barh(names, medians, color=[COLORS.get(name, DEFAULT_COLOR) for name in names], height=0.7)
    for height, name in enumerate(names):
        low, high = min(ratios[name]), max(ratios[name])
        axes.plot([low, high], [height, height], color="#333333", linewidth=1)
        label = f"{medians[height]:.2f}"
        axes.annotate(label, (high, height), (4, 0), textcoords="offset points", va="center", fontsize=8)
    parameters = next(iter(results["reports"].values()))["parameters"] / 1e6
    axes.set_title(f"{title}, {parameters:.1f}M", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(FOLDER / "speed.png"), help="default: outputs/bench/speed.png")
    args = parser.parse_args()

    import matplotlib.pyplot as plt

    results = {}
    for path in sorted(FOLDER.glob("speed-*.json")):
        results[path.stem.removeprefix("speed-")] = json.loads(path.read_text(encoding="utf-8"))
    if not results:
        raise SystemExit(f"{FOLDER} has no results; run `python -m benchmarks.speed` first")
    size = (3.1 * len(results), 2.6)
    figure, panels = plt.subplots(1, len(results), figsize=size, layout="constrained", sharex=True, squeeze=False)
    for axes, (setting_name, setting_results) in zip(panels[0], results.items(), strict=True):
        draw_setting(axes, setting_name, setting_results)
    for axes in panels[0][1:]:
        axes.set_yticklabels([])
    figure.supxlabel("tokens per second, times stock Trainer", fontsize=9)
    figure.savefig(args.output, dpi=150)
    print(args.output)


if __name__ == "__main__":
    main()
