"""A plan as lines for the terminal."""

from collections.abc import Iterator
from typing import Any

from unlabeled.planning.formatting import format_count, format_duration
from unlabeled.planning.scaling_laws import LAWS

# Parameters of the models of Hoffmann et al. 2022, to which Besiroglu et al. 2024 fitted as well.
SMALLEST_FITTED_MODEL = 44e6
LARGEST_FITTED_MODEL = 16e9
NAME_WIDTH = 12
Line = tuple[str, str]  # its name, which is empty where a line continues the one above, and its text


def format_plan(plan: dict[str, Any]) -> str:
    """Format a plan of `make_plan` for the terminal."""
    lines: list[Line] = []
    if "loss" in plan:
        lines += _law_lines(plan)
    lines += _size_lines(plan)
    if "loss" in plan:
        lines += _loss_lines(plan)
    if plan["text"]:
        lines += _text_lines(plan)
    lines += _schedule_lines(plan)
    if plan["in_memory"]:
        lines += _memory_lines(plan)
    lines.append(("checkpoint", _checkpoint_text(plan)))
    lines += _time_lines(plan)
    if "equivalent_budgets" in plan:
        budgets = plan["equivalent_budgets"].items()
        text = ", ".join(f"{format_count(tokens)} tokens of {stage}" for stage, tokens in budgets)
        lines.append(("same FLOPs", text))
    return "\n".join(f"  {name:<{NAME_WIDTH}}{text}" for name, text in lines)


def _law_lines(plan: dict[str, Any]) -> Iterator[Line]:
    law = plan["law"]
    formula = f"{law['E']:.3f} + {law['A']:.1f} / N^{law['alpha']:.3f} + {law['B']:.1f} / D^{law['beta']:.3f}"
    yield "law", f"{law['name']}: loss = {formula}"
    for constant, (low, high) in (plan["intervals"] or {}).items():
        yield "", f"{constant} between {low:.4g} and {high:.4g} (95 %)"


def _size_lines(plan: dict[str, Any]) -> Iterator[Line]:
    at_most = "" if plan["exact"] else "at most "
    budget = f"{at_most}{format_count(plan['flops'])} FLOPs, {format_count(plan['flops_per_token'])} per token"
    if plan["attention_share"] is not None:
        budget += f", {plan['attention_share']:.0%} of them for attention"
    yield "budget", budget

    model = plan["model"]
    yield (
        "model",
        f"{model['model_type']}, {model['num_hidden_layers']} layers, width {model['hidden_size']:,}, "
        f"{model['num_attention_heads']} heads, vocabulary {model['vocab_size']:,}",
    )
    parameters = f"{model['total']:,} (embedding {model['embedding']:,}, matmul {model['matmul']:,})"
    if plan["trainable"]:
        parameters += f", of which {plan['trainable']:,} of an adapter are trained"
    yield "parameters", parameters

    tokens = f"{at_most}{plan['tokens']:,.0f} = {plan['tokens_per_parameter']:.1f} per parameter"
    if not plan["exact"]:
        tokens += ", if every text fills a row; pass the number that the recipe counts with --tokens"
    yield "tokens", tokens
    if plan["target_length"]:
        yield "", f"of each row of {plan['max_length']:,} inputs, and {plan['target_length']:,} targets"


def _loss_lines(plan: dict[str, Any]) -> Iterator[Line]:
    best = plan["optimum"]
    yield (
        "loss",
        f"{plan['loss']:.3f} predicted; at the optimum {best['loss']:.3f}, with "
        f"{format_count(best['parameters'])} parameters and {format_count(best['tokens'])} tokens",
    )
    share = plan["share_of_flops_needed"]
    if share < 0.9:
        is_small = plan["model"]["total"] < best["parameters"]
        size = "smaller than the optimum, and cheaper to use" if is_small else "larger than the optimum: undertrained"
        yield "", f"{size}; the optimum reaches the same loss with {share:.0%} of the FLOPs"
    yield "", f"{'optimum by':<34}{'parameters':>12}{'tokens':>12}{'ratio':>8}"
    for name, (parameters, tokens) in plan["optima"].items():
        ratio = tokens / parameters
        yield "", f"{name:<34}{format_count(parameters):>12}{format_count(tokens):>12}{ratio:>8.1f}"
    if plan["law"]["name"] in LAWS and not SMALLEST_FITTED_MODEL <= plan["model"]["total"] <= LARGEST_FITTED_MODEL:
        yield "", "the law was fitted to models of 44M to 16B parameters; fit one to runs of your own with --fit"


