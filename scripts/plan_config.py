"""What a recipe's YAML asks for, in the numbers that its own plan is made of.

A part of `python scripts/plan.py --config`, without a command of its own. A model from scratch is counted in closed
form and without torch; one that is continued is laid out on the meta device of torch, as the recipe builds it.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from unlabeled import UserError
from unlabeled.planning.counts import ParameterCounts, plan_steps
from unlabeled.planning.shapes import DEFAULTS, count_shape, shape_of
from unlabeled.planning.spans import Denoiser, span_lengths
from unlabeled.runtime.files import read_json_object, read_small_file
from unlabeled.runtime.secrets import yaml_problem


@dataclass(frozen=True)
class Recipe:
    """What of a recipe decides what it costs.

    Attributes:
        unit: of its budget.
        auto_class: of transformers, that builds its model.
        fused_head: the head is computed at the positions of targets only (`losses.ChunkedLinearCrossEntropy`).
        rows: of the model for a unit of the batch.
        defaults: of the keys that a plan reads, as the recipe's dataclasses have them.
    """

    unit: str
    auto_class: str
    fused_head: bool = False
    rows: int = 1
    defaults: tuple[tuple[str, Any], ...] = ()


_ADAPTER = (("adapter", "none"), ("lora_r", 16), ("lora_target_modules", "all-linear"))
RECIPES = {
    "pretrain_clm": Recipe("tokens", "AutoModelForCausalLM", fused_head=True, defaults=(("fim_rate", 0.0),)),
    "pretrain_mlm": Recipe("tokens", "AutoModelForMaskedLM", fused_head=True, defaults=(("mlm_probability", 0.3),)),
    "pretrain_span": Recipe(
        "tokens", "AutoModelForSeq2SeqLM", fused_head=True,
        defaults=(("noise_density", 0.15), ("mean_noise_span_length", 3.0), ("denoisers", None)),
    ),
    "sft": Recipe("tokens", "AutoModelForCausalLM", defaults=(*_ADAPTER, ("chat_template", None))),
    "dpo": Recipe(
        "pairs", "AutoModelForCausalLM", rows=2,
        defaults=(*_ADAPTER, ("chat_template", None), ("precompute_ref_log_probs", False)),
    ),
    "classify": Recipe("examples", "AutoModelForSequenceClassification", defaults=_ADAPTER),
    "tag": Recipe("examples", "AutoModelForTokenClassification", defaults=_ADAPTER),
    "embed": Recipe("pairs", "AutoModel", rows=2, defaults=_ADAPTER),
}  # fmt: skip
MASKED = ("bert", "modernbert", "eurobert")  # what pretrain_mlm trains from scratch, by closed form
DEFAULT_KEYS = {
    "max_length": 512, "per_device_train_batch_size": 8, "config_overrides": None, "optimizer": "adamw",
    "attn_implementation": "sdpa", "activation_checkpointing": False, "model_name_or_path": None, "model_type": None,
    "tokenizer_name_or_path": None, "learning_rate": None,
}  # fmt: skip


def read_config(path: str, recipe: str | None = None) -> tuple[str, dict]:
    """The recipe of a YAML, by its name or what it holds, and its keys with the defaults of the recipe.

    Raises:
        UserError: the file cannot be read, lacks its budget, or does not say which recipe it is for.
    """
    try:
        config = yaml.safe_load(read_small_file(path))
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} cannot be read: {yaml_problem(error)}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UserError(f"--config {path} holds no keys; recipes/configs/ has examples")
    recipe = recipe or _recipe_of(path, config)
    if recipe not in RECIPES:
        raise UserError(f"--config {path}: name its recipe with --recipe, one of {', '.join(RECIPES)}")
    unit = RECIPES[recipe].unit
    if not {f"train_{unit}", f"batch_{unit}"} <= config.keys():
        raise UserError(f"--config {path} has no train_{unit} and batch_{unit}, which {recipe} needs; set them")
    defaults = DEFAULT_KEYS | dict(RECIPES[recipe].defaults)
    needed = {f"train_{unit}": 1, f"batch_{unit}": 1}
    config |= {key: _checked(path, key, config[key], default) for key, default in (defaults | needed).items()
               if key in config}  # fmt: skip
    return recipe, defaults | config


def _checked(path: str, key: str, value: Any, default: Any) -> Any:
    """A value of a YAML of the type that its key takes; YAML takes 1e9, without a dot, for a text.

    Raises:
        UserError: it is of another type.
    """
    if value is None and default is None:
        return None
    if key == "config_overrides":
        kind, takes = dict, "a mapping"
    elif key == "denoisers":
        kind, takes = list, "a list"
    elif key == "learning_rate" or (isinstance(default, int | float) and not isinstance(default, bool)):
        kind, takes = int | float, "a number"
        with suppress(TypeError, ValueError, OverflowError):
            value = float(value) if isinstance(value, str) else value
            value = int(value) if value == int(value) else value
    elif isinstance(default, bool):
        kind, takes = bool, "true or false"
    else:
        kind, takes = str, "a text"
    if not isinstance(value, kind) or (kind == int | float and isinstance(value, bool)):
        raise UserError(f"--config {path}: {key} takes {takes}, not {value!r}; correct it")
    return value


def _recipe_of(path: str, config: dict) -> str | None:
    named = [name for name in RECIPES if Path(path).stem.startswith(name)]
    if named or not config.get("model_type"):
        return named[0] if named else None
    masked = {"mlm_probability", "whole_word_mask"} & config.keys() or config["model_type"] in MASKED
    if config["model_type"] == "t5":
        return "pretrain_span"
    return "pretrain_mlm" if masked else "pretrain_clm"


@dataclass(frozen=True)
class Outline:
    """A model without its weights: its parameters, those that are trained, and its config or the sizes of it."""

    counts: ParameterCounts
    trainable: int
    shape: Any
    from_scratch: bool


def outline_of(recipe: str, config: dict, labels: int) -> Outline:
    """The model that a recipe would train.

    Args:
        labels: classes of `classify` and `tag`, which only their data tell.

    Raises:
        UserError: the model is not on this machine, or is an adapter.
    """
    if config["model_name_or_path"]:
        return _outline_continued(recipe, config, labels)
    if not config["model_type"]:
        raise UserError("the YAML has neither model_type nor model_name_or_path; set one of them")
    sizes = dict(config["config_overrides"] or {})
    if vocabulary := _vocabulary(recipe, config):
        sizes.setdefault("vocab_size", vocabulary)
    try:
        shape = shape_of(config["model_type"], sizes)
    except KeyError as error:
        known = ", ".join(sorted(DEFAULTS))
        raise UserError(f"model_type {error.args[0]} is not among {known}; its recipe prints a plan as well") from error
    counts = count_shape(shape)
    return Outline(counts, counts.total, shape, from_scratch=True)


def _vocabulary(recipe: str, config: dict) -> int | None:
    """The largest id and one of a tokenizer on this machine, with the tokens that the recipe adds; or None."""
    folder = Path(str(config["tokenizer_name_or_path"]))
    if not (folder / "tokenizer.json").exists():
        return None
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
    settings = {}
    if (folder / "tokenizer_config.json").exists():
        settings = read_json_object(folder / "tokenizer_config.json", "restore it, or set another tokenizer")

    def special(name: str) -> str | None:
        token = settings.get(f"{name}_token")
        return token.get("content") if isinstance(token, dict) else token

    new = []
    if special("pad") in (None, special("eos")) and special("unk") in (None, special("eos")):
        new.append("<|pad|>")  # as tokenization.ensure_pad_token
    if config.get("fim_rate"):
        new += ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    new += [denoiser.mode for denoiser in denoisers_of(config) if denoiser.mode] if recipe == "pretrain_span" else []
    return max(vocabulary.values()) + 1 + len({*new} - vocabulary.keys())


def _outline_continued(recipe: str, config: dict, labels: int) -> Outline:
    import torch
    import transformers
    from peft import LoraConfig

    from unlabeled.data.tokenization import ensure_pad_token, load_tokenizer
    from unlabeled.models.adapter_files import adapter_base
    from unlabeled.models.adapters import apply_lora_config, new_token_rows
    from unlabeled.models.configs import load_config
    from unlabeled.models.vocabulary import fit_to_tokenizer
    from unlabeled.planning import count_parameters

    name = config["model_name_or_path"]
    if not Path(name).is_dir():
        raise UserError(f"model_name_or_path: there is no folder {name} on this machine; download or train it first")
    if adapter_base(name):
        raise UserError(f"model_name_or_path {name} is an adapter; its recipe prints a plan as well")
    tokenizer = load_tokenizer(config["tokenizer_name_or_path"] or name, "tokenizer_name_or_path")
    ensure_pad_token(tokenizer)
    new_tokens = []
    if recipe in ("sft", "dpo"):
        from unlabeled.data.chat_templates import set_chat_template

        new_tokens = set_chat_template(tokenizer, config["chat_template"])
    if recipe == "pretrain_clm":
        from unlabeled.data.fim import add_fim_tokens

        add_fim_tokens(tokenizer, config["fim_rate"])
    if recipe == "pretrain_span":
        from unlabeled.data.collators import prepare_tokenizer

        prepare_tokenizer(tokenizer, denoisers_of(config), config["max_length"])
    pretrained = load_config(name)
    if recipe in ("classify", "tag"):
        pretrained.num_labels = labels
    auto_class = getattr(transformers, RECIPES[recipe].auto_class)
    if recipe == "embed" and pretrained.is_encoder_decoder:
        auto_class = transformers.AutoModelForTextEncoding
    with torch.device("meta"):
        options = {"attn_implementation": config["attn_implementation"]}
        model = auto_class.from_config(pretrained, trust_remote_code=False, **options)
        fit_to_tokenizer(model, tokenizer, config["max_length"])
        inside = {"embed": "FEATURE_EXTRACTION", "classify": "SEQ_CLS", "tag": "TOKEN_CLS"}
        if config.get("adapter", "none") != "none":
            kinds = {"use_rslora": config["adapter"] == "rslora", "use_dora": config["adapter"] == "dora"}
            if recipe in ("classify", "tag"):
                kinds["modules_to_save"] = [
                    child for child, module in model.named_children()
                    if child != model.base_model_prefix and any(True for _ in module.parameters())
                ]  # fmt: skip
            elif recipe in ("sft", "dpo"):
                kinds["trainable_token_indices"] = new_token_rows(model, tokenizer.convert_tokens_to_ids(new_tokens))
            adapter = LoraConfig(
                task_type=inside.get(recipe, "CAUSAL_LM"), r=config["lora_r"],
                target_modules=config["lora_target_modules"], **kinds,
            )  # fmt: skip
            model = apply_lora_config(model, adapter)
        if recipe == "embed":
            _freeze_unused(model)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Outline(count_parameters(model), trainable, model.config, from_scratch=False)


def _freeze_unused(model) -> None:
    """As `embedding.freeze_unused`: what the states of the last layer do not depend on, such as BERT's pooler."""
    import torch

    ids = torch.ones(1, 8, dtype=torch.long)
    model(input_ids=ids)[0].sum().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)


