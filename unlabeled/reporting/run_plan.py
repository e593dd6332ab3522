"""The plan of a run, printed before step 0: its sizes, cost, schedule and memory, and warnings about the data."""

import math
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from unlabeled import compat
from unlabeled.data.summary import data_warnings, describe_left_out, describe_sources
from unlabeled.errors import UserError
from unlabeled.models.optimizers import describe_coverage
from unlabeled.models.schedules import learning_rate_factor
from unlabeled.planning import (
    ParameterCounts,
    RunCosts,
    RunSizes,
    count_parameters,
    device_name,
    format_count,
    not_calibrated,
    peak_flops,
    resident_bytes,
    run_costs,
)


@dataclass(frozen=True)
class RunEstimate:
    """What a run costs, and the counts and sizes from which that follows."""

    counts: ParameterCounts
    sizes: RunSizes
    costs: RunCosts


def estimate_run(
    model: PreTrainedModel | PeftModel, args: Any, manifest: dict, head_share: float | None = None
) -> RunEstimate:
    """Estimate the FLOPs, memory and disk space of a run.

    Args:
        args: the training arguments, with a budget.
        manifest: of the prepared data.
        head_share: share of the positions at which the output head is computed; None if all logits are kept.

    Raises:
        UserError: the FLOPs of the model's architecture are not defined.
    """
    counts = count_parameters(model)
    sizes = run_sizes(model, args, manifest, head_share)
    try:
        costs = run_costs(counts, model.config, sizes)
    except (ValueError, AttributeError) as error:
        raise UserError(f"model_type {model.config.model_type} is not supported: {error}; choose another") from error
    return RunEstimate(counts, sizes, costs)


def run_sizes(
    model: PreTrainedModel | PeftModel, args: Any, manifest: dict, head_share: float | None = None
) -> RunSizes:
    """The sizes from which the cost of a run follows; see `estimate_run` for the arguments."""
    is_pairs = args.unit == "pairs"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return RunSizes(
        train_tokens=args.train_tokens,
        max_length=args.max_length,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        trainable=sum(compat.whole_numel(parameter) for parameter in trained),
        optimizer=args.optimizer,
        precision="bf16" if args.bf16 else "fp32",
        world_size=args.world_size,
        zero_stage=zero_stage(args),
        attn_implementation=compat.attention_implementation(model.config),
        activation_checkpointing=bool(args.activation_checkpointing),
        target_length=manifest.get("target_length", 0),
        pairs=is_pairs,
        reference=is_pairs and not getattr(args, "precompute_ref_log_probs", True),
        embeds_twice=getattr(args, "embeds_twice", False),
        adapted=isinstance(model, PeftModel) or compat.has_loaded_adapter(model),
        head_share=head_share,
        device=args.device.type,
        objective=manifest.get("objective", "clm"),
        streamed=bool(manifest["splits"]["train"].get("estimated")),
    )


def zero_stage(args: Any) -> int:
    """The ZeRO stage of a run, 0 without DeepSpeed."""
    if not args.deepspeed_plugin:
        return 0
    return args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"]


