"""Scaling laws: the loss as a function of parameters and tokens, its optimum, its fit to runs, and repeated text.

N are parameters, D tokens and C = 6 N D FLOPs.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np

from unlabeled.errors import UserError
from unlabeled.runtime.files import read_json

Values = TypeVar("Values", float, np.ndarray)

HUBER_DELTA = 1e-3  # in nats of log loss
# Initial values of log A, log B, log E, alpha and beta. Hoffmann et al. 2022 start from 4,500 points; published
# constants are close to one of these 108.
STARTS = ((0.0, 5.0, 10.0), (0.0, 5.0, 10.0), (-1.0, 0.0, 1.0), (0.3, 0.8), (0.3, 0.8))
MIN_RUNS = 6  # that determine five constants
REPETITION = 15.3878  # R*_D of Muennighoff et al. 2023 (arXiv:2305.16264), section 5


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats per token (Hoffmann et al. 2022, arXiv:2203.15556).

    Attributes:
        A: Coefficient of the parameters.
        B: Coefficient of the tokens.
        E: The loss of an infinite model and infinite text, in nats per token.
        alpha: Exponent of the parameters.
        beta: Exponent of the tokens.
    """

    A: float
    B: float
    E: float
    alpha: float
    beta: float

    def loss(self, parameters: Values, tokens: Values) -> Values:
        """Return the loss in nats per token, of numbers or of arrays that broadcast."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    @property
    def exponents(self) -> tuple[float, float]:
        """a and b: the optimal N grows as C^a, the optimal D as C^b, and a + b = 1."""
        total = self.alpha + self.beta
        return self.beta / total, self.alpha / total

    @property
    def _g(self) -> float:
        """G of Hoffmann et al. 2022, equation 4."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def optimum(self, flops: float) -> tuple[float, float]:
        """Return the parameters and tokens of the lowest loss among those with 6 N D = `flops`.

        Hoffmann et al. 2022, equation 4.
        """
        a, b = self.exponents
        return self._g * (flops / 6) ** a, (flops / 6) ** b / self._g

    def optimal_tokens(self, parameters: float) -> float:
        """Return the tokens for which `parameters` is the optimal size."""
        a, b = self.exponents
        return (parameters / self._g) ** (b / a) / self._g

    def optimal_parameters(self, tokens: float) -> float:
        """Return the size for which `tokens` are the optimal number of tokens."""
        a, b = self.exponents
        return self._g * (tokens * self._g) ** (a / b)

    def flops_to_reach(self, loss: float) -> float:
        """Return the fewest FLOPs with which a run reaches this loss; infinite for E and below."""
        if loss <= self.E:
            return math.inf
        low = 0.0  # log10; the loss at the optimum falls with every FLOP
        high = 60.0
        for _ in range(80):
            middle = (low + high) / 2
            if self.loss(*self.optimum(10**middle)) > loss:
                low = middle
            else:
                high = middle
        return 10**high


BESIROGLU = ScalingLaw(A=482.01, B=2085.43, E=1.8172, alpha=0.3478, beta=0.3658)  # Besiroglu et al. 2024, table 1
HOFFMANN = ScalingLaw(A=406.4, B=410.7, E=1.69, alpha=0.34, beta=0.28)  # Hoffmann et al. 2022, approach 3, as printed
LAWS = {"besiroglu": BESIROGLU, "hoffmann": HOFFMANN}
# Hoffmann et al. 2022, table 3: (N, D) at the optimum by approach 1, the envelope of the training curves.
APPROACH_1 = ((1e9, 20.2e9), (10e9, 205.1e9), (67e9, 1.5e12), (175e9, 3.7e12))


def approach_1(flops: float) -> tuple[float, float]:
    """Return the optimal parameters and tokens by approach 1 of Hoffmann et al. 2022.

    A line through the ends of their table 3 in log N and log D, extended beyond them, with C = 6 N D. Between its ends
    it is within 7 % of the table, which has two digits.
    """
    first_parameters, first_tokens = APPROACH_1[0]
    last_parameters, last_tokens = APPROACH_1[-1]
    slope = math.log(last_tokens / first_tokens) / math.log(last_parameters / first_parameters)
    parameters = (flops / 6 * first_parameters**slope / first_tokens) ** (1 / (1 + slope))
    return parameters, flops / 6 / parameters


