"""The registry of metrics: how each one is called, written and compared, wherever it is shown.

The summary of a run, model cards, reports and the table of a chain read it. A number in `metrics.json` that is not in
the registry, such as one that a trainer of your own computes, is shown under its key.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from unlabeled.reporting.stages import DEFAULT_LOSS_UNIT, STAGE_KINDS

LANGUAGE_MODELING = ("pretrain_clm", "pretrain_mlm", "pretrain_span", "sft", "evaluate")
WITH_LOSS = (*LANGUAGE_MODELING, "dpo", "classify", "tag", "embed")
TRAINED = tuple(name for name in WITH_LOSS if name != "evaluate")


@dataclass(frozen=True)
class Metric:
    """A number that `metrics.json` may have.

    Attributes:
        key: its key in `metrics.json`.
        label: what it is called.
        spec: a format specification.
        stages: names of the stages that report it.
        unit: what it is measured in. None stands for the unit of the stage's loss, "" for a number without a unit.
        higher_is_better: None where neither direction is.
        is_compared: whether fine-tuning records it before the first step too, as `KEY_before`.
        scale: factor between the recorded value and the one shown.
    """

    key: str
    label: str
    spec: str
    stages: tuple[str, ...]
    unit: str | None = ""
    higher_is_better: bool | None = None
    is_compared: bool = True
    scale: float = 1.0

    def format(self, value: float) -> str:
        return format(value * self.scale, self.spec)


def task_metrics(split: str, adjective: str) -> tuple[Metric, ...]:
    """The metrics of classification and tagging on a split."""
    # fmt: off
    return (
        Metric(f"{split}_accuracy", f"{adjective} accuracy", ".4f", ("classify",), higher_is_better=True),
        Metric(f"{split}_f1", f"{adjective} entity F1", ".4f", ("tag",), higher_is_better=True),
        Metric(f"{split}_spearmanr", f"{adjective} Spearman's rho", ".4f", ("classify",), higher_is_better=True),
        Metric(f"{split}_pearsonr", f"{adjective} Pearson's r", ".4f", ("classify",), higher_is_better=True),
        Metric(f"{split}_macro_f1", f"{adjective} macro F1", ".4f", ("classify",), higher_is_better=True),
        Metric(f"{split}_matthews_correlation", f"{adjective} Matthews correlation", ".4f", ("classify",),
               higher_is_better=True),
        Metric(f"{split}_precision", f"{adjective} entity precision", ".4f", ("tag",), higher_is_better=True),
        Metric(f"{split}_recall", f"{adjective} entity recall", ".4f", ("tag",), higher_is_better=True),
        Metric(f"{split}_mse", f"{adjective} mean squared error", ".4f", ("classify",), higher_is_better=False),
    )
    # fmt: on


# What a stage has reached, in the order in which it is shown.
# fmt: off
METRICS: dict[str, Metric] = {metric.key: metric for metric in (
    Metric("preference_accuracy", "preference accuracy", ".3f", ("dpo",), higher_is_better=True),
    Metric("reward_accuracy", "reward accuracy", ".3f", ("dpo",), higher_is_better=True),
    Metric("reward_margin", "reward margin", ".3f", ("dpo",), higher_is_better=True, is_compared=False),
    *task_metrics("test", "test"),
    *task_metrics("eval", "held-out"),
    Metric("accuracy_at_1", "accuracy at 1", ".4f", ("embed",), higher_is_better=True),
    Metric("mrr", "mean reciprocal rank", ".4f", ("embed",), higher_is_better=True),
    Metric("spearmanr", "Spearman's rho", ".4f", ("embed",), higher_is_better=True),
    Metric("eval_loss", "held-out loss", ".4f", WITH_LOSS, unit=None, higher_is_better=False),
    Metric("restored_spans", "spans restored word for word", ".3f", ("pretrain_span",), higher_is_better=True),
    Metric("perplexity", "perplexity", ".2f", LANGUAGE_MODELING, higher_is_better=False, is_compared=False),
    Metric("bits_per_byte", "bits per byte", ".4f", ("pretrain_clm", "pretrain_mlm", "sft", "evaluate"),
           higher_is_better=False, is_compared=False),
    Metric("eval_loss_at_training_rate", "loss at the masking rate of training", ".4f", ("pretrain_mlm",),
           unit="nats per target token", higher_is_better=False),
    Metric("unigram_entropy", "unigram entropy of the targets", ".4f", LANGUAGE_MODELING, unit="nats",
           is_compared=False),
    Metric("logits_difference", "largest difference of a logit from the model with adapter", ".1e", ("merge",),
           higher_is_better=False),
)}
# What a stage has cost. `unlabeled.planning.cost` puts the others of RUN_KEYS into a sentence.
COST_METRICS: dict[str, Metric] = {metric.key: metric for metric in (
    Metric("parameters", "parameters", ",.0f", (*TRAINED, "merge")),
    Metric("steps", "steps", ",.0f", TRAINED),
    Metric("tokens_per_second", "tokens per second", ",.0f", TRAINED, higher_is_better=True),
    Metric("mfu", "model FLOPs utilization", ".1%", TRAINED, higher_is_better=True),
    Metric("peak_memory_bytes", "peak memory", ".2f", TRAINED, unit="GB", higher_is_better=False, scale=1e-9),
)}
# fmt: on
# The other keys that recipes and scripts write to metrics.json: counts, and what was expected of the run.
RUN_KEYS = frozenset(
    {
        "bytes",
        "documents",
        "eval_examples",
        "evaluation_seconds",
        "examples_per_second",
        "expected_flops",
        "expected_memory_bytes",
        "expected_seconds",
        "flops",
        "flops_per_second",
        "max_length",
        "mlm_probability",
        "pairs",
        "pairs_per_second",
        "restored_of",
        "saving_seconds",
        "skipped_steps",
        "targets",
        "test_examples",
        "test_loss",
        "text_tokens",
        "train_examples",
        "train_pairs",
        "train_seconds",
        "train_tokens",
    }
)


class MetricText(NamedTuple):
    """A metric as text: its label with the unit, its value, and the value before the stage or ""."""

    label: str
    value: str
    before: str

    @property
    def phrase(self) -> str:
        """The label, without its unit, and the value: "accuracy 0.9123", "2.2935 bits per byte"."""
        label = self.label.split(" (")[0].removeprefix("held-out ")
        return f"{self.value} {label}" if label == "bits per byte" else f"{label} {self.value}"


def loss_unit(stage: str, metrics: Mapping) -> str:
    """The unit of a stage's loss. Regression is trained on the squared error."""
    if "eval_mse" in metrics:
        return "squared error"
    return STAGE_KINDS[stage].loss_unit if stage in STAGE_KINDS else DEFAULT_LOSS_UNIT


