"""The results of the scaling-law study: fits with their confidence intervals, by three counts of N, and the figure.

python -m experiments.scaling_law.tables    # prints the tables and draws the figure of the committed results.json
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from unlabeled.planning import format_count
from unlabeled.planning.scaling_laws import BESIROGLU, ScalingLaw, bootstrap, fit, intervals, isoflop_minimum
from unlabeled.runtime.files import write_json

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.json"
COUNTS = ("parameters", "without embeddings", "FLOPs / 6 tokens")  # what N may be
REFERENCE_FLOPS = 1e13  # at which tokens per N are reported
BOOTSTRAP_SAMPLES = 200
INK, GREY, RULE = "#1f2328", "#656d76", "#e4e7eb"
MINIMUM_COLOR = "#d1603d"
BUDGET_COLORS = ("#c6d8ee", "#9dbde0", "#739fd1", "#4a80bd", "#2c62a0", "#163f73")


def values_of(runs: list[dict], key: str) -> np.ndarray:
    """float64 (runs,): the values of a key."""
    return np.array([run[key] for run in runs], dtype=float)


def group_by_budget(runs: list[dict]) -> dict[int, list[dict]]:
    """{budget: its runs, from the smallest model to the largest}."""
    groups: dict[int, list[dict]] = {}
    for run in sorted(runs, key=lambda run: (run["budget"], run["parameters"])):
        groups.setdefault(run["budget"], []).append(run)
    return groups


def isoflop_minima(runs: list[dict], count: str) -> dict[int, tuple[float, float, float] | None]:
    """{budget: (FLOPs, N, loss) at the minimum of its curve, or None where the minimum is at an edge}."""
    minima = {}
    for budget, budget_runs in group_by_budget(runs).items():
        minimum = isoflop_minimum(
            [run[count] for run in budget_runs],
            [run["loss"] for run in budget_runs],
        )
        flops = float(np.mean(values_of(budget_runs, "flops")))
        minima[budget] = (flops, *minimum) if minimum else None
    return minima


def fit_exponent(minima: dict[int, tuple[float, float, float] | None]) -> float | None:
    """The exponent a of N* = k C^a through the minima, or None if fewer than three are known."""
    known = [minimum for minimum in minima.values() if minimum]
    if len(known) < 3:
        return None
    log_flops, log_sizes, _ = np.log(np.array(known)).T
    return float(np.polyfit(log_flops, log_sizes, 1)[0])


def tokens_per_n(law: ScalingLaw) -> float:
    """Tokens over N at the optimum for `REFERENCE_FLOPS`."""
    size, tokens = law.optimum(REFERENCE_FLOPS)
    return tokens / size


def print_fits(runs: list[dict]) -> None:
    """Print the fitted law for each count of N, with 95 % intervals by the bootstrap."""
    columns = ("N is", "a, from the minima", "a, from the fit", "alpha", "beta", "E")
    columns = (*columns, "tokens per N at 1e13 FLOPs", "median error")
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    quantities = [lambda law: law.exponents[0], lambda law: law.alpha, lambda law: law.beta, lambda law: law.E]
    quantities.append(tokens_per_n)
    tokens = values_of(runs, "tokens")
    losses = values_of(runs, "loss")
    for count in COUNTS:
        sizes = values_of(runs, count)
        law = fit(sizes, tokens, losses)
        samples = bootstrap(sizes, tokens, losses, repeats=BOOTSTRAP_SAMPLES)
        exponent = fit_exponent(isoflop_minima(runs, count))
        cells = [count, "—" if exponent is None else f"{exponent:.2f}"]
        for quantity in quantities:
            low, high = intervals(samples, quantity)
            cells.append(f"{quantity(law):.3g} ({low:.3g} to {high:.3g})")
        median_error = np.median(np.abs(law.loss(sizes, tokens) / losses - 1))
        cells.append(f"{median_error:.2%}")
        print(f"| {' | '.join(cells)} |")


def print_minima(runs: list[dict]) -> None:
    """Print the best size of each budget: of the runs, and at the minimum of the curve through them."""
    print("| budget | runs | best run: N | minimum of the curve: N | tokens per N | loss |\n|---|---|---|---|---|---|")
    groups = group_by_budget(runs)
    for budget, minimum in isoflop_minima(runs, "parameters").items():
        budget_runs = groups[budget]
        best = min(budget_runs, key=lambda run: run["loss"])
        flops = np.mean(values_of(budget_runs, "flops"))
        cells = [f"{format_count(flops)} FLOPs", str(len(budget_runs)), format_count(best["parameters"])]
        if minimum:
            _, size, loss = minimum
            log_sizes = np.log(values_of(budget_runs, "parameters"))
            log_tokens = np.log(values_of(budget_runs, "tokens"))
            tokens = np.exp(np.interp(np.log(size), log_sizes, log_tokens))
            cells += [format_count(size), f"{tokens / size:.0f}", f"{loss:.3f}"]
        else:
            cells += ["at the edge, dropped", "—", "—"]
        print(f"| {' | '.join(cells)} |")


def draw_figure(runs: list[dict], path: Path) -> None:
    """Draw the loss over N with a curve for each budget, and the best N over the budget."""
    figure = Figure(figsize=(11, 4.6), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, size_axes = figure.subplots(1, 2)
    draw_losses(loss_axes, runs)
    draw_best_sizes(size_axes, runs)
    for axes in (loss_axes, size_axes):
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
        style_axes(axes)
    size_axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    for axis in (loss_axes.xaxis, size_axes.yaxis):  # less than two decades
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    figure.savefig(path)


def draw_losses(axes: Axes, runs: list[dict]) -> None:
    minima = isoflop_minima(runs, "parameters")
    for budget, budget_runs in group_by_budget(runs).items():
        color = BUDGET_COLORS[budget % len(BUDGET_COLORS)]
        sizes = values_of(budget_runs, "parameters")
        losses = values_of(budget_runs, "loss")
        flops = np.mean(values_of(budget_runs, "flops"))
        axes.plot(sizes, losses, "o", color=color, ms=5, label=f"{format_count(flops)} FLOPs")
        if len(budget_runs) > 2:
            curve = np.polynomial.Polynomial.fit(np.log(sizes), losses, 2)
            grid = np.geomspace(sizes[0], sizes[-1], 50)
            axes.plot(grid, curve(np.log(grid)), color=color, lw=1.4)
        if minima[budget]:
            _, size, loss = minima[budget]
            axes.plot(size, loss, "x", color=MINIMUM_COLOR, ms=8, mew=2)
    axes.set_xscale("log")
    axes.set_xlabel("parameters", color=GREY)
    axes.set_ylabel("held-out loss (nats per token)", color=GREY)


def draw_best_sizes(axes: Axes, runs: list[dict]) -> None:
    for minimum in isoflop_minima(runs, "parameters").values():
        if minimum:
            flops, size, _ = minimum
            axes.plot(flops, size, "x", color=MINIMUM_COLOR, ms=8, mew=2)
    law = fit(values_of(runs, "parameters"), values_of(runs, "tokens"), values_of(runs, "loss"))
    run_flops = values_of(runs, "flops")
    grid = np.geomspace(run_flops.min(), run_flops.max(), 30)
    own_sizes = [law.optimum(flops)[0] for flops in grid]
    published_sizes = [BESIROGLU.optimum(flops)[0] for flops in grid]
    axes.plot(grid, own_sizes, color=INK, lw=1.4, label="fit of all runs")
    label = "Besiroglu et al., extrapolated"
    axes.plot(grid, published_sizes, color=GREY, lw=1, ls=(0, (4, 3)), label=label)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("FLOPs", color=GREY)
    axes.set_ylabel("best number of parameters", color=GREY)


def style_axes(axes: Axes) -> None:
    axes.tick_params(which="both", length=0, labelcolor=GREY, labelsize=9)
    axes.grid(color=RULE, linewidth=0.8)
    axes.legend(frameon=False, fontsize=9, labelcolor=GREY)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def report(runs: list[dict]) -> None:
    """Write results.json, print the tables and draw scaling_law.png."""
    write_json(RESULTS, runs)
    print_fits(runs)
    print()
    print_minima(runs)
    draw_figure(runs, FOLDER / "scaling_law.png")


def main() -> None:
    report(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