def _text_lines(plan: dict[str, Any]) -> Iterator[Line]:
    text = plan["text"]
    source = "measured on a sample" if text["measured"] else "assumed; name a --tokenizer to measure it"
    yield (
        "text",
        f"{format_count(text['bytes'])} bytes, about {format_count(text['tokens'])} tokens "
        f"({text['bytes_per_token']:.2f} bytes per token, {source})",
    )
    if "epochs" not in plan:
        return
    if plan["epochs"] <= 1:
        yield "", f"{plan['epochs']:.0%} of it is read once"
        return
    difference = plan["loss_with_repetition"] - plan["loss"]
    yield (
        "",
        f"too small: it is read {plan['epochs']:.1f} times, which is worth {format_count(plan['effective_tokens'])} "
        f"tokens read once; predicted loss {plan['loss_with_repetition']:.3f} ({difference:+.3f})",
    )


def _schedule_lines(plan: dict[str, Any]) -> Iterator[Line]:
    rows = plan["batch_tokens"] // plan["max_length"]
    yield "batch", f"{plan['batch_tokens']:,} tokens = {rows:,} rows of {plan['max_length']:,}, {plan['steps']:,} steps"
    if plan["learning_rate"]:
        settings = [f"learning_rate {plan['learning_rate']:g}"]
        settings += [f"{key} {value}" for key, value in plan["schedule"].items()]
        yield "schedule", ", ".join(settings)


def _memory_lines(plan: dict[str, Any]) -> Iterator[Line]:
    fit = plan["in_memory"]
    total = sum(fit["memory"].values())
    unit, unit_bytes, digits = ("GB", 1e9, 2) if total >= 1e9 else ("MB", 1e6, 0)
    parts = ", ".join(f"{part} {size / unit_bytes:,.{digits}f}" for part, size in fit["memory"].items() if size)
    caveat = f" ({plan['not_calibrated']})" if plan["not_calibrated"] else ""
    yield "memory", f"{total / unit_bytes:,.{digits}f} {unit} a process{caveat}: {parts}"
    launch = f"ds_configs/{fit['launch']}.yaml" if fit["launch"] else "one process"
    launch += f", micro-batch {fit['per_device_train_batch_size']}"
    if fit["activation_checkpointing"]:
        launch += ", activation checkpointing"
    yield "launch", launch


def _checkpoint_text(plan: dict[str, Any]) -> str:
    text = f"{plan['checkpoint_bytes'] / 1e9:.2f} GB"
    if plan["time"]:
        text += f", every {plan['time']['save_steps']:,} steps"
    return text


def _time_lines(plan: dict[str, Any]) -> Iterator[Line]:
    time = plan["time"]
    if time is None:
        yield "time", "not known; name a GPU with --device, or a run of your own with --measured"
        return
    source = f"measured in {time['measured']}" if "measured" in time else f"{time['mfu']:.0%} of the peak, assumed"
    yield (
        "time",
        f"{format_duration(time['seconds'])} on {plan['gpus']} x {time['device']}: "
        f"{format_count(time['flops_per_second'])} FLOP/s each, {source}",
    )
    if plan["gpus"] > 1:
        yield "", f"each process sends {time['communication_bytes_per_step'] / 1e9:.2f} GB in a step"
    if time["usd"] is not None:
        yield "price", f"{time['usd']:,.2f} USD for {time['gpu_hours']:,.1f} GPU hours"
