"""A picture of what benchmarks/speed.py measured last: tokens per second of each contestant, as a multiple of stock.

python -m benchmarks.plot_speed --output benchmarks/results/speed.png
"""

import argparse
import json
import statistics
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "outputs" / "bench"
COLOURS = {"stock": "#9a9a9a", "loop": "#c9c3b8"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(FOLDER / "speed.png"))
    options = parser.parse_args()

    import matplotlib.pyplot as plt

    found = {
        path.stem.removeprefix("speed-"): json.loads(path.read_text()) for path in sorted(FOLDER.glob("speed-*.json"))
    }
    if not found:
        raise SystemExit(f"{FOLDER} has no results; run `python -m benchmarks.speed` first")
    figure, panels = plt.subplots(
        1, len(found), figsize=(3.1 * len(found), 2.6), layout="constrained", sharex=True, squeeze=False
    )
    for axes, (name, results) in zip(panels[0], found.items(), strict=True):
        names = list(results["said"])[::-1]
        ratios = {one: sorted(turn["stock"] / turn[one] for turn in results["turns"]) for one in names}
        middle = [statistics.median(ratios[one]) for one in names]
        axes.barh(names, middle, color=[COLOURS.get(one, "#0b5fa5") for one in names], height=0.7)
        for place, one in enumerate(names):
            axes.plot([ratios[one][0], ratios[one][-1]], [place, place], color="#333333", linewidth=1)
            axes.annotate(
                f"{middle[place]:.2f}",
                (ratios[one][-1], place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set_title(f"{name}, {next(iter(results['said'].values()))['parameters'] / 1e6:.1f} M", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        if axes is not panels[0][0]:
            axes.set_yticklabels([])
    figure.supxlabel("tokens per second, times stock Trainer", fontsize=9)
    figure.savefig(options.output, dpi=150)
    print(options.output)


if __name__ == "__main__":
    main()
