"""The scaling law of a plan, and where a run lies on it."""

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from unlabeled.planner.options import PlanOptions
from unlabeled.planning.scaling_laws import (
    BESIROGLU,
    HOFFMANN,
    LAWS,
    ScalingLaw,
    approach_1,
    bootstrap,
    effective_tokens,
    fit,
    fixed_ratio,
    intervals,
    load_law,
    read_runs,
)

BOOTSTRAP_REPEATS = 100


@dataclass(frozen=True)
class NamedLaw:
    """A scaling law.

    Attributes:
        name: Its name, its file, or the number of runs that it was fitted to.
        law: The law.
        intervals: 95 % intervals of its constants by name, if it was fitted here.
    """

    name: str
    law: ScalingLaw
    intervals: dict[str, tuple[float, float]] | None = None


def choose_law(options: PlanOptions) -> NamedLaw:
    """Return the law that the options name, or fit one to the runs that they name.

    Raises:
        UserError: There is no such law, or the runs do not determine one.
    """
    if options.fit:
        return fit_law(options.fit)
    if options.law in LAWS:
        return NamedLaw(options.law, LAWS[options.law])
    return NamedLaw(options.law, load_law(options.law))


def fit_law(folders: list[str]) -> NamedLaw:
    """Fit a law to finished runs, with intervals by bootstrap."""
    runs = read_runs(folders)
    samples = bootstrap(*runs, repeats=BOOTSTRAP_REPEATS)
    constants = [member.name for member in fields(ScalingLaw)]
    ranges = {name: intervals(samples, attrgetter(name)) for name in constants}
    return NamedLaw(f"fit of {len(folders)} runs", fit(*runs), ranges)


def compare_with_optimum(
    law: ScalingLaw, parameters: float, tokens: float, unique_tokens: float | None
) -> dict[str, Any]:
    """Compare a run with the best run of the same FLOPs.

    Args:
        law: The law that predicts the loss.
        parameters: The size of the model.
        tokens: The tokens that it is trained on.
        unique_tokens: The tokens of the text; None if it is not known.

    Returns:
        The predicted `loss`; the `optimum` for the same FLOPs, by this law, and by others as `optima`;
        `share_of_flops_needed`, with which the optimum reaches the same loss; and if the text is known, how often it
        is read (`epochs`), what that is worth in tokens read once, and the loss with them.
    """
    flops = 6 * parameters * tokens
    loss = law.loss(parameters, tokens)
    best_parameters, best_tokens = law.optimum(flops)
    comparison = {
        "loss": loss,
        "optimum": {
            "parameters": best_parameters,
            "tokens": best_tokens,
            "loss": law.loss(best_parameters, best_tokens),
        },
        "share_of_flops_needed": law.flops_to_reach(loss) / flops,
        "optima": {
            "besiroglu": BESIROGLU.optimum(flops),
            "hoffmann, approach 1": approach_1(flops),
            "hoffmann, approach 3 as printed": HOFFMANN.optimum(flops),
            "20 per parameter": fixed_ratio(flops, 20),
        },
    }
    if unique_tokens:
        effective = effective_tokens(tokens, unique_tokens)
        comparison["epochs"] = tokens / unique_tokens
        comparison["effective_tokens"] = effective
        comparison["loss_with_repetition"] = law.loss(parameters, effective)
    return comparison