def finite_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def extra_keys(metrics: Mapping) -> Iterator[str]:
    """The keys of numbers that no registry has, such as those of a trainer of one's own."""
    for key, value in metrics.items():
        is_value_before = key.endswith("_before") and key.removesuffix("_before") in metrics
        is_known = key in METRICS or key in COST_METRICS or key in RUN_KEYS
        if finite_number(value) and not is_known and not is_value_before:
            yield key


def extra_metric(key: str) -> Metric:
    """A metric that is not in the registry; its key is its label."""
    return Metric(key, label=key, spec=",.4g", stages=())


def describe_metric(metric: Metric, stage: str, metrics: Mapping) -> MetricText | None:
    """A metric as text, or None if the run has no such number."""
    value = metrics.get(metric.key)
    if not finite_number(value):
        return None
    unit = loss_unit(stage, metrics) if metric.unit is None else metric.unit
    before = metrics.get(f"{metric.key}_before")
    return MetricText(
        label=f"{metric.label} ({unit})" if unit else metric.label,
        value=metric.format(value),
        before=metric.format(before) if finite_number(before) else "",
    )


def describe_metrics(stage: str, metrics: Mapping) -> list[MetricText]:
    """All results of a stage as text: those of the registry in its order, then the others by their keys."""
    listed = [*METRICS.values(), *map(extra_metric, extra_keys(metrics))]
    texts = (describe_metric(metric, stage, metrics) for metric in listed)
    return [text for text in texts if text is not None]


def describe_costs(stage: str, metrics: Mapping) -> list[MetricText]:
    """The `COST_METRICS` of a stage as text."""
    texts = (describe_metric(metric, stage, metrics) for metric in COST_METRICS.values())
    return [text for text in texts if text is not None]


def headline_metrics(stage: str, metrics: Mapping) -> list[MetricText]:
    """The metrics that summarize a stage, the most important one first; any others if it has none of these."""
    keys = STAGE_KINDS[stage].headline if stage in STAGE_KINDS else ()
    texts = (describe_metric(METRICS[key], stage, metrics) for key in keys)
    return [text for text in texts if text is not None] or describe_metrics(stage, metrics)


def values_before(metrics: Mapping, before: Mapping) -> dict[str, float]:
    """The values of an evaluation before the first step, as `KEY_before`, of the metrics that are compared.

    Args:
        metrics: of the finished run.
        before: the log entry of the evaluation before the first step.
    """
    keys = {key for key in before if key in METRICS and METRICS[key].is_compared}
    keys |= set(extra_keys(before)) & set(metrics)
    return {f"{key}_before": before[key] for key in sorted(keys)}


def summarize_run(stage: str, metrics: Mapping) -> str:
    """The results of a finished run in one line for the terminal."""
    parts = []
    for text in describe_metrics(stage, {key: value for key, value in metrics.items() if key != "unigram_entropy"}):
        label = "held-out loss" if text.label.startswith("held-out loss") else text.label
        part = f"{text.value} {label}" if label == "bits per byte" else f"{label} {text.value}"
        if text.before:
            part += f" (before {text.before})"
        elif label == "held-out loss" and "unigram_entropy" in metrics:
            part += f" (unigram entropy {metrics['unigram_entropy']:.4f})"
        parts.append(part)
    return ", ".join(parts)
