"""A plan before the run: from a budget, a size, a text or a YAML to everything else.

    python scripts/plan.py --flops 1e20
    python scripts/plan.py --gpus 8 --hours 24 --device H100 --usd_per_gpu_hour 2.5
    python scripts/plan.py --parameters 124e6 --device "RTX 4090"
    python scripts/plan.py --config recipes/configs/gpt2-124m/pretrain_clm.yaml --device H100
    python scripts/plan.py --hours 1 --measured outputs/tiny/pretrain_clm --data data/demo/shakespeare/train.parquet \\
        --tokenizer outputs/tiny/tokenizer --write recipes/configs/mine/pretrain_clm.yaml

Loads no weights, and torch only for the YAML of a model that is continued. Time and price rest on --mfu, an assumption,
or on --measured, a run of your own.
"""

import argparse
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from plan_config import RECIPES, outline_of, read_config, sizes_of
from plan_inputs import hardware_of, law_of, measure_text
from plan_text import show, write_yaml

from unlabeled import UserError, exit_on_user_error
from unlabeled.planning.counts import ParameterCounts, training_flops_per_token
from unlabeled.planning.devices import update_seconds
from unlabeled.planning.memory import communication_bytes
from unlabeled.planning.planner import (
    SCHEDULE,
    checkpoint_seconds,
    equivalent_budgets,
    fit_into_memory,
    recommend_batch,
    recommend_learning_rate,
    recommend_shape,
)
from unlabeled.planning.runs import RunCosts, RunSizes, not_calibrated, run_costs
from unlabeled.planning.scaling_laws import (
    BESIROGLU,
    HOFFMANN,
    LAWS,
    ScalingLaw,
    approach_1,
    effective_tokens,
    fixed_ratio,
)
from unlabeled.planning.shapes import count_shape

