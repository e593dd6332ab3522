"""The plan of a run: everything that follows from a starting point, as numbers."""

from dataclasses import asdict, dataclass
from typing import Any

from unlabeled.planner.hardware import Hardware, find_hardware
from unlabeled.planner.law import choose_law, compare_with_optimum
from unlabeled.planner.options import PlanOptions
from unlabeled.planner.text import TextSize, measure_text
from unlabeled.planning.counts import ParameterCounts, training_flops_per_token
from unlabeled.planning.devices import update_seconds
from unlabeled.planning.memory import communication_bytes
from unlabeled.planning.recommendations import (
    SCHEDULE,
    MemoryFit,
    equivalent_budgets,
    fit_into_memory,
    recommend_batch,
    recommend_checkpoint_interval,
    recommend_learning_rate,
    recommend_shape,
)
from unlabeled.planning.runs import RunCosts, RunSizes, not_calibrated, run_costs
from unlabeled.planning.scaling_laws import ScalingLaw, fixed_ratio
from unlabeled.planning.shapes import count_shape

DISK_BYTES_PER_SECOND = 1e9  # with which a checkpoint is written; an assumption
DEFAULT_VOCAB_SIZE = 32_768
DEFAULT_MAX_LENGTH = 2048
CAUSAL_MODEL_TYPES = ("llama", "mistral", "qwen3", "gpt2")  # the scaling laws hold for these
NO_PARAMETERS = ParameterCounts(total=0, embedding=0, matmul=0, head=0)  # leaves the FLOPs of attention
REPORTED_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class PlannedRun:
    """A run to be planned, from a YAML file or recommended.

    Attributes:
        recipe: The name of the recipe.
        config: Sizes of the model by the names of a Hugging Face config.
        counts: The parameters of the model.
        sizes: What else the costs follow from.
        steps: Optimizer steps.
        batch_tokens: Tokens in a step.
        learning_rate: The peak learning rate; None if the YAML file does not set one.
        schedule: The keys of the schedule.
        from_scratch: Whether the model starts from random weights.
        is_recommended: Whether the micro-batch, the ZeRO stage and activation checkpointing are still to be chosen.
        is_exact: False if the tokens are an upper bound.
    """

    recipe: str
    config: Any
    counts: ParameterCounts
    sizes: RunSizes
    steps: int
    batch_tokens: int
    learning_rate: float | None
    schedule: dict[str, Any]
    from_scratch: bool
    is_recommended: bool
    is_exact: bool

    @property
    def adapter_parameters(self) -> int | None:
        """The parameters of the adapter that is trained, or None without one."""
        return self.sizes.trainable if self.sizes.adapted else None


def make_plan(options: PlanOptions) -> dict[str, Any]:
    """Plan a run.

    Returns:
        The plan, as `scripts/plan.py --json` prints it.

    Raises:
        UserError: An option names nothing that can be used, or nothing fits into the memory of the device.
    """
    named_law = choose_law(options)
    hardware = find_hardware(options)
    text = measure_text(options.data, options.tokenizer) if options.data else None
    run = plan_recipe(options, hardware) if options.config else recommend_run(options, named_law.law, hardware, text)
    costs = run_costs(run.counts, run.config, run.sizes)
    fit = fit_run_into_memory(run, costs, hardware)
    plan = {
        "recipe": run.recipe,
        "flops": costs.flops,
        "law": {"name": named_law.name, **asdict(named_law.law)},
        "intervals": named_law.intervals,
        "model": describe_sizes(run.config) | asdict(run.counts),
        "trainable": run.adapter_parameters,
        "tokens": run.sizes.train_tokens,
        "exact": run.is_exact,
        "tokens_per_parameter": run.sizes.train_tokens / run.counts.total,
        "flops_per_token": costs.flops_per_token,
        "attention_share": attention_share(run, costs),
        "max_length": run.sizes.max_length,
        "target_length": run.sizes.target_length,
        "batch_tokens": run.batch_tokens,
        "steps": run.steps,
        "learning_rate": run.learning_rate,
        "schedule": run.schedule,
        "text": without_none(asdict(text)) if text else None,
        "gpus": options.gpus,
        "checkpoint_bytes": costs.checkpoint_bytes,
        "in_memory": asdict(fit) if fit else None,
        "not_calibrated": not_calibrated(run.sizes),
        "time": None,
    }
    if hardware and hardware.flops_per_second:
        plan["time"] = plan_time(run, costs, hardware, fit, options.usd_per_gpu_hour)
    if run.from_scratch and run.config.model_type in CAUSAL_MODEL_TYPES:
        unique_tokens = text.tokens if text else None
        plan |= compare_with_optimum(named_law.law, run.counts.total, run.sizes.train_tokens, unique_tokens)
    if run.recipe == "pretrain_clm":
        plan["equivalent_budgets"] = equivalent_budgets(run.config, run.counts, costs.flops, run.sizes.max_length)
    return plan