def fixed_ratio(flops: float, tokens_per_parameter: float) -> tuple[float, float]:
    """Return the parameters and tokens with a given ratio and 6 N D = `flops`."""
    parameters = math.sqrt(flops / 6 / tokens_per_parameter)
    return parameters, parameters * tokens_per_parameter


def effective_tokens(tokens: float, unique: float) -> float:
    """Return how many tokens read once are worth as much as `tokens` read from a text of `unique` tokens.

    U + U R* (1 - exp(-R / R*)), with R repetitions after the first epoch (Muennighoff et al. 2023, arXiv:2305.16264,
    equation 5). Four epochs are worth nearly four, and any number of epochs at most 16.4.
    """
    if tokens <= unique:
        return tokens
    repetitions = tokens / unique - 1
    return unique + unique * REPETITION * (1 - math.exp(-repetitions / REPETITION))


# --- Fits -------------------------------------------------------------------------------------------------------------


def _objective(
    theta: np.ndarray, log_parameters: np.ndarray, log_tokens: np.ndarray, log_loss: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the sum of the Huber loss of log L, and its gradient.

    Args:
        theta: log A, log B, log E, alpha and beta.
        log_parameters: Of each run.
        log_tokens: Of each run.
        log_loss: Of each run.
    """
    log_a, log_b, log_e, alpha, beta = theta
    terms = np.stack(
        [
            log_a - alpha * log_parameters,
            log_b - beta * log_tokens,
            np.full_like(log_parameters, log_e),
        ]
    )
    largest = terms.max(axis=0)
    parts = np.exp(terms - largest)
    total = parts.sum(axis=0)
    residual = largest + np.log(total) - log_loss
    clipped = np.clip(residual, -HUBER_DELTA, HUBER_DELTA)  # the derivative of the Huber loss
    weights = parts / total * clipped
    slopes = (weights[0], weights[1], weights[2], -weights[0] * log_parameters, -weights[1] * log_tokens)
    return float(np.sum(clipped * (residual - clipped / 2))), np.array([slope.sum() for slope in slopes])


def _minimize(logs: Sequence[np.ndarray], starts: Iterable[Sequence[float]]) -> np.ndarray:
    """Minimize the objective from each of the starts, and return the best theta."""
    from scipy.optimize import minimize  # the import takes longer than a plan without a fit

    options = {"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-10}
    results = [
        minimize(_objective, start, tuple(logs), jac=True, method="L-BFGS-B", options=options) for start in starts
    ]
    return min(results, key=lambda result: result.fun).x


def _to_law(theta: np.ndarray) -> ScalingLaw:
    return ScalingLaw(*np.exp(theta[:3]).tolist(), *theta[3:].tolist())


def fit(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> ScalingLaw:
    """Fit a law to runs: minimize the **sum** of the Huber loss of log L, by L-BFGS from a grid of starts.

    Not the mean, which is so flat for residuals as small as these that L-BFGS stops where it starts (Besiroglu et al.
    2024, arXiv:2404.10102, section 4).

    Args:
        parameters: The size of the model of each run.
        tokens: The tokens of each run.
        losses: The loss of each run, in nats per token.

    Raises:
        UserError: Fewer than six runs, or runs of a single size or length, do not determine five constants.
    """
    logs = _logs(parameters, tokens, losses)
    return _to_law(_minimize(logs, product(*STARTS)))


def bootstrap(
    parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float], repeats: int = 200, seed: int = 0
) -> list[ScalingLaw]:
    """Fit laws to samples of the runs, each of as many runs, drawn with replacement.

    Args:
        parameters: As for `fit`, tokens and losses likewise.
        repeats: The number of samples.
        seed: The seed of the draw.
    """
    logs = _logs(parameters, tokens, losses)
    start = _minimize(logs, product(*STARTS))
    generator = np.random.default_rng(seed)
    laws: list[ScalingLaw] = []
    while len(laws) < repeats:
        indices = generator.integers(len(logs[0]), size=len(logs[0]))
        sample = [values[indices] for values in logs]
        if len(set(sample[0])) > 1 and len(set(sample[1])) > 1:
            laws.append(_to_law(_minimize(sample, [start.tolist()])))
    return laws


def intervals(
    laws: Sequence[ScalingLaw], statistic: Callable[[ScalingLaw], float], level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile interval of a statistic of bootstrapped laws.

    Args:
        laws: The result of `bootstrap`.
        statistic: A function of a law.
        level: The confidence level.
    """
    edge = (1 - level) / 2
    low, high = np.quantile([statistic(law) for law in laws], [edge, 1 - edge])
    return float(low), float(high)


def _logs(*columns: Sequence[float]) -> tuple[np.ndarray, ...]:
    """Return the logarithms of parameters, tokens and losses, or raise `UserError` if they do not determine a law."""
    logs = tuple(np.log(np.asarray(values, dtype=float)) for values in columns)
    if len(logs[0]) < MIN_RUNS or len(set(logs[0])) < 2 or len(set(logs[1])) < 2:
        raise UserError(
            f"{len(logs[0])} runs do not determine a law; add some, at least six of several sizes and lengths"
        )
    return logs


def isoflop_minimum(parameters: Sequence[float], losses: Sequence[float]) -> tuple[float, float] | None:
    """Return the size and loss at the minimum of a parabola in log N through runs of the same FLOPs.

    Hoffmann et al. 2022, approach 2.

    Returns:
        None if the minimum lies outside of what was measured: the best run is the smallest or the largest, or the
        parabola has no minimum between them.
    """
    order = np.argsort(parameters)
    log_parameters = np.log(np.asarray(parameters, dtype=float))[order]
    sorted_losses = np.asarray(losses, dtype=float)[order]
    if len(log_parameters) < 3 or sorted_losses.argmin() in (0, len(sorted_losses) - 1):
        return None
    parabola = np.polynomial.Polynomial.fit(log_parameters, sorted_losses, 2)
    minimum = float(parabola.deriv().roots()[0].real)
    is_maximum = parabola.deriv(2)(minimum) <= 0
    if is_maximum or not log_parameters[0] < minimum < log_parameters[-1]:
        return None
    return math.exp(minimum), float(parabola(minimum))


# --- Files ------------------------------------------------------------------------------------------------------------


def read_runs(paths: Iterable[str]) -> tuple[list[float], list[float], list[float]]:
    """Read the parameters, tokens and losses of finished runs.

    Args:
        paths: Output folders, or `metrics.json` files.

    Raises:
        UserError: A file is missing, or is not that of a pretraining run.
    """
    parameters: list[float] = []
    tokens: list[float] = []
    losses: list[float] = []
    for path in map(Path, paths):
        file = path / "metrics.json" if path.is_dir() else path
        try:
            metrics = read_json(file)
            run_parameters, run_tokens, run_loss = (
                float(metrics[key]) for key in ("parameters", "train_tokens", "eval_loss")
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"has no {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
            raise UserError(f"{file} {reason}; name the folder of a finished pretraining run") from error
        parameters.append(run_parameters)
        tokens.append(run_tokens)
        losses.append(run_loss)
    return parameters, tokens, losses


def load_law(path: str) -> ScalingLaw:
    """Read a law from a JSON file with A, B, E, alpha and beta.

    Raises:
        UserError: The file cannot be read, or lacks a constant.
    """
    try:
        constants = read_json(path)
        return ScalingLaw(**{member.name: float(constants[member.name]) for member in fields(ScalingLaw)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        names = ", ".join(LAWS)
        raise UserError(
            f"{path} is no scaling law ({error!r}); name {names}, or a file with A, B, E, alpha, beta"
        ) from error
