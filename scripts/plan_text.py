"""A plan as a person reads it, and as the YAML that runs it."""

import argparse
import shlex
import sys
from pathlib import Path

import yaml

from unlabeled import UserError
from unlabeled.planning.formatting import format_count, format_duration
from unlabeled.planning.scaling_laws import LAWS

FITTED = (44e6, 16e9)  # parameters of the models of Hoffmann et al. 2022, to which Besiroglu et al. fitted as well


def show(args: argparse.Namespace, plan: dict) -> str:
    """The plan in lines for the terminal."""
    model = plan["model"]
    lines = []

    def say(name: str, text: str) -> None:
        lines.append(f"  {name:<12}{text}")

    if "loss" in plan:
        law, ranges = plan["law"], plan["intervals"]
        terms = f"{law['E']:.3f} + {law['A']:.1f} / N^{law['alpha']:.3f} + {law['B']:.1f} / D^{law['beta']:.3f}"
        say("law", f"{law['name']}: loss = {terms}")
        for name, (low, high) in (ranges or {}).items():
            say("", f"{name} between {low:.4g} and {high:.4g} (95 %)")
    attention = "" if plan["attention_share"] is None else f", {plan['attention_share']:.0%} of them attention"
    most = "" if plan["exact"] else "at most "
    say(
        "budget",
        f"{most}{format_count(plan['flops'])} FLOPs, {format_count(plan['flops_per_token'])} for a token{attention}",
    )
    say("model", f"{model['model_type']}, {model['num_hidden_layers']} layers, width {model['hidden_size']:,},"
        f" {model['num_attention_heads']} heads, vocabulary {model['vocab_size']:,}")  # fmt: skip
    say("parameters", f"{model['total']:,} (embedding {model['embedding']:,}, matmul {model['matmul']:,})"
        + (f", {plan['trainable']:,} of an adapter trained" if plan["trainable"] else ""))  # fmt: skip
    known = "" if plan["exact"] else ", were every text as long as a row; --tokens takes what the recipe counts"
    say("tokens", f"{most}{plan['tokens']:,.0f} = {plan['tokens_per_parameter']:.1f} per parameter{known}")
    if plan["target_length"]:
        say("", f"of each row of {plan['max_length']:,}, and {plan['target_length']:,} targets")
    if "loss" in plan:
        lines += _optimum(plan)
        if law["name"] in LAWS and not FITTED[0] <= model["total"] <= FITTED[1]:
            say("", "the law was fitted to models of 44M to 16B parameters, and knows little of this one: see --fit")
    if text := plan["text"]:
        how = "measured on a sample" if text["measured"] else "assumed; name a --tokenizer to measure it"
        say("text", f"{format_count(text['bytes'])} bytes, about {format_count(text['tokens'])} tokens"
            f" ({text['bytes_per_token']:.2f} bytes each, {how})")  # fmt: skip
        if "epochs" in plan:
            lines += _repetition(plan)
    say("batch", f"{plan['batch_tokens']:,} tokens = {plan['batch_tokens'] // plan['max_length']:,} rows of"
        f" {plan['max_length']:,}, {plan['steps']:,} steps")  # fmt: skip
    if plan["learning_rate"]:
        schedule = ", ".join(f"{key} {value}" for key, value in plan["schedule"].items())
        say("schedule", f"learning_rate {plan['learning_rate']:g}" + (f", {schedule}" if schedule else ""))
    if fit := plan["in_memory"]:
        total = sum(fit["memory"].values())
        unit, bytes_each, digits = ("GB", 1e9, 2) if total >= 1e9 else ("MB", 1e6, 0)
        parts = ", ".join(f"{part} {size / bytes_each:,.{digits}f}" for part, size in fit["memory"].items() if size)
        doubt = f" ({plan['not_calibrated']})" if plan["not_calibrated"] else ""
        say("memory", f"{total / bytes_each:,.{digits}f} {unit} a process{doubt}: {parts}")
        launch = f"ds_configs/{fit['launch']}.yaml" if fit["launch"] else "one process"
        say("launch", f"{launch}, micro-batch {fit['per_device_train_batch_size']}"
            + (", activation checkpointing" if fit["activation_checkpointing"] else ""))  # fmt: skip
    say("checkpoint", f"{plan['checkpoint_bytes'] / 1e9:.2f} GB"
        + (f", every {plan['time']['save_steps']:,} steps" if plan["time"] else ""))  # fmt: skip
    unknown = f"  {'time':<12}name a GPU as --device, or a run of your own with --measured"
    lines += _time(plan) if plan["time"] else [unknown]
    if "equivalent_budgets" in plan:
        bought = ", ".join(
            f"{format_count(tokens)} tokens of {name}" for name, tokens in plan["equivalent_budgets"].items()
        )
        say("or", f"for the same FLOPs {bought}")
    return "\n".join(lines)


