"""Loss as a law of parameters and tokens: its optimum for a budget, its fit to runs, and what repetition costs."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path

import numpy as np

from unlabeled.errors import UserError
from unlabeled.runtime.files import read_json

DELTA = 1e-3  # of the Huber loss, in nats of log loss
# Hoffmann et al. start from 4,500 points. Constants found in the wild lie near one of these 108.
STARTS = ((0.0, 5.0, 10.0), (0.0, 5.0, 10.0), (-1.0, 0.0, 1.0), (0.3, 0.8), (0.3, 0.8))
REPETITION = 15.3878  # R*_D of Muennighoff et al. 2023 (arXiv:2305.16264), section 5


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats per token: N parameters, D tokens, C = 6 N D FLOPs."""

    A: float
    B: float
    E: float
    alpha: float
    beta: float

    def loss(self, parameters, tokens):
        """Nats per token; numbers or arrays."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    @property
    def exponents(self) -> tuple[float, float]:
        """(a, b): the optimal N grows as C^a, the optimal D as C^b, and a + b = 1."""
        total = self.alpha + self.beta
        return self.beta / total, self.alpha / total

    @property
    def _g(self) -> float:
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def optimum(self, flops: float) -> tuple[float, float]:
        """(N, D) of least loss among those with 6 N D = `flops` (Hoffmann et al. 2022, equation 4)."""
        a, b = self.exponents
        return self._g * (flops / 6) ** a, (flops / 6) ** b / self._g

    def optimal_tokens(self, parameters: float) -> float:
        """The D for which `parameters` is the optimal N."""
        a, b = self.exponents
        return (parameters / self._g) ** (b / a) / self._g

    def optimal_parameters(self, tokens: float) -> float:
        """The N for which `tokens` is the optimal D."""
        a, b = self.exponents
        return self._g * (tokens * self._g) ** (a / b)

    def flops_to_reach(self, loss: float) -> float:
        """The least FLOPs with which some (N, D) has this `loss`; infinite at E and below."""
        if loss <= self.E:
            return math.inf
        low, high = 0.0, 60.0  # log10; the loss on the frontier falls with every FLOP
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if self.loss(*self.optimum(10**middle)) > loss else (low, middle)
        return 10**high


BESIROGLU = ScalingLaw(A=482.01, B=2085.43, E=1.8172, alpha=0.3478, beta=0.3658)  # Besiroglu et al. 2024, table 1
HOFFMANN = ScalingLaw(A=406.4, B=410.7, E=1.69, alpha=0.34, beta=0.28)  # Hoffmann et al. 2022, approach 3, as printed
LAWS = {"besiroglu": BESIROGLU, "hoffmann": HOFFMANN}
# Hoffmann et al. 2022, table 3: (N, D) at the optimum by approach 1, the envelope of the training curves.
APPROACH_1 = ((1e9, 20.2e9), (10e9, 205.1e9), (67e9, 1.5e12), (175e9, 3.7e12))


def approach_1(flops: float) -> tuple[float, float]:
    """(N, D) by Hoffmann et al.'s approach 1: the line through their table 3, beyond its ends too, and C = 6 N D.

    At their ends it is their table, in between within 7 %: they print two digits of 1.5T.
    """
    (n, d), (last_n, last_d) = APPROACH_1[0], APPROACH_1[-1]
    slope = math.log(last_d / d) / math.log(last_n / n)
    parameters = (flops / 6 * n**slope / d) ** (1 / (1 + slope))
    return parameters, flops / 6 / parameters


def fixed_ratio(flops: float, tokens_per_parameter: float) -> tuple[float, float]:
    """(N, D) with D = ratio · N and 6 N D = `flops`."""
    parameters = math.sqrt(flops / 6 / tokens_per_parameter)
    return parameters, parameters * tokens_per_parameter


def effective_tokens(tokens: float, unique: float) -> float:
    """What `tokens` read from a text of `unique` tokens are worth in tokens read once.

    U + U R* (1 - exp(-R / R*)) with R repetitions after the first reading (Muennighoff et al. 2023, equation 5): four
    epochs are worth nearly four, and no number of epochs more than 16.4.
    """
    if tokens <= unique:
        return tokens
    return unique + unique * REPETITION * (1 - math.exp(-(tokens / unique - 1) / REPETITION))


# --- Fits -------------------------------------------------------------------------------------------------------------


def _objective(theta: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray):
    """Sum of the Huber loss of log L, and its gradient; theta is log A, log B, log E, alpha, beta."""
    log_a, log_b, log_e, alpha, beta = theta
    terms = np.stack([log_a - alpha * log_n, log_b - beta * log_d, np.full_like(log_n, log_e)])
    top = terms.max(axis=0)
    parts = np.exp(terms - top)
    total = parts.sum(axis=0)
    off = top + np.log(total) - log_loss
    clipped = np.clip(off, -DELTA, DELTA)  # the derivative of the Huber loss
    weights = parts / total * clipped
    slopes = (weights[0], weights[1], weights[2], -weights[0] * log_n, -weights[1] * log_d)
    return float(np.sum(clipped * (off - clipped / 2))), np.array([slope.sum() for slope in slopes])


def _solve(log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray, starts: Iterable) -> np.ndarray:
    from scipy.optimize import minimize  # takes longer to import than a plan takes without a fit

    options = {"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-10}
    found = [
        minimize(_objective, start, (log_n, log_d, log_loss), jac=True, method="L-BFGS-B", options=options)
        for start in starts
    ]
    return min(found, key=lambda result: result.fun).x


def _law(theta: np.ndarray) -> ScalingLaw:
    return ScalingLaw(*np.exp(theta[:3]).tolist(), *theta[3:].tolist())


def fit(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> ScalingLaw:
    """The law that minimises the **sum** of a Huber loss on log loss, by L-BFGS from a grid of starts.

    The sum and not the mean: of residuals this small the mean is so flat that L-BFGS stops where it starts (Besiroglu
    et al. 2024, section 4).

    Raises:
        UserError: fewer than six runs, or one size or length only, do not determine five constants.
    """
    log_n, log_d, log_loss = _logs(parameters, tokens, losses)
    return _law(_solve(log_n, log_d, log_loss, product(*STARTS)))


def bootstrap(
    parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float], repeats: int = 200, seed: int = 0
) -> list[ScalingLaw]:
    """The fits of `repeats` tables of as many runs drawn with replacement, each from the fit of all runs."""
    log_n, log_d, log_loss = _logs(parameters, tokens, losses)
    whole = _solve(log_n, log_d, log_loss, product(*STARTS))
    generator = np.random.default_rng(seed)
    laws: list[ScalingLaw] = []
    while len(laws) < repeats:
        drawn = generator.integers(len(log_n), size=len(log_n))
        if len(set(log_n[drawn])) > 1 and len(set(log_d[drawn])) > 1:
            laws.append(_law(_solve(log_n[drawn], log_d[drawn], log_loss[drawn], [whole])))
    return laws


def intervals(
    laws: Sequence[ScalingLaw], of: Callable[[ScalingLaw], float], level: float = 0.95
) -> tuple[float, float]:
    """The percentile interval of a figure of bootstrapped laws."""
    edge = (1 - level) / 2
    low, high = np.quantile([of(law) for law in laws], [edge, 1 - edge])
    return float(low), float(high)


def _logs(*columns: Sequence[float]) -> tuple[np.ndarray, ...]:
    logs = tuple(np.log(np.asarray(values, dtype=float)) for values in columns)
    if len(logs[0]) < 6 or len(set(logs[0])) < 2 or len(set(logs[1])) < 2:
        raise UserError(
            f"{len(logs[0])} runs do not determine a law; add some, at least six of several sizes and lengths"
        )
    return logs


def isoflop_minimum(parameters: Sequence[float], losses: Sequence[float]) -> tuple[float, float] | None:
    """(N, loss) at the bottom of a parabola through runs of one budget, in log N (Hoffmann et al. 2022, approach 2).

    None where the best run is the smallest or the largest, or the parabola has no bottom among them: the minimum then
    lies outside of what was measured.
    """
    order = np.argsort(parameters)
    log_n, loss = np.log(np.asarray(parameters, dtype=float))[order], np.asarray(losses, dtype=float)[order]
    if len(log_n) < 3 or loss.argmin() in (0, len(loss) - 1):
        return None
    curve = np.polynomial.Polynomial.fit(log_n, loss, 2)
    bottom = float(curve.deriv().roots()[0].real)
    if curve.deriv(2)(bottom) <= 0 or not log_n[0] < bottom < log_n[-1]:
        return None
    return math.exp(bottom), float(curve(bottom))


def read_runs(paths: Iterable[str]) -> tuple[list[float], list[float], list[float]]:
    """(N, D, loss) of finished runs, from their folders or `metrics.json` files.

    Raises:
        UserError: a file is missing, or is not that of a pretraining run.
    """
    columns: tuple[list[float], list[float], list[float]] = ([], [], [])
    for path in map(Path, paths):
        file = path / "metrics.json" if path.is_dir() else path
        try:
            metrics = read_json(file)
            row = [float(metrics[key]) for key in ("parameters", "train_tokens", "eval_loss")]
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
            raise UserError(f"{file} {what}; name the folder of a finished pretraining run") from error
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    return columns


def load_law(path: str) -> ScalingLaw:
    """A law from a JSON file with A, B, E, alpha and beta."""
    try:
        constants = read_json(path)
        return ScalingLaw(**{member.name: float(constants[member.name]) for member in fields(ScalingLaw)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        names = ", ".join(LAWS)
        raise UserError(
            f"{path} is no scaling law ({error!r}); name {names}, or a file with A, B, E, alpha, beta"
        ) from error