DISK = 1e9  # bytes a second that a checkpoint is written with, assumed
NO_MATRICES = ParameterCounts(total=0, embedding=0, matmul=0, head=0)  # leaves the FLOPs of attention


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    start = parser.add_argument_group("where to start from")
    start.add_argument("--flops", type=float, help="compute budget")
    start.add_argument("--hours", type=float, help="hours on --gpus of --device")
    start.add_argument("--price", type=float, help="money, with --usd_per_gpu_hour")
    start.add_argument("--parameters", type=float, help="size of the model, embeddings included")
    start.add_argument("--tokens", type=float, help="tokens to train on")
    start.add_argument("--data", help="text at hand: a file, folder or glob, as in train_data")
    start.add_argument("--config", help="a recipe's YAML, to be priced as it is")
    start.add_argument("--recipe", help="the recipe of --config (default: its file's name begins with it)")
    model = parser.add_argument_group("model and law")
    model.add_argument("--tokenizer", help="folder of a tokenizer; gives the vocabulary and bytes per token")
    model.add_argument("--vocab_size", type=int, help="default: of --tokenizer, or 32,768")
    model.add_argument("--max_length", type=int, help="tokens in a row (default: 2,048, or the YAML's)")
    model.add_argument("--labels", type=int, default=2, help="classes or tags of a --config with labels (default: 2)")
    model.add_argument("--law", default="besiroglu", help=f"{', '.join(LAWS)} or a JSON file (default: besiroglu)")
    model.add_argument("--fit", nargs="+", metavar="RUN", help="fit the law to finished runs of your own")
    model.add_argument("--tokens_per_parameter", type=float, help="a fixed ratio instead of a law's")
    hardware = parser.add_argument_group("hardware")
    hardware.add_argument("--device", help="H100, 'A100 80GB', 'RTX 4090', ..., or cpu, for the memory alone")
    hardware.add_argument("--gpus", type=int, default=1, help="default: 1")
    hardware.add_argument("--mfu", type=float, default=0.4, help="utilisation to assume (default: 0.4)")
    hardware.add_argument("--measured", metavar="RUN", help="folder of a finished run, whose speed to assume instead")
    hardware.add_argument("--usd_per_gpu_hour", type=float, help="price of a device")
    hardware.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the plan as JSON")
    output.add_argument("--figure", metavar="PNG", help="draw the loss over size and tokens")
    output.add_argument("--write", metavar="YAML", help="write a YAML that recipes/pretrain_clm.py runs as it is")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Raises UserError for contradictions and for values that are no sizes."""
    budgets = [f"--{name}" for name in ("flops", "hours", "price") if getattr(args, name) is not None]
    if len(budgets) > 1:
        raise UserError(f"{' and '.join(budgets)} are two budgets; give one of them")
    starts = ("flops", "hours", "price", "parameters", "tokens", "data", "config")
    given = [name for name in starts if getattr(args, name) is not None]
    if not given:
        raise UserError("name where to start from: one of " + ", ".join(f"--{name}" for name in starts))
    other = [name for name in given if name not in ("config", "data", "tokens")]
    if args.config and other:
        raise UserError(f"--config has a size and a budget of its own; leave out --{other[0]}, or change the YAML")
    if budgets and args.parameters and args.tokens:
        raise UserError(f"--parameters and --tokens already make a budget; leave out {budgets[0]} or one of them")
    sizes = ("gpus", "mfu", "usd_per_gpu_hour", "vocab_size", "max_length", "tokens_per_parameter", "labels")
    for name in (*starts[:5], *sizes):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise UserError(f"--{name} is {value:g}; it must be above 0")
    if args.mfu > 1:
        raise UserError(f"--mfu {args.mfu:g} is more than the device has; give a share, such as 0.4")
    if args.price and not args.usd_per_gpu_hour:
        raise UserError("--price buys hours at --usd_per_gpu_hour; give it too")
    if (args.hours or args.price) and not (args.device or args.measured):
        raise UserError("hours are FLOPs on some device; add --device, or --measured with a run of your own")
    if (args.hours or args.price) and str(args.device).lower() == "cpu":
        raise UserError("the table of peaks has no CPU; give --measured with a run of your own, not --device cpu")
    if args.device and args.measured:
        raise UserError("--measured says which device it was; leave out --device")
    if args.write and (args.config or not (args.data and args.tokenizer)):
        raise UserError("--write needs --data and --tokenizer for the YAML to run as it is, and no --config")


@dataclass
class Run:
    """What is to be planned, from a YAML or recommended.

    Attributes:
        shape: sizes of the model by the names of a Hugging Face config, or the config itself.
        options: what `RunSizes` has beside the tokens, the precision and the device.
        micro_batch: of a YAML; None where it is to be found.
        exact: False where the tokens are the most that there can be, because only the data tell.
    """

    shape: Any
    counts: ParameterCounts
    tokens: float
    batch_tokens: int
    steps: int
    learning_rate: float | None
    options: dict
    recipe: str = "pretrain_clm"
    from_scratch: bool = True
    micro_batch: int | None = None
    exact: bool = True
    schedule: dict = field(default_factory=SCHEDULE.copy)

    @property
    def max_length(self) -> int:
        return self.options["max_length"]

    @property
    def target_length(self) -> int:
        return self.options.get("target_length", 0)

    @property
    def adapted(self) -> bool:
        return self.options.get("adapted", False)


def run_of_config(args: argparse.Namespace) -> Run:
    """A recipe's YAML as it is."""
    recipe, config = read_config(args.config, args.recipe)
    outline = outline_of(recipe, config, args.labels)
    options = sizes_of(recipe, config, outline.shape, args.gpus, args.tokens, args.max_length)
    if args.tokens and RECIPES[recipe].unit == "tokens":
        raise UserError("--config has a budget in tokens; leave out --tokens, or change the YAML")
    tokens, steps, batch_tokens, exact = (
        options.pop(key) for key in ("train_tokens", "steps", "batch_tokens", "exact")
    )
    return Run(
        outline.shape, outline.counts, tokens, batch_tokens, steps, config["learning_rate"],
        options | {"trainable": outline.trainable},
        recipe=recipe, from_scratch=outline.from_scratch, micro_batch=options["per_device_train_batch_size"],
        exact=exact, schedule={key: config[key] for key in SCHEDULE if key in config},
    )  # fmt: skip


