"""What a run costs, before it starts. Pure functions; importing them loads neither torch nor transformers."""

from unlabeled.planning.counts import (
    Budget,
    ParameterCounts,
    count_parameters,
    plan_steps,
    training_flops_per_token,
)
from unlabeled.planning.devices import (
    available_cores,
    device_name,
    main_memory_bytes,
    peak_flops,
    peak_memory_bytes,
    resident_bytes,
)
from unlabeled.planning.formatting import describe_cost, format_count, format_duration
from unlabeled.planning.memory import checkpoint_bytes, memory_estimate
from unlabeled.planning.runs import RunCosts, RunSizes, not_calibrated, run_costs

__all__ = [
    "Budget",
    "ParameterCounts",
    "RunCosts",
    "RunSizes",
    "available_cores",
    "checkpoint_bytes",
    "count_parameters",
    "describe_cost",
    "device_name",
    "format_count",
    "format_duration",
    "main_memory_bytes",
    "memory_estimate",
    "not_calibrated",
    "peak_flops",
    "peak_memory_bytes",
    "plan_steps",
    "resident_bytes",
    "run_costs",
    "training_flops_per_token",
]
