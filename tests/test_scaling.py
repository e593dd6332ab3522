"""Scaling laws: published optima, fits that recover known constants, and the sum of the Huber loss against its mean."""

import json
import math
from dataclasses import asdict
from itertools import pairwise, product

import numpy as np
import pytest
from scipy.optimize import minimize

from unlabeled import UserError
from unlabeled.planning import scaling_laws as scaling
from unlabeled.planning.scaling_laws import (
    APPROACH_1,
    BESIROGLU,
    HOFFMANN,
    approach_1,
    bootstrap,
    effective_tokens,
    fit,
    fixed_ratio,
    intervals,
    isoflop_minimum,
    load_law,
    read_runs,
)


@pytest.mark.parametrize(
    ("flops", "parameters", "tokens", "hoffmann"),
    [
        (1e18, 8.05e7, 2.07e9, 25.7),
        (1e20, 8.54e8, 1.95e10, 40.1),
        (1e21, 2.78e9, 6.00e10, 50.1),
        (5.76e23, 7.23e10, 1.33e12, 92.6),
    ],
)
def test_published_optima(flops, parameters, tokens, hoffmann):
    assert BESIROGLU.optimum(flops) == pytest.approx((parameters, tokens), rel=0.01)
    n, d = HOFFMANN.optimum(flops)
    assert d / n == pytest.approx(hoffmann, rel=0.01)


@pytest.mark.parametrize(("parameters", "tokens"), [APPROACH_1[0], APPROACH_1[1], APPROACH_1[3]])
def test_approach_1_is_its_table(parameters, tokens):
    assert approach_1(6 * parameters * tokens) == pytest.approx((parameters, tokens), rel=0.01)


def test_optimum_has_lowest_loss_of_its_budget():
    for law, flops in product((BESIROGLU, HOFFMANN), (1e15, 1e20, 1e25)):
        n, d = law.optimum(flops)
        assert 6 * n * d == pytest.approx(flops)
        grid = n * np.geomspace(0.5, 2, 201)
        assert law.loss(grid, flops / 6 / grid).argmin() == 100
        assert law.optimal_tokens(n) == pytest.approx(d)
        assert law.optimal_parameters(d) == pytest.approx(n)
        assert law.flops_to_reach(law.loss(n, d)) == pytest.approx(flops, rel=1e-6)
    assert BESIROGLU.flops_to_reach(BESIROGLU.E) == math.inf
    n, d = fixed_ratio(1.2e20, 20)
    assert (n, d) == pytest.approx((1e9, 20e9))


def test_effective_tokens():
    assert effective_tokens(80, unique=100) == 80
    assert effective_tokens(400, unique=100) == pytest.approx(372, rel=0.01)  # four epochs: 93 % of their worth
    worth = [effective_tokens(100 * epochs, 100) for epochs in range(1, 200)]
    assert all(a < b for a, b in pairwise(worth))
    assert max(worth) < 100 * (1 + scaling.REPETITION)


@pytest.fixture(scope="module")
def runs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seven sizes around the optimum of each of six budgets, with the noise of half a percent that seeds have."""
    table = [
        (n, flops / 6 / n)
        for flops in np.geomspace(1e18, 1e22, 6)
        for n in BESIROGLU.optimum(flops)[0] * np.geomspace(0.2, 5, 7)
    ]
    n, d = map(np.array, zip(*table, strict=True))
    return n, d, BESIROGLU.loss(n, d) * np.exp(np.random.default_rng(0).normal(0, 0.005, len(n)))


def test_fit_recovers_known_constants(runs):
    n, d, loss = runs
    exact = fit(n, d, BESIROGLU.loss(n, d))
    for name in ("A", "B", "E", "alpha", "beta"):
        assert getattr(exact, name) == pytest.approx(getattr(BESIROGLU, name), rel=0.01)
    laws = bootstrap(n, d, loss, repeats=50)
    statistics = [lambda law, name=name: getattr(law, name) for name in ("A", "B", "E", "alpha", "beta")]
    statistics += [lambda law: law.exponents[0], lambda law: math.log(law.optimum(1e21)[0])]
    for statistic in statistics:
        low, high = intervals(laws, statistic)
        assert low <= statistic(BESIROGLU) <= high
    low, high = intervals(laws, lambda law: law.exponents[0])
    assert high - low < 0.03


def test_mean_of_huber_loss_stops_early(runs):
    """The same starts and optimizer with default tolerances; the objective is divided by the number of runs."""
    logs = tuple(map(np.log, runs))

    def mean(theta, *arguments):
        return tuple(value / len(logs[0]) for value in scaling._objective(theta, *arguments))

    best, laws = {}, {}
    for name, objective in (("sum", scaling._objective), ("mean", mean)):
        results = [minimize(objective, start, logs, jac=True, method="L-BFGS-B") for start in product(*scaling.STARTS)]
        sums = [scaling._objective(result.x, *logs)[0] for result in results]
        best[name], laws[name] = min(sums), scaling._to_law(results[int(np.argmin(sums))].x)
    assert best["mean"] > 2 * best["sum"]
    assert abs(laws["sum"].beta - BESIROGLU.beta) < 0.02
    assert abs(laws["mean"].beta - BESIROGLU.beta) > 0.05  # and beta is close to the 0.28 that Hoffmann et al. printed


def test_isoflop_minimum():
    flops = 1e20
    best, d = BESIROGLU.optimum(flops)
    sizes = best * np.geomspace(0.5, 2, 9)
    losses = BESIROGLU.loss(sizes, flops / 6 / sizes)
    n, loss = isoflop_minimum(sizes, losses)
    assert n == pytest.approx(best, rel=0.05)
    assert loss == pytest.approx(BESIROGLU.loss(best, d), rel=1e-4)
    assert isoflop_minimum(sizes[::-1], losses[::-1]) == pytest.approx((n, loss))
    assert isoflop_minimum(sizes[5:], losses[5:]) is None  # the smallest of these is the best
    assert isoflop_minimum(sizes[:4], losses[:4]) is None
    assert isoflop_minimum(sizes[:2], losses[:2]) is None


def test_files_of_runs_and_laws(tmp_path):
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        metrics = {"parameters": 10**number, "train_tokens": 5, "eval_loss": 2.5, "steps": 1}
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    paths = [str(tmp_path / "0"), str(tmp_path / "2" / "metrics.json")]
    assert read_runs(paths) == ([1.0, 100.0], [5.0, 5.0], [2.5, 2.5])
    (tmp_path / "law.json").write_text(json.dumps(asdict(HOFFMANN)), encoding="utf-8")
    assert load_law(str(tmp_path / "law.json")) == HOFFMANN
    with pytest.raises(UserError, match="is no scaling law"):
        load_law(str(tmp_path / "0" / "metrics.json"))
    (tmp_path / "1" / "metrics.json").write_text('{"parameters": 1, "train_tokens": 2}', encoding="utf-8")
    with pytest.raises(UserError, match="has no 'eval_loss'; name the folder of a finished pretraining run"):
        read_runs([str(tmp_path / "1")])
    with pytest.raises(UserError, match="cannot be read"):
        read_runs([str(tmp_path / "nothing")])


def test_too_few_runs():
    with pytest.raises(UserError, match="5 runs do not determine a law"):
        fit([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [5, 4, 3, 2, 1])
    with pytest.raises(UserError, match="several sizes"):
        fit([1] * 6, [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1])