def make_run_plan(
    model: PreTrainedModel | PeftModel,
    args: Any,
    manifest: dict,
    estimate: RunEstimate,
    isolation: str,
    parent: str | None,
) -> dict:
    """Everything that follows from the arguments, as numbers (for lineage.json) and as lines (for the terminal).

    Args:
        args: the training arguments, with `torch_compile` resolved.
        manifest: of the prepared data.
        isolation: how documents that share a row are kept from attending to each other.
        parent: the model that the run starts from, None if it starts from random weights.

    Raises:
        UserError: the schedule or a strategy by epochs does not suit the run.
    """
    check_schedule(args, manifest["splits"]["train"])
    counts = estimate.counts
    sizes = estimate.sizes
    costs = estimate.costs
    device = device_name(args.device)
    peak = peak_flops(device, sizes.precision)
    # The weights are counted in the estimate of the training memory.
    weight_bytes = 4 * counts.total // (sizes.world_size if sizes.zero_stage == 3 else 1)
    bytes_before_training = 0 if sizes.device == "cuda" else resident_bytes() - weight_bytes
    checkpoints_on_disk = count_kept_checkpoints(args, manifest["splits"]["train"]["rows"]) + 1  # one is being written
    return {
        "lines": describe_run(model, args, manifest, estimate, isolation, parent),
        "parameters": counts.total,
        "embedding_parameters": counts.embedding,
        "matmul_parameters": counts.matmul,
        "flops": costs.flops,
        "flops_per_token": costs.flops / sizes.train_tokens,
        "peak_flops": peak,
        "device": device,
        "precision": sizes.precision,
        "compiled": args.torch_compile,
        "world_size": sizes.world_size,
        "zero_stage": sizes.zero_stage,
        "memory_estimate": costs.memory,
        "memory_before": bytes_before_training,
        "memory_by_micro_batch": {
            size: sum(parts.values()) + bytes_before_training for size, parts in costs.memory_by_micro_batch.items()
        },
        "trainable_parameters": sizes.trainable,
        "checkpoint_bytes": costs.checkpoint_bytes,
        "disk_bytes": checkpoints_on_disk * costs.checkpoint_bytes,
    }


def check_schedule(args: Any, train: dict) -> None:
    """Raise `UserError` if the learning rate schedule or a strategy by epochs does not suit the run.

    Trainer builds the schedule after the output folder has been created.
    """
    args.check_epochs(train)
    try:
        learning_rate_factor(args, args.max_steps)
    except (TypeError, ValueError) as error:
        name = args.lr_scheduler_type.value
        raise UserError(f"lr_scheduler_type {name}: {error}; correct lr_scheduler_kwargs") from error


def count_kept_checkpoints(args: Any, rows_per_epoch: int) -> int:
    """The largest number of checkpoints that are in the output folder at a time."""
    saves = 1  # at the end
    if args.save_strategy == "steps" and args.save_steps:
        share_of_run = args.save_steps / args.max_steps if args.save_steps >= 1 else args.save_steps
        saves = math.ceil(1 / share_of_run)
    if args.save_strategy == "epoch":
        saves = math.ceil(args.max_steps * args.rows_per_step / rows_per_epoch)
    best = int(args.load_best_model_at_end)  # is kept beside the last one
    return min(saves, (args.save_total_limit or saves) + best)


# --- The plan as lines ------------------------------------------------------------------------------------------------


def describe_run(
    model: PreTrainedModel | PeftModel,
    args: Any,
    manifest: dict,
    estimate: RunEstimate,
    isolation: str,
    parent: str | None,
) -> dict[str, str | list[str]]:
    """The lines of the plan by their names; see `make_run_plan` for the arguments."""
    train = manifest["splits"]["train"]
    is_packed = args.unit == "tokens"
    lines: dict[str, str | list[str]] = {
        "model": describe_model(model, estimate, parent),
        "parameters": describe_parameters(estimate.counts),
        "text": describe_text(train, args.unit),
        "budget": describe_budget(args, train, estimate),
        "batch": describe_batch(args),
        "schedule": describe_schedule(args),
        "optimizer": describe_optimizer(model, args),
        "device": describe_device(model, args, estimate.sizes.precision),
        "isolation": isolation,
        "memory": describe_memory(args, estimate),
    }
    if not is_packed:  # of packed data, the lines on the manifest say it
        left_out = [
            f"{name} {describe_left_out(split)}" for name, split in manifest["splits"].items() if split.get("left_out")
        ]
        if left_out:
            lines["left out"] = "; ".join(left_out)
        lines |= describe_sources(manifest)
    warnings = data_warnings(manifest, args.rows_per_step, args.unit)
    if warnings:
        lines["WARNING"] = warnings
    return lines


