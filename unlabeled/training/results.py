"""What a finished run leaves beside the model: figures, a loss curve, samples, its lineage and its card."""

from pathlib import Path

from unlabeled.planning import describe_cost, peak_memory_bytes
from unlabeled.reporting.lineage import make_lineage
from unlabeled.reporting.metrics import loss_unit, summarize_run, values_before
from unlabeled.reporting.model_card import write_card
from unlabeled.reporting.stages import stage_of_objective
from unlabeled.runtime.files import write_json
from unlabeled.runtime.write_errors import user_error_on_failed_write
from unlabeled.training.trainer import ExactTrainerMixin, batch_sizes


def finish(
    trainer: ExactTrainerMixin,
    plan: dict,
    manifest: dict,
    metrics: dict,
    configuration: dict,
    parent: dict | None,
    samples: str,
    example: str | list | dict,
) -> None:
    """Write what a finished run leaves beside the model; metrics.json comes last and says that it is finished."""
    from unlabeled.reporting.plots import (
        plot_loss,  # matplotlib takes a second, for which nobody waits before the first step
    )

    args, folder = trainer.args, Path(trainer.args.output_dir)
    stage = stage_of_objective(trainer.objective)
    seconds, history = trainer.timer.seconds, trainer.state.log_history
    if args.eval_on_start:  # fine-tuning: what the model could do before
        before = next(entry for entry in history if "eval_loss" in entry)
        metrics = metrics | values_before(metrics, before)
    done = {kind: round(trainer.state.global_step * size) for kind, size in batch_sizes(args).items()}
    metrics = {
        **metrics,
        **{f"train_{unit}": amount for unit, amount in done.items()},
        "train_seconds": round(seconds, 3),
        **{f"{reason}_seconds": round(taken, 3) for reason, taken in trainer.timer.paused_seconds.items()},
        **{f"{unit}_per_second": round(amount / max(seconds, 1e-9), 1) for unit, amount in done.items()},
        "steps": trainer.state.global_step,
        "skipped_steps": sum("skipped_steps" in entry for entry in history),
        "parameters": plan["parameters"],
        "flops": plan["flops"] * trainer.state.global_step / args.max_steps,  # it may have stopped early
        "expected_flops": plan["flops"],
        "peak_memory_bytes": peak_memory_bytes(args.device),
        "expected_memory_bytes": sum(plan["memory_estimate"].values()) + plan["memory_before"],
    }
    metrics["flops_per_second"] = metrics["flops"] / max(seconds, 1e-9)  # of all processes
    if plan["peak_flops"]:
        metrics["mfu"] = metrics["flops_per_second"] / (plan["peak_flops"] * args.world_size)
    references, unit = {"unigram_entropy": "unigram entropy", "eval_loss_before": "before"}, next(iter(done))
    with user_error_on_failed_write(str(folder), "the results"):
        plot_loss(
            history,
            folder / "loss.png",
            f"{folder.resolve().name}: {plan['parameters'] / 1e6:.1f} M parameters",
            unit=loss_unit(stage, metrics),
            references={name: metrics[key] for key, name in references.items() if key in metrics},
            over=unit,
        )
        (folder / "samples.md").write_text(samples, encoding="utf-8")
        write_json(folder / "history.json", history)
        lineage = make_lineage(configuration, manifest, plan, metrics, parent)
        write_json(folder / "lineage.json", lineage)
        write_card(str(folder), lineage, example)
        write_json(folder / "metrics.json", metrics)
    print(
        f"\n{summarize_run(stage, metrics)}\n{', '.join(f'{amount:,} {unit}' for unit, amount in done.items())}, "
        f"{metrics[f'{unit}_per_second']:,.0f} {unit} per second\n{describe_cost(metrics)}\neverything is in {folder}"
    )
