"""The keys of a recipe's YAML file from which the cost of the run follows."""

from contextlib import suppress
from dataclasses import MISSING, Field, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import yaml

from unlabeled.config.stages import ARGUMENT_CLASSES, argument_classes, argument_fields, argument_types
from unlabeled.errors import UserError
from unlabeled.planner.options import PlanOptions
from unlabeled.planning.counts import plan_steps
from unlabeled.planning.runs import RunSizes
from unlabeled.planning.spans import Denoiser, span_lengths
from unlabeled.runtime.files import read_small_file
from unlabeled.runtime.secrets import yaml_problem


@dataclass(frozen=True)
class RecipeModel:
    """How a recipe uses its model.

    Attributes:
        auto_class: The class of transformers that builds the model.
        has_fused_head: Whether the output head is computed at the target positions alone
            (`losses.ChunkedLinearCrossEntropy`).
        rows_per_example: Rows of the model for each unit of the batch: 2 for pairs.
    """

    auto_class: str
    has_fused_head: bool = False
    rows_per_example: int = 1


RECIPE_MODELS = {
    "pretrain_clm": RecipeModel("AutoModelForCausalLM", has_fused_head=True),
    "pretrain_mlm": RecipeModel("AutoModelForMaskedLM", has_fused_head=True),
    "pretrain_span": RecipeModel("AutoModelForSeq2SeqLM", has_fused_head=True),
    "sft": RecipeModel("AutoModelForCausalLM"),
    "dpo": RecipeModel("AutoModelForCausalLM", rows_per_example=2),
    "classify": RecipeModel("AutoModelForSequenceClassification"),
    "tag": RecipeModel("AutoModelForTokenClassification"),
    "embed": RecipeModel("AutoModel", rows_per_example=2),
}
ENCODERS = ("bert", "modernbert", "eurobert")  # model types that pretrain_mlm trains from scratch
# The keys of a YAML file that a plan reads, in addition to the budget. The plan ignores all others.
COST_KEYS = (
    "activation_checkpointing",
    "adapter",
    "attn_implementation",
    "chat_template",
    "config_overrides",
    "denoisers",
    "fim_rate",
    "learning_rate",
    "lora_r",
    "lora_target_modules",
    "max_length",
    "mean_noise_span_length",
    "mlm_probability",
    "model_name_or_path",
    "model_type",
    "noise_density",
    "optimizer",
    "per_device_train_batch_size",
    "precompute_ref_log_probs",
    "tokenizer_name_or_path",
)


def read_recipe_config(path: str, recipe: str | None = None) -> tuple[str, dict[str, Any]]:
    """Read the YAML file of a recipe.

    Args:
        path: The YAML file.
        recipe: The name of the recipe. By default it follows from the name of the file, or from its keys.

    Returns:
        The name of the recipe, and the keys of the file with the defaults of `COST_KEYS`. The learning rate has no
        default.

    Raises:
        UserError: The file cannot be read, a value has the wrong type, the budget is missing, or it is not clear which
            recipe the file is for.
    """
    config = _read_yaml(path)
    recipe = recipe or guess_recipe(path, config)
    if recipe not in ARGUMENT_CLASSES:
        raise UserError(f"--config {path}: name its recipe with --recipe, one of {', '.join(ARGUMENT_CLASSES)}")
    unit = budget_unit(recipe)
    budget_keys = (f"train_{unit}", f"batch_{unit}")
    if not set(budget_keys) <= config.keys():
        raise UserError(f"--config {path} has no {' and '.join(budget_keys)}, which {recipe} needs; set them")
    members = argument_fields(recipe)
    annotations = argument_types(recipe)
    values = dict(config)
    for key in COST_KEYS + budget_keys:
        if key not in members:
            continue
        default = _default(members[key])
        if key in config:
            is_optional = default is None and key not in budget_keys
            values[key] = _check_value(path, key, config[key], annotations[key], is_optional)
        else:
            values[key] = None if key == "learning_rate" else default
    return recipe, values


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(read_small_file(path))
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} cannot be read: {yaml_problem(error)}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UserError(f"--config {path} holds no keys; recipes/configs/ has examples")
    return config


def guess_recipe(path: str, config: dict[str, Any]) -> str | None:
    """Guess the recipe of a YAML file from its name, or from its model type if the model is trained from scratch."""
    for name in ARGUMENT_CLASSES:
        if Path(path).stem.startswith(name):
            return name
    model_type = config.get("model_type")
    if not model_type:
        return None
    if model_type == "t5":
        return "pretrain_span"
    if model_type in ENCODERS or {"mlm_probability", "whole_word_mask"} & config.keys():
        return "pretrain_mlm"
    return "pretrain_clm"


def budget_unit(recipe: str) -> str:
    """The unit of a recipe's budget: tokens, pairs or examples."""
    training_arguments: Any = argument_classes(recipe)[-1]
    return training_arguments.unit


def _default(member: Field) -> Any:
    return member.default if member.default_factory is MISSING else member.default_factory()