def _optimum(plan: dict) -> list[str]:
    best, share = plan["optimum"], plan["share_of_flops_needed"]
    lines = [
        f"  {'loss':<12}{plan['loss']:.3f} by the law; at its optimum {best['loss']:.3f}, with"
        f" {format_count(best['parameters'])} parameters and {format_count(best['tokens'])} tokens"
    ]
    if share < 0.9:
        small = plan["model"]["total"] < best["parameters"]
        what = "smaller than the optimum, and cheaper to use" if small else "larger than the optimum: undertrained"
        lines.append(f"  {'':<12}{what}; the same loss could be had for {share:.0%} of the FLOPs")
    lines.append(f"  {'':<12}{'optimum by':<34}{'parameters':>12}{'tokens':>12}{'ratio':>8}")
    for name, (n, d) in plan["optima"].items():
        lines.append(f"  {'':<12}{name:<34}{format_count(n):>12}{format_count(d):>12}{d / n:>8.1f}")
    return lines


def _repetition(plan: dict) -> list[str]:
    epochs = plan["epochs"]
    if epochs <= 1:
        return [f"  {'':<12}{epochs:.0%} of it is read once"]
    lost = plan["loss_with_repetition"] - plan["loss"]
    return [
        f"  {'':<12}too small: read {epochs:.1f} times, worth {format_count(plan['effective_tokens'])} fresh tokens,"
        f" loss {plan['loss_with_repetition']:.3f} ({lost:+.3f})"
    ]


def _time(plan: dict) -> list[str]:
    time, gpus = plan["time"], plan["gpus"]
    speed = f"{format_count(time['flops_per_second'])} FLOP/s each"
    how = f"measured in {time['measured']}" if "measured" in time else f"{time['mfu']:.0%} of the peak, assumed"
    lines = [
        f"  {'time':<12}{format_duration(time['seconds'])} on {gpus} x {time['device']}: {speed}, {how}",
    ]
    if gpus > 1:
        lines.append(f"  {'':<12}{time['communication_bytes_per_step'] / 1e9:.2f} GB sent by each process a step")
    if time["usd"] is not None:
        lines.append(f"  {'price':<12}{time['usd']:,.2f} for {time['gpu_hours']:,.1f} GPU hours")
    return lines


def write_yaml(args: argparse.Namespace, plan: dict) -> None:
    """A YAML for recipes/pretrain_clm.py, which runs as it is.

    Raises:
        UserError: the file exists already, or cannot be written.
    """
    model, fit = plan["model"], plan["in_memory"] or {}
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
             "tie_word_embeddings")  # fmt: skip
    rows = plan["batch_tokens"] // plan["max_length"] // plan["gpus"]
    micro = fit.get("per_device_train_batch_size") or max(m for m in range(1, min(rows, 16) + 1) if rows % m == 0)
    keys = {
        "model_type": "llama",
        "config_overrides": {name: model[name] for name in sizes},
        "tokenizer_name_or_path": args.tokenizer,
        "train_data": args.data,
        "eval_fraction": 0.01,
        "max_length": plan["max_length"],
        "train_tokens": plan["steps"] * plan["batch_tokens"],
        "batch_tokens": plan["batch_tokens"],
        "per_device_train_batch_size": micro,
        "learning_rate": plan["learning_rate"],
        **plan["schedule"],
        "max_grad_norm": 1.0,
        **({"activation_checkpointing": True} if fit.get("activation_checkpointing") else {}),
        "logging_steps": max(plan["steps"] // 100, 1),
        "eval_strategy": "steps",
        "eval_steps": 0.25,
        "save_steps": plan["time"]["save_steps"] if plan["time"] else max(plan["steps"] // 10, 1),
        "save_total_limit": 2,
        "output_dir": f"outputs/{Path(args.write).parent.name}/{Path(args.write).stem}",
    }
    file = Path(args.write)
    if file.exists():
        raise UserError(f"--write {file} exists; name another file")
    expected = f", {format_duration(plan['time']['seconds'])} expected" if plan["time"] else ""
    head = f"# Planned{expected}; not yet measured.\n# python scripts/plan.py {shlex.join(sys.argv[1:])}\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(head + yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--write {file} cannot be written: {error.strerror}; name another place") from error
