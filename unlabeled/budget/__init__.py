"""What a run costs, before it starts. Pure functions; importing them loads neither torch nor transformers."""

from unlabeled.budget.counts import (
    Budget,
    ParameterCounts,
    count_parameters,
    human,
    plan_steps,
    training_flops_per_token,
)
from unlabeled.budget.devices import peak_flops
from unlabeled.budget.memory import checkpoint_bytes, memory_estimate

__all__ = [
    "Budget",
    "ParameterCounts",
    "checkpoint_bytes",
    "count_parameters",
    "human",
    "memory_estimate",
    "peak_flops",
    "plan_steps",
    "training_flops_per_token",
]