def _check_value(path: str, key: str, value: Any, annotation: Any, is_optional: bool) -> Any:
    """Return a value of a YAML file as the type of its key. YAML reads 1e9, without a dot, as a string.

    Raises:
        UserError: The value has another type.
    """
    if value is None and is_optional:
        return None
    expected, description = _expected_type(annotation)
    if expected == (int, float):
        with suppress(TypeError, ValueError, OverflowError):
            value = float(value) if isinstance(value, str) else value
            value = int(value) if value == int(value) else value
    is_bool = isinstance(value, bool)
    if not isinstance(value, expected) or (is_bool and expected != (bool,)):
        raise UserError(f"--config {path}: {key} takes {description}, not {value!r}; correct it")
    return value


def _expected_type(annotation: Any) -> tuple[tuple[type, ...], str]:
    """The types that YAML has for a key, and their description in a message."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    if not kinds or get_origin(annotation) is list:
        kinds = [annotation]
    kinds = [get_origin(kind) or kind for kind in kinds]
    if bool in kinds:
        return (bool,), "true or false"
    if int in kinds or float in kinds:
        return (int, float), "a number"
    if dict in kinds:
        return (dict,), "a mapping"
    if list in kinds:
        return (list,), "a list"
    return (str,), "a text"


def read_denoisers(values: dict[str, Any]) -> tuple[Denoiser, ...]:
    """The denoisers of a YAML file for `pretrain_span`."""
    if values["denoisers"]:
        return tuple(Denoiser(**entry) for entry in values["denoisers"])
    return (Denoiser(values["noise_density"], values["mean_noise_span_length"]),)


@dataclass(frozen=True)
class RecipeBudget:
    """The budget of a YAML file.

    Attributes:
        sizes: What the cost of the run follows from.
        steps: Optimizer steps.
        batch_tokens: Tokens in a step. Pairs and examples count as rows of full length.
        is_exact: False if the tokens are an upper bound, because only the data tell how long pairs and examples are.
    """

    sizes: RunSizes
    steps: int
    batch_tokens: int
    is_exact: bool


def plan_recipe_budget(
    recipe: str,
    values: dict[str, Any],
    options: PlanOptions,
    *,
    trainable: int,
    is_encoder_decoder: bool,
    precision: str,
    device: str,
) -> RecipeBudget:
    """Work out the sizes of a run from the keys of its YAML file, as the recipe does.

    Args:
        recipe: The name of the recipe.
        values: Its keys, from `read_recipe_config`.
        options: The number of devices; `tokens`, which a recipe in pairs or examples has counted; and `max_length`,
            which replaces that of the file.
        trainable: Parameters that are trained.
        is_encoder_decoder: Whether the model is one.
        precision: bf16 or fp32.
        device: cpu or cuda.

    Raises:
        UserError: The budget does not divide into steps.
    """
    about = RECIPE_MODELS[recipe]
    unit = budget_unit(recipe)
    is_packed = unit == "tokens"
    if options.tokens and is_packed:
        raise UserError("--config has a budget in tokens; leave out --tokens, or change the YAML")
    max_length = options.max_length or values["max_length"]
    train = values[f"train_{unit}"]
    batch = values[f"batch_{unit}"]
    micro_batch = values["per_device_train_batch_size"]
    budget = plan_steps(train, batch, max_length if is_packed else 1, micro_batch, options.gpus, unit)
    tokens_per_unit = 1 if is_packed else about.rows_per_example * max_length
    sizes = RunSizes(
        train_tokens=options.tokens or train * tokens_per_unit,
        max_length=max_length,
        per_device_train_batch_size=micro_batch,
        # The loss of embeddings cuts a batch into pieces by itself.
        gradient_accumulation_steps=1 if recipe == "embed" else budget.gradient_accumulation_steps,
        trainable=trainable,
        optimizer=values["optimizer"],
        precision=precision,
        world_size=options.gpus,
        attn_implementation=values["attn_implementation"],
        activation_checkpointing=bool(values["activation_checkpointing"]),
        target_length=_target_length(recipe, values, max_length, is_encoder_decoder),
        pairs=about.rows_per_example == 2,
        reference=recipe == "dpo" and not values["precompute_ref_log_probs"],
        embeds_twice=recipe == "embed",
        adapted=values.get("adapter", "none") != "none",
        head_share=_head_share(recipe, values),
        device=device,
        objective=recipe.removeprefix("pretrain_"),
    )
    return RecipeBudget(sizes, budget.steps, batch * tokens_per_unit, is_packed or bool(options.tokens))


def _target_length(recipe: str, values: dict[str, Any], max_length: int, is_encoder_decoder: bool) -> int:
    """Tokens of a row that the decoder of an encoder-decoder reads, else 0."""
    if recipe == "pretrain_span":
        return span_lengths(read_denoisers(values), max_length)[1]
    if recipe == "classify" and is_encoder_decoder:
        return max_length  # the decoder reads the text as well
    return 0


def _head_share(recipe: str, values: dict[str, Any]) -> float | None:
    """Share of the positions at which the output head is computed; None if all logits are kept."""
    if not RECIPE_MODELS[recipe].has_fused_head:
        return None
    return values["mlm_probability"] if recipe == "pretrain_mlm" else 1.0