def without_none(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out the entries that are None."""
    return {name: value for name, value in values.items() if value is not None}


# --- The run ----------------------------------------------------------------------------------------------------------


def plan_recipe(options: PlanOptions, hardware: Hardware | None) -> PlannedRun:
    """Plan the run of a recipe's YAML file as it is."""
    # Imports torch and transformers, which takes seconds that the other starting points do not need.
    from unlabeled.planner.outline import outline_model
    from unlabeled.planner.recipe_config import plan_recipe_budget, read_recipe_config

    recipe, values = read_recipe_config(options.config, options.recipe)
    outline = outline_model(recipe, values, options.labels)
    budget = plan_recipe_budget(
        recipe,
        values,
        options,
        trainable=outline.trainable,
        is_encoder_decoder=getattr(outline.config, "is_encoder_decoder", False),
        precision=_precision(options, hardware),
        device="cpu" if hardware and hardware.is_cpu else "cuda",
    )
    return PlannedRun(
        recipe=recipe,
        config=outline.config,
        counts=outline.counts,
        sizes=budget.sizes,
        steps=budget.steps,
        batch_tokens=budget.batch_tokens,
        learning_rate=values["learning_rate"],
        schedule={key: values[key] for key in SCHEDULE if key in values},
        from_scratch=outline.from_scratch,
        is_recommended=False,
        is_exact=budget.is_exact,
    )


def recommend_run(
    options: PlanOptions, law: ScalingLaw, hardware: Hardware | None, text: TextSize | None
) -> PlannedRun:
    """Recommend a pretraining run: what the options leave open is set to its optimum.

    Attention costs FLOPs that a law does not count. Of a compute budget it leaves less for tokens, or for parameters
    where the tokens are given.
    """
    max_length = options.max_length or DEFAULT_MAX_LENGTH
    vocab_size = options.vocab_size or (text.vocab_size if text else None) or DEFAULT_VOCAB_SIZE
    flops = compute_budget(options, hardware)
    if flops is None:
        parameters, tokens = choose_size_and_tokens(options, law, text)
        shape = recommend_shape(parameters, vocab_size, max_length)
        counts = count_shape(shape)
    else:
        parameters = options.parameters or choose_parameters(options, law, flops)
        shape = recommend_shape(parameters, vocab_size, max_length)
        counts = count_shape(shape)
        flops_per_token = training_flops_per_token(shape, counts, max_length)
        if options.tokens:
            tokens = options.tokens
            shape = recommend_shape(parameters * flops / (flops_per_token * tokens), vocab_size, max_length)
            counts = count_shape(shape)
        else:
            tokens = flops / flops_per_token
    law_flops = 6 * counts.total * tokens
    tokens_per_row_on_each_device = max_length * options.gpus
    batch_rows = recommend_batch(law_flops, max_length, tokens) // tokens_per_row_on_each_device
    batch_tokens = max(batch_rows, 1) * tokens_per_row_on_each_device
    steps = max(round(tokens / batch_tokens), 1)
    sizes = RunSizes(
        train_tokens=steps * batch_tokens,
        max_length=max_length,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        trainable=counts.total,
        precision=_precision(options, hardware),
        world_size=options.gpus,
        head_share=1.0,
        device="cpu" if hardware and hardware.is_cpu else "cuda",
    )
    return PlannedRun(
        recipe="pretrain_clm",
        config=shape,
        counts=counts,
        sizes=sizes,
        steps=steps,
        batch_tokens=batch_tokens,
        learning_rate=recommend_learning_rate(law_flops),
        schedule=dict(SCHEDULE),
        from_scratch=True,
        is_recommended=True,
        is_exact=True,
    )


def compute_budget(options: PlanOptions, hardware: Hardware | None) -> float | None:
    """Return the FLOPs of a budget in FLOPs, hours or money, or None if there is no budget."""
    if options.flops:
        return options.flops
    if options.hours:
        gpu_hours = options.hours * options.gpus
    elif options.price and options.usd_per_gpu_hour:
        gpu_hours = options.price / options.usd_per_gpu_hour
    else:
        return None
    return gpu_hours * 3600 * hardware.flops_per_second


def choose_parameters(options: PlanOptions, law: ScalingLaw, flops: float) -> float:
    """Choose the size of a model for a compute budget."""
    if options.tokens:
        return flops / 6 / options.tokens
    if options.tokens_per_parameter:
        return fixed_ratio(flops, options.tokens_per_parameter)[0]
    return law.optimum(flops)[0]


def choose_size_and_tokens(options: PlanOptions, law: ScalingLaw, text: TextSize | None) -> tuple[float, float]:
    """Choose parameters and tokens without a compute budget: one follows from the other."""
    ratio = options.tokens_per_parameter
    if options.parameters:
        optimal_tokens = options.parameters * ratio if ratio else law.optimal_tokens(options.parameters)
        return options.parameters, options.tokens or optimal_tokens
    tokens = options.tokens or text.tokens
    return tokens / ratio if ratio else law.optimal_parameters(tokens), tokens


def _precision(options: PlanOptions, hardware: Hardware | None) -> str:
    """The precision of the run whose speed was measured, or that of the options."""
    return hardware.precision if hardware else options.precision


# --- What follows from it ---------------------------------------------------------------------------------------------


def describe_sizes(config: Any) -> dict[str, Any]:
    """The sizes of a model, from a shape or from a config of transformers."""
    if not hasattr(config, "to_dict"):
        return without_none(vars(config))
    return {"model_type": config.model_type} | without_none(
        {name: getattr(config, name, None) for name in REPORTED_SIZES}
    )


def attention_share(run: PlannedRun, costs: RunCosts) -> float | None:
    """The share of attention in the FLOPs; None for an encoder-decoder, of which it is not defined by these counts."""
    sizes = run.sizes
    if sizes.target_length:
        return None
    attention = training_flops_per_token(
        run.config, NO_PARAMETERS, sizes.max_length, extra_forwards=sizes.extra_forwards
    )
    return attention / costs.flops_per_token


def fit_run_into_memory(run: PlannedRun, costs: RunCosts, hardware: Hardware | None) -> MemoryFit | None:
    """Fit a run into the memory of the device; of a CPU, return the memory that the run takes.

    Returns:
        The configuration, or None if the memory of the device is not known.
    """
    sizes = run.sizes
    if hardware is None:
        return None
    if hardware.is_cpu:
        return MemoryFit(None, sizes.per_device_train_batch_size, sizes.activation_checkpointing, costs.memory)
    if hardware.gigabytes is None:
        return None
    if run.is_recommended:
        rows = max(run.batch_tokens // sizes.max_length // sizes.world_size, 1)
        return fit_into_memory(run.counts, run.config, sizes, hardware.gigabytes, rows)
    return fit_into_memory(
        run.counts,
        run.config,
        sizes,
        hardware.gigabytes,
        rows=sizes.per_device_train_batch_size * sizes.gradient_accumulation_steps,
        micro_batch=sizes.per_device_train_batch_size,
        activation_checkpointing=sizes.activation_checkpointing,
    )


def plan_time(
    run: PlannedRun, costs: RunCosts, hardware: Hardware, fit: MemoryFit | None, usd_per_gpu_hour: float | None
) -> dict[str, Any]:
    """The duration and price of a run, how often to save, and what each process sends in a step."""
    gpus = run.sizes.world_size
    seconds = costs.flops / hardware.flops_per_second / gpus
    if hardware.gigabytes_per_second:  # with tiny batches, the update of the weights takes longer than the gradients
        trained = run.adapter_parameters or run.counts.total
        seconds = max(seconds, run.steps * update_seconds(trained, hardware.gigabytes_per_second))
    gpu_hours = seconds * gpus / 3600
    checkpoint_interval = recommend_checkpoint_interval(costs.checkpoint_bytes / DISK_BYTES_PER_SECOND, gpus)
    save_steps = round(checkpoint_interval / (seconds / run.steps))
    hardware_entries = without_none(asdict(hardware))
    del hardware_entries["precision"]
    return {
        **hardware_entries,
        "seconds": seconds,
        "gpu_hours": gpu_hours,
        "usd": gpu_hours * usd_per_gpu_hour if usd_per_gpu_hour else None,
        "save_steps": min(max(save_steps, 1), run.steps),
        "communication_bytes_per_step": _communication_bytes(run, fit),
    }


def _communication_bytes(run: PlannedRun, fit: MemoryFit | None) -> int:
    """Bytes that each process sends in an optimizer step."""
    gpus = run.sizes.world_size
    micro_batch = fit.per_device_train_batch_size if fit else 1
    rows = run.batch_tokens // run.sizes.max_length // gpus
    return communication_bytes(
        run.counts,
        _zero_stage(fit),
        gpus,
        run.sizes.precision,
        run.adapter_parameters,
        gradient_accumulation_steps=max(rows // micro_batch, 1),
    )


def _zero_stage(fit: MemoryFit | None) -> int:
    """The ZeRO stage of a file of ds_configs/, 0 for plain data parallelism."""
    if fit is None or fit.launch is None or not fit.launch.startswith("zero"):
        return 0
    return int(fit.launch[len("zero")])