def denoisers_of(config: dict) -> tuple[Denoiser, ...]:
    """The denoisers of a YAML for `pretrain_span`."""
    single = {name: config[name] for name in ("noise_density", "mean_noise_span_length")}
    return tuple(Denoiser(**entry) for entry in config["denoisers"] or [single])


def sizes_of(recipe: str, config: dict, shape: Any, gpus: int, tokens: float | None, max_length: int | None) -> dict:
    """The options of `RunSizes` that a YAML decides, and `steps`, `batch_tokens` and `exact`.

    `exact` is False where the tokens of the budget are those of examples or pairs of full length, which the data may
    not have; `tokens` are then those that are really read, where they are known.

    Raises:
        UserError: a budget that does not divide.
    """
    about, max_length = RECIPES[recipe], max_length or config["max_length"]
    train, batch = config[f"train_{about.unit}"], config[f"batch_{about.unit}"]
    micro, packed = config["per_device_train_batch_size"], about.unit == "tokens"
    budget = plan_steps(train, batch, max_length if packed else 1, micro, gpus, about.unit)
    row_tokens = 1 if packed else about.rows * max_length
    head_share = None
    if about.fused_head:
        head_share = config["mlm_probability"] if recipe == "pretrain_mlm" else 1.0
    target_length = 0
    if recipe == "pretrain_span":
        target_length = span_lengths(denoisers_of(config), max_length)[1]
    elif recipe == "classify" and getattr(shape, "is_encoder_decoder", False):
        target_length = max_length  # the decoder reads the text as well
    return {
        "train_tokens": tokens or train * row_tokens,
        "max_length": max_length,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": 1 if recipe == "embed" else budget.gradient_accumulation_steps,
        "optimizer": config["optimizer"],
        "world_size": gpus,
        "attn_implementation": config["attn_implementation"],
        "activation_checkpointing": bool(config["activation_checkpointing"]),
        "target_length": target_length,
        "pairs": about.rows == 2,
        "reference": recipe == "dpo" and not config["precompute_ref_log_probs"],
        "embeds_twice": recipe == "embed",
        "adapted": config.get("adapter", "none") != "none",
        "head_share": head_share,
    } | {"steps": budget.steps, "batch_tokens": batch * row_tokens, "exact": packed or bool(tokens)}