def describe_model(model: PreTrainedModel | PeftModel, estimate: RunEstimate, parent: str | None) -> str:
    base_model = model.get_base_model() if isinstance(model, PeftModel) else model
    line = f"{type(base_model).__name__}, {f'continued from {parent}' if parent else 'from scratch'}"
    if estimate.sizes.adapted:
        line += f", an adapter of {estimate.sizes.trainable / estimate.counts.total:.2%} of the parameters"
    return line


def describe_parameters(counts: ParameterCounts) -> str:
    return f"{counts.total:,} (embedding {counts.embedding:,}, matmul {counts.matmul:,})"


def describe_text(train: dict, unit: str) -> str:
    is_packed = unit == "tokens"
    line = f"{train['text_tokens']:,} tokens in {train['documents']:,} {'documents' if is_packed else unit}"
    if train.get("estimated"):
        line = f"about {line}"
    if is_packed:
        line += f", rows {train['packing_efficiency']:.2%} full"
    return line


def describe_budget(args: Any, train: dict, estimate: RunEstimate) -> str:
    epochs = args.max_steps * args.rows_per_step / train["rows"]
    tokens_per_parameter = args.train_tokens / estimate.counts.total
    line = (
        f"{args.train_tokens:,} tokens = {epochs:.2f} epochs = {tokens_per_parameter:.1f} per parameter, "
        f"{format_count(estimate.costs.flops)} FLOPs"
    )
    if args.unit != "tokens":
        line = f"{getattr(args, f'train_{args.unit}'):,} {args.unit}, {line}"
    return line


def describe_batch(args: Any) -> str:
    is_packed = args.unit == "tokens"
    factors = [
        f"{args.world_size} {'process' if args.world_size == 1 else 'processes'}",
        f"{args.per_device_train_batch_size} {'rows' if is_packed else args.unit}",
        f"{args.gradient_accumulation_steps} accumulated",
    ]
    if is_packed:
        factors.append(f"{args.max_length} tokens")
    size = getattr(args, f"batch_{args.unit}")
    return f"{size:,} {args.unit} = {' x '.join(factors)}, {args.max_steps:,} steps"


def describe_schedule(args: Any) -> str:
    line = f"{args.lr_scheduler_type.value}, {args.get_warmup_steps(args.max_steps)} steps warm-up"
    decay_steps = (args.lr_scheduler_kwargs or {}).get("num_decay_steps")
    if decay_steps is not None:
        line += f", {decay_steps} steps decay"
    return line


def describe_optimizer(model: PreTrainedModel | PeftModel, args: Any) -> str:
    line = describe_coverage(model, args.optimizer)
    stage = zero_stage(args)
    return f"{line}, ZeRO-{stage}" if stage else line


def describe_device(model: PreTrainedModel | PeftModel, args: Any, precision: str) -> str:
    compilation = "compiled" if args.torch_compile else "not compiled"
    attention = compat.attention_implementation(model.config)
    return f"{device_name(args.device)}, {precision}, {compilation}, attention {attention}"


def describe_memory(args: Any, estimate: RunEstimate) -> str:
    process_bytes = sum(estimate.costs.memory.values())
    memory = f"about {process_bytes / 1e9:.2f} GB a process"
    reason = not_calibrated(estimate.sizes, args.torch_compile)
    if reason:
        memory += f" ({reason})"
    line = f"{memory}, checkpoint {estimate.costs.checkpoint_bytes / 1e9:.2f} GB"
    if not peak_flops(device_name(args.device), estimate.sizes.precision):
        line += ", no MFU: the peak of the device is not known"
    return line


def print_run_plan(plan: dict) -> None:
    """Print the lines of a plan, each after its name."""
    for name, lines in plan["lines"].items():
        for line in [lines] if isinstance(lines, str) else lines:
            print(f"  {name:<11}{line}", flush=True)