def recommend(args: argparse.Namespace, law: ScalingLaw, flops: float | None, text: dict | None) -> Run:
    """The size and the tokens that are asked for, the optimum given what is, and how to train it."""
    n, d, ratio = args.parameters, args.tokens, args.tokens_per_parameter
    max_length, fixed = args.max_length or 2048, bool(d)
    if flops:
        if not n:
            n = flops / 6 / d if d else fixed_ratio(flops, ratio)[0] if ratio else law.optimum(flops)[0]
    elif n:
        d = d or (n * ratio if ratio else law.optimal_tokens(n))
    else:
        d = d or text["tokens"]
        n = d / ratio if ratio else law.optimal_parameters(d)
    shape = recommend_shape(n, args.vocab_size or (text or {}).get("vocab_size") or 32768, max_length)
    counts = count_shape(shape)
    if flops:  # pays for attention as well, for which the tokens give way, or the size where they are fixed
        per_token = training_flops_per_token(shape, counts, max_length)
        if fixed:
            shape = recommend_shape(n * flops / (per_token * d), shape.vocab_size, max_length)
            counts = count_shape(shape)
        else:
            d = flops / per_token
    compute = 6 * counts.total * d
    step = max_length * args.gpus
    batch = max(recommend_batch(compute, max_length, d) // step, 1) * step
    steps = max(round(d / batch), 1)
    options = {
        "max_length": max_length, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
        "world_size": args.gpus, "trainable": counts.total, "head_share": 1.0,
    }  # fmt: skip
    return Run(shape, counts, steps * batch, batch, steps, recommend_learning_rate(compute), options)


def make_plan(args: argparse.Namespace) -> dict:
    """Everything that follows from the options, as numbers."""
    check(args)
    law, law_name, ranges = law_of(args)
    hardware = hardware_of(args)
    text = measure_text(args.data, args.tokenizer) if args.data else None
    gpu_hours = args.hours * args.gpus if args.hours else args.price / args.usd_per_gpu_hour if args.price else None
    flops = args.flops or (gpu_hours * 3600 * hardware["flops_per_second"] if gpu_hours else None)
    run = run_of_config(args) if args.config else recommend(args, law, flops, text)
    counts = run.counts
    on_cpu = bool(hardware) and hardware["device"] == "cpu"
    sizes = RunSizes(
        train_tokens=run.tokens,
        precision=args.precision,
        device="cpu" if on_cpu else "cuda",
        objective=run.recipe.removeprefix("pretrain_"),
        **run.options,
    )
    costs = run_costs(counts, run.shape, sizes)
    attention = training_flops_per_token(
        run.shape, NO_MATRICES, run.max_length, run.target_length, extra_forwards=sizes.extra_forwards
    )
    model = {name: value for name, value in sizes_of_shape(run.shape).items() if value is not None}
    plan = {
        "recipe": run.recipe,
        "flops": costs.flops,
        "law": {"name": law_name, **asdict(law)},
        "intervals": ranges,
        "model": model | vars(counts),
        "trainable": sizes.trainable if run.adapted else None,
        "tokens": run.tokens,
        "exact": run.exact,
        "tokens_per_parameter": run.tokens / counts.total,
        "flops_per_token": costs.flops_per_token,
        "attention_share": None if run.target_length else attention / costs.flops_per_token,
        "max_length": run.max_length,
        "target_length": run.target_length,
        "batch_tokens": run.batch_tokens,
        "steps": run.steps,
        "learning_rate": run.learning_rate,
        "schedule": run.schedule,
        "text": text,
        "gpus": args.gpus,
        "checkpoint_bytes": costs.checkpoint_bytes,
    }
    if run.from_scratch and run.shape.model_type in ("llama", "mistral", "qwen3", "gpt2"):
        plan |= compare(law, counts.total, run.tokens, text and text["tokens"])
    plan["in_memory"] = in_memory(args, hardware, run, costs)
    plan["not_calibrated"] = not_calibrated(sizes)
    timed = hardware is not None and "flops_per_second" in hardware
    plan["time"] = time_and_price(args, hardware, plan, counts) if timed else None
    if run.recipe == "pretrain_clm":
        plan["equivalent_budgets"] = equivalent_budgets(run.shape, counts, plan["flops"], run.max_length)
    return plan


def sizes_of_shape(shape: Any) -> dict:
    """The sizes of a model for the JSON, from a shape or from a config of transformers."""
    if not hasattr(shape, "to_dict"):
        return vars(shape)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    return {"model_type": shape.model_type, **{name: getattr(shape, name, None) for name in names}}


def compare(law: ScalingLaw, n: float, d: float, unique: float | None) -> dict:
    """Where (N, D) lies: its loss, the least loss of the same budget, and what a text that is too small costs."""
    flops = 6 * n * d
    best, loss = law.optimum(flops), law.loss(n, d)
    places = {
        "besiroglu": BESIROGLU.optimum(flops),
        "hoffmann, approach 1": approach_1(flops),
        "hoffmann, approach 3 as printed": HOFFMANN.optimum(flops),
        "20 per parameter": fixed_ratio(flops, 20),
    }
    found = {"loss": loss, "optimum": {"parameters": best[0], "tokens": best[1], "loss": law.loss(*best)},
             "share_of_flops_needed": law.flops_to_reach(loss) / flops, "optima": places}  # fmt: skip
    if unique:
        effective = effective_tokens(d, unique)
        found |= {"epochs": d / unique, "effective_tokens": effective, "loss_with_repetition": law.loss(n, effective)}
    return found


def in_memory(args: argparse.Namespace, hardware: dict | None, run: Run, costs: RunCosts) -> dict | None:
    """How the run fits into the memory of the device, or None where that is not known; of a YAML on a CPU, what it
    takes of it."""
    if not hardware:
        return None
    options = dict(run.options)
    micro = options.pop("per_device_train_batch_size")
    accumulated = options.pop("gradient_accumulation_steps")
    if hardware["device"] == "cpu":
        checkpointing = options.get("activation_checkpointing", False)
        return {
            "launch": None, "per_device_train_batch_size": micro, "activation_checkpointing": checkpointing,
            "memory": costs.memory,
        }  # fmt: skip
    if "gigabytes" not in hardware:
        return None
    pairs, reference = options.pop("pairs", False), options.pop("reference", False)
    adapted, checkpointing = options.pop("adapted", False), options.pop("activation_checkpointing", None)
    options.pop("embeds_twice", None)
    rows = max(run.batch_tokens // run.max_length // args.gpus, 1) // (2 if pairs else 1)
    if run.micro_batch:
        rows = micro * accumulated
    return fit_into_memory(
        run.shape, hardware["gigabytes"], rows, options.pop("world_size"), options.pop("max_length"), args.precision,
        micro=run.micro_batch, checkpointing=checkpointing, counts=run.counts, rows_of_a_unit=2 if pairs else 1,
        reference=reference and not adapted, **options,
    )  # fmt: skip


def time_and_price(args, hardware: dict, plan: dict, counts: ParameterCounts) -> dict:
    """Seconds, price, how often to save, and what a step sends."""
    seconds = plan["flops"] / hardware["flops_per_second"] / args.gpus
    if bandwidth := hardware.get("gigabytes_per_second"):  # tiny batches wait for the optimizer
        seconds = max(seconds, plan["steps"] * update_seconds(plan["trainable"] or counts.total, bandwidth))
    every = checkpoint_seconds(plan["checkpoint_bytes"] / DISK, args.gpus)
    hours = seconds * args.gpus / 3600
    fits = plan["in_memory"] or {"launch": "ddp", "per_device_train_batch_size": 1}
    stage = int(fits["launch"][4]) if (fits["launch"] or "").startswith("zero") else 0
    rows = plan["batch_tokens"] // plan["max_length"] // args.gpus
    accumulated = max(rows // fits["per_device_train_batch_size"], 1)
    return {
        **hardware, "seconds": seconds, "gpu_hours": hours,
        "usd": hours * args.usd_per_gpu_hour if args.usd_per_gpu_hour else None,
        "save_steps": min(max(round(every / (seconds / plan["steps"])), 1), plan["steps"]),
        "communication_bytes_per_step": communication_bytes(
            counts, stage, args.gpus, args.precision, plan["trainable"], accumulated
        ),
    }  # fmt: skip


def main() -> None:
    args = parse()
    plan = make_plan(args)
    if args.figure:
        from unlabeled.reporting.plots import plot_budget

        law = ScalingLaw(**{name: plan["law"][name] for name in ("A", "B", "E", "alpha", "beta")})
        plot_budget(law, plan["model"]["total"], plan["tokens"], args.figure)
    if args.write:
        write_yaml(args, plan)
    print(json.dumps(plan, indent=1) if args.json else show(args, plan))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
