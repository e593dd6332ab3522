"""A model without its weights, laid out as a recipe would build it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlabeled.errors import UserError
from unlabeled.planner.recipe_config import RECIPE_MODELS, read_denoisers
from unlabeled.planning.counts import ParameterCounts, count_parameters
from unlabeled.planning.shapes import DEFAULTS, count_shape, shape_of
from unlabeled.runtime.files import read_json_object

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PEFT_TASK_TYPES = {"embed": "FEATURE_EXTRACTION", "classify": "SEQ_CLS", "tag": "TOKEN_CLS"}  # of others CAUSAL_LM


@dataclass(frozen=True)
class ModelOutline:
    """A model without its weights.

    Attributes:
        counts: Its parameters.
        trainable: Parameters that are trained.
        config: Its config, or any object with its sizes by the names of a Hugging Face config.
        from_scratch: Whether the model starts from random weights.
    """

    counts: ParameterCounts
    trainable: int
    config: Any
    from_scratch: bool


def outline_model(recipe: str, values: dict[str, Any], labels: int) -> ModelOutline:
    """Lay out the model that a recipe would train.

    A model from scratch is counted in closed form. A model that is continued is built on the meta device.

    Args:
        recipe: The name of the recipe.
        values: The keys of its YAML file, from `read_recipe_config`.
        labels: The number of classes of `classify` and `tag`, which only their data tell.

    Raises:
        UserError: The model is not on this machine, or is an adapter.
    """
    if values["model_name_or_path"]:
        return _outline_pretrained(recipe, values, labels)
    return _outline_from_scratch(recipe, values)


# --- From scratch -----------------------------------------------------------------------------------------------------


def _outline_from_scratch(recipe: str, values: dict[str, Any]) -> ModelOutline:
    model_type = values.get("model_type")
    if not model_type:
        raise UserError("the YAML has neither model_type nor model_name_or_path; set one of them")
    overrides = dict(values.get("config_overrides") or {})
    vocab_size = _vocab_size(recipe, values)
    if vocab_size is not None:
        overrides.setdefault("vocab_size", vocab_size)
    if model_type not in DEFAULTS:
        known = ", ".join(sorted(DEFAULTS))
        raise UserError(f"model_type {model_type} is not among {known}; its recipe prints a plan as well")
    shape = shape_of(model_type, overrides)
    counts = count_shape(shape)
    return ModelOutline(counts, counts.total, shape, from_scratch=True)


def _vocab_size(recipe: str, values: dict[str, Any]) -> int | None:
    """The largest token id plus 1, with the tokens that the recipe adds; None if the tokenizer is not on this machine.

    Reads tokenizer.json alone, which is faster than loading the tokenizer with transformers.
    """
    folder = Path(str(values.get("tokenizer_name_or_path")))
    if not (folder / "tokenizer.json").exists():
        return None
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
    added_tokens = set()
    if _needs_pad_token(folder):
        added_tokens.add("<|pad|>")
    if values.get("fim_rate"):
        added_tokens |= {"<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"}
    if recipe == "pretrain_span":
        added_tokens |= {denoiser.mode for denoiser in read_denoisers(values) if denoiser.mode}
    return max(vocabulary.values()) + 1 + len(added_tokens - vocabulary.keys())


def _needs_pad_token(folder: Path) -> bool:
    """Whether `tokenization.ensure_pad_token` would add a token."""
    settings = {}
    if (folder / "tokenizer_config.json").exists():
        settings = read_json_object(folder / "tokenizer_config.json", "restore it, or set another tokenizer")

    def special_token(name: str) -> str | None:
        token = settings.get(f"{name}_token")
        return token.get("content") if isinstance(token, dict) else token

    without_own_id = (None, special_token("eos"))
    return special_token("pad") in without_own_id and special_token("unk") in without_own_id


# --- Continued --------------------------------------------------------------------------------------------------------


def _outline_pretrained(recipe: str, values: dict[str, Any], labels: int) -> ModelOutline:
    import torch

    from unlabeled.models.adapter_files import adapter_base
    from unlabeled.models.adapters import apply_lora_config
    from unlabeled.models.vocabulary import fit_to_tokenizer

    name = values["model_name_or_path"]
    if not Path(name).is_dir():
        raise UserError(f"model_name_or_path: there is no folder {name} on this machine; download or train it first")
    if adapter_base(name):
        raise UserError(f"model_name_or_path {name} is an adapter; its recipe prints a plan as well")
    tokenizer, new_tokens = _prepare_tokenizer(recipe, values)
    with torch.device("meta"):
        model = _build_model(recipe, values, labels)
        fit_to_tokenizer(model, tokenizer, values["max_length"])
        if values.get("adapter", "none") != "none":
            model = apply_lora_config(model, _adapter_config(recipe, values, model, tokenizer, new_tokens))
        if recipe == "embed":
            _freeze_unused(model)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return ModelOutline(count_parameters(model), trainable, model.config, from_scratch=False)


def _prepare_tokenizer(recipe: str, values: dict[str, Any]) -> tuple["PreTrainedTokenizerFast", list[str]]:
    """Load the tokenizer and add the tokens that the recipe adds; return it and the tokens of the chat template."""
    from unlabeled.data.tokenization import ensure_pad_token, load_tokenizer

    name = values.get("tokenizer_name_or_path") or values["model_name_or_path"]
    tokenizer = load_tokenizer(name, "tokenizer_name_or_path")
    ensure_pad_token(tokenizer)
    new_tokens = []
    if recipe in ("sft", "dpo"):
        from unlabeled.data.chat_templates import set_chat_template

        new_tokens = set_chat_template(tokenizer, values["chat_template"])
    elif recipe == "pretrain_clm":
        from unlabeled.data.fim import add_fim_tokens

        add_fim_tokens(tokenizer, values["fim_rate"])
    elif recipe == "pretrain_span":
        from unlabeled.data.span_corruption import add_span_tokens

        add_span_tokens(tokenizer, read_denoisers(values), values["max_length"])
    return tokenizer, new_tokens


def _build_model(recipe: str, values: dict[str, Any], labels: int) -> "PreTrainedModel":
    import transformers

    from unlabeled.models.configs import load_config

    config = load_config(values["model_name_or_path"])
    if recipe in ("classify", "tag"):
        config.num_labels = labels
    auto_class = getattr(transformers, RECIPE_MODELS[recipe].auto_class)
    if recipe == "embed" and config.is_encoder_decoder:
        auto_class = transformers.AutoModelForTextEncoding
    attention = values["attn_implementation"]
    return auto_class.from_config(config, trust_remote_code=False, attn_implementation=attention)


def _adapter_config(
    recipe: str,
    values: dict[str, Any],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    new_tokens: list[str],
) -> "LoraConfig":
    from unlabeled.config import AdapterArguments
    from unlabeled.models.adapters import build_lora_config, new_token_rows

    model_args = AdapterArguments(
        model_name_or_path=values["model_name_or_path"],
        # QLoRA trains the same parameters as LoRA, and its arguments are refused on a machine without a GPU.
        adapter="lora" if values["adapter"] == "qlora" else values["adapter"],
        lora_r=values["lora_r"],
        lora_target_modules=values["lora_target_modules"],
    )
    modules_to_save = None
    token_rows = None
    if recipe in ("classify", "tag"):  # the new head is trained in full
        modules_to_save = [
            name
            for name, module in model.named_children()
            if name != model.base_model_prefix and any(True for _ in module.parameters())
        ]
    elif recipe in ("sft", "dpo"):
        token_rows = new_token_rows(model, tokenizer.convert_tokens_to_ids(new_tokens))
    task_type = PEFT_TASK_TYPES.get(recipe, "CAUSAL_LM")
    return build_lora_config(model_args, task_type, modules_to_save, token_rows)


def _freeze_unused(model: "PreTrainedModel") -> None:
    """Freeze what the states of the last layer do not depend on, such as BERT's pooler.

    As `embedding.freeze_unused`, which takes an embedder of sentence-transformers.
    """
    import torch

    input_ids = torch.ones(1, 8, dtype=torch.long)
    model(input_ids=input_ids)[0].sum().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
