"""What a finished run leaves beside the model: metrics, a loss curve, samples, its lineage and its card."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from unlabeled.planning import describe_cost, format_count, peak_memory_bytes
from unlabeled.reporting.lineage import make_lineage, non_default_arguments, parent_of
from unlabeled.reporting.metrics import loss_unit, summarize_run, values_before
from unlabeled.reporting.model_card import write_card
from unlabeled.reporting.stages import stage_of_objective
from unlabeled.runtime.files import write_json
from unlabeled.runtime.write_errors import user_error_on_failed_write

if TYPE_CHECKING:
    from unlabeled.training.trainer import ExactTrainerMixin


@dataclass
class Samples:
    """What a trained model does with held-out text.

    Attributes:
        markdown: for `samples.md` and the terminal.
        example: an input for the code in the model card: a prompt, a sentence with the mask token, a text to classify,
            or two sentences to embed.
        metrics: measured on the way, recorded with the others.
    """

    markdown: str
    example: str | list | dict | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def batch_sizes(args) -> dict[str, float]:
    """What a step trains on: tokens where they were counted, and pairs or examples where the budget is in them."""
    units = dict.fromkeys(("tokens", args.unit))
    sizes = {unit: getattr(args, f"batch_{unit}") for unit in units}
    return {unit: size for unit, size in sizes.items() if size}


def named_model(arguments: tuple) -> str | None:
    """The checkpoint or Hub name that a run starts from, None from scratch."""
    names = (getattr(dataclass, "model_name_or_path", None) for dataclass in arguments)
    return next((name for name in names if name), None)


def write_results(trainer: "ExactTrainerMixin", metrics: dict, samples: Samples) -> dict:
    """Write what a finished run leaves beside the model; metrics.json comes last and says that it is finished.

    Returns:
        the metrics of the whole run: held-out, speed, costs and what they were expected to be.
    """
    # matplotlib takes a second to import, for which nobody should wait before the first step
    from unlabeled.reporting.plots import plot_loss

    args, plan = trainer.args, trainer.plan
    folder = Path(args.output_dir)
    history = trainer.state.log_history
    trained = {unit: round(trainer.state.global_step * size) for unit, size in batch_sizes(args).items()}
    unit = next(iter(trained))
    if args.eval_on_start:  # fine-tuning: what the model could do before
        first_evaluation = next(entry for entry in history if "eval_loss" in entry)
        metrics = metrics | values_before(metrics, first_evaluation)
    metrics = metrics | run_metrics(trainer, trained)
    stage = stage_of_objective(trainer.objective)
    references = {"unigram_entropy": "unigram entropy", "eval_loss_before": "before"}
    configuration = non_default_arguments(*trainer.arguments) | {"objective": trainer.objective}
    example = default_example(trainer) if samples.example is None else samples.example
    with user_error_on_failed_write(str(folder), "the results"):
        plot_loss(
            history,
            folder / "loss.png",
            f"{folder.resolve().name}: {format_count(plan['parameters'])} parameters",
            unit=loss_unit(stage, metrics),
            references={name: metrics[key] for key, name in references.items() if key in metrics},
            over=unit,
        )
        if samples.markdown:
            (folder / "samples.md").write_text(samples.markdown, encoding="utf-8")
        write_json(folder / "history.json", history)
        parent = parent_of(named_model(trainer.arguments))
        lineage = make_lineage(configuration, trainer.manifest, plan, metrics, parent)
        write_json(folder / "lineage.json", lineage)
        write_card(str(folder), lineage, example)
        write_json(folder / "metrics.json", metrics)
    amounts = ", ".join(f"{amount:,} {name}" for name, amount in trained.items())
    print(f"\n{summarize_run(stage, metrics)}")
    print(f"{amounts}, {metrics[f'{unit}_per_second']:,.0f} {unit} per second")
    print(describe_cost(metrics))
    print(f"everything is in {folder}", flush=True)
    return metrics


def run_metrics(trainer: "ExactTrainerMixin", trained: dict[str, int]) -> dict[str, float]:
    """Speed and costs of a run, beside what the plan expected.

    Args:
        trained: {unit: amount} of tokens, and of pairs or examples.
    """
    args, plan, state = trainer.args, trainer.plan, trainer.state
    seconds = trainer.timer.seconds
    flops = plan["flops"] * state.global_step / args.max_steps  # it may have stopped early
    metrics = {
        **{f"train_{unit}": amount for unit, amount in trained.items()},
        "train_seconds": round(seconds, 3),
        "expected_seconds": trainer.progress.expected_seconds,
        **{f"{reason}_seconds": round(paused, 3) for reason, paused in trainer.timer.paused_seconds.items()},
        **{f"{unit}_per_second": round(amount / max(seconds, 1e-9), 1) for unit, amount in trained.items()},
        "steps": state.global_step,
        "skipped_steps": sum("skipped_steps" in entry for entry in state.log_history),
        "parameters": plan["parameters"],
        "flops": flops,
        "expected_flops": plan["flops"],
        "peak_memory_bytes": peak_memory_bytes(args.device),
        "expected_memory_bytes": sum(plan["memory_estimate"].values()) + plan["memory_before"],
        "flops_per_second": flops / max(seconds, 1e-9),  # of all processes
    }
    if plan["peak_flops"]:
        metrics["mfu"] = metrics["flops_per_second"] / (plan["peak_flops"] * args.world_size)
    return metrics


def default_example(trainer: "ExactTrainerMixin") -> str | list[str]:
    """An input for the code in the model card where the recipe names none."""
    if trainer.objective == "mlm":
        return f"This is a {trainer.processing_class.mask_token}."
    if trainer.objective == "embed":
        return ["This is a text.", "This is another text."]
    return "This is a text"
