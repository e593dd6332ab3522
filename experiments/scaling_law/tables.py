"""The fits of the study with their intervals, by three counts of N, and the figure."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from unlabeled.planning import format_count
from unlabeled.planning.scaling_laws import BESIROGLU, ScalingLaw, bootstrap, fit, intervals, isoflop_minimum
from unlabeled.runtime.checkpoints import write_json

COUNTS = ("parameters", "without embeddings", "FLOPs / 6 tokens")
HERE = Path(__file__).parent
INK, GREY, RULE = "#1f2328", "#656d76", "#e4e7eb"


def columns(points: list[dict], count: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, D and the loss of all runs."""
    return tuple(np.array([point[key] for point in points], dtype=float) for key in (count, "tokens", "loss"))


def minima(points: list[dict], count: str) -> dict[int, tuple[float, float, float] | None]:
    """{budget: (FLOPs, N, loss) at the bottom of its curve, or None at an edge}."""
    found = {}
    for budget in sorted({point["budget"] for point in points}):
        mine = [point for point in points if point["budget"] == budget]
        bottom = isoflop_minimum([point[count] for point in mine], [point["loss"] for point in mine])
        flops = float(np.mean([point["flops"] for point in mine]))
        found[budget] = (flops, *bottom) if bottom else None
    return found


def slope(found: dict) -> float | None:
    """The exponent a of N* = k C^a through the minima that were kept."""
    kept = [value for value in found.values() if value]
    if len(kept) < 3:
        return None
    flops, sizes, _ = np.log(np.array(kept)).T
    return float(np.polyfit(flops, sizes, 1)[0])


def show(points: list[dict]) -> None:
    """Print the tables; write results.json and scaling_law.png beside this file."""
    write_json(HERE / "results.json", points)
    print("| N is | a, by the minima | a, by the fit | alpha | beta | E | tokens per N at 1e13 FLOPs | median error |")
    print("|---|---|---|---|---|---|---|---|")
    laws = {}
    for count in COUNTS:
        n, d, loss = columns(points, count)
        law, many = fit(n, d, loss), bootstrap(n, d, loss, repeats=200)
        laws[count] = law, many

        def ratio(law: ScalingLaw) -> float:
            size, tokens = law.optimum(1e13)
            return tokens / size

        figures = [lambda law: law.exponents[0], lambda law: law.alpha, lambda law: law.beta, lambda law: law.E, ratio]
        cells = [
            f"{figure(law):.3g} ({low:.3g} to {high:.3g})"
            for figure in figures
            for low, high in [intervals(many, figure)]
        ]
        by_minima = slope(minima(points, count))
        error = np.median(np.abs(law.loss(n, d) / loss - 1))
        print(f"| {count} | {'—' if by_minima is None else f'{by_minima:.2f}'} | {' | '.join(cells)} | {error:.2%} |")
    print(
        "\n| budget | runs | best of them | bottom of the curve: N | tokens per N | loss |\n|---|---|---|---|---|---|"
    )
    for budget, bottom in minima(points, "parameters").items():
        mine = [point for point in points if point["budget"] == budget]
        best = min(mine, key=lambda point: point["loss"])
        flops = np.mean([point["flops"] for point in mine])
        at = "at the edge, dropped | — | —"
        if bottom:
            tokens = np.exp(
                np.interp(np.log(bottom[1]), *np.log(sorted((p["parameters"], p["tokens"]) for p in mine)).T)
            )
            at = f"{format_count(bottom[1])} | {tokens / bottom[1]:.0f} | {bottom[2]:.3f}"
        print(f"| {format_count(flops)} FLOPs | {len(mine)} | {format_count(best['parameters'])} | {at} |")
    draw(points, laws["parameters"][0], HERE / "scaling_law.png")


def draw(points: list[dict], law: ScalingLaw, path: Path) -> None:
    """The loss over N, a curve for each budget; and the best N over the budget."""
    figure = Figure(figsize=(11, 4.6), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    found = minima(points, "parameters")
    shades = ["#c6d8ee", "#9dbde0", "#739fd1", "#4a80bd", "#2c62a0", "#163f73"]
    for budget, bottom in found.items():
        mine = sorted((p["parameters"], p["loss"], p["flops"]) for p in points if p["budget"] == budget)
        n, loss, flops = np.array(mine).T
        colour = shades[budget % len(shades)]
        left.plot(n, loss, "o", color=colour, ms=5, label=f"{format_count(flops.mean())} FLOPs")
        if len(n) > 2:
            curve, grid = np.polynomial.Polynomial.fit(np.log(n), loss, 2), np.geomspace(n[0], n[-1], 50)
            left.plot(grid, curve(np.log(grid)), color=colour, lw=1.4)
        if bottom:
            left.plot(bottom[1], bottom[2], "x", color="#d1603d", ms=8, mew=2)
            right.plot(bottom[0], bottom[1], "x", color="#d1603d", ms=8, mew=2)
    flops = np.geomspace(min(p["flops"] for p in points), max(p["flops"] for p in points), 30)
    right.plot(flops, [law.optimum(c)[0] for c in flops], color=INK, lw=1.4, label="fit of all runs")
    right.plot(flops, [BESIROGLU.optimum(c)[0] for c in flops], color=GREY, lw=1, ls=(0, (4, 3)),
               label="Besiroglu et al., carried down to here")  # fmt: skip
    left.set_ylabel("held-out loss (nats per token)", color=GREY)
    left.set_xlabel("parameters", color=GREY)
    right.set(xscale="log", yscale="log")
    left.set_xscale("log")
    right.set_xlabel("FLOPs", color=GREY)
    right.set_ylabel("best number of parameters", color=GREY)
    for axes in (left, right):
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
        axes.tick_params(which="both", length=0, labelcolor=GREY, labelsize=9)
        axes.grid(color=RULE, linewidth=0.8)
        axes.legend(frameon=False, fontsize=9, labelcolor=GREY)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    for axis in (left.xaxis, right.yaxis):  # less than two decades
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    figure.savefig(path)
