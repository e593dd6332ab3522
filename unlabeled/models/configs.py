"""Model configurations: built for a model from scratch, or loaded with the checks that every stage needs."""

from difflib import get_close_matches
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from unlabeled.data.tokenization import vocabulary_size
from unlabeled.errors import UserError
from unlabeled.models.errors import first_sentence
from unlabeled.runtime.model_folders import check_model_folder, check_numbers
from unlabeled.runtime.safe_loading import check_foreign_code

SPECIAL_TOKENS = ("bos", "eos", "pad", "cls", "sep")


def scratch_config(
    model_type: str, overrides: dict | None, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> PreTrainedConfig:
    """`AutoConfig.for_model(model_type, **overrides)` with the tokenizer's vocabulary size and special tokens.

    Args:
        model_type: a key of `transformers.CONFIG_MAPPING`, such as "llama".
        overrides: values of the configuration that replace its defaults.
        tokenizer: sets `vocab_size`, unless `overrides` has a larger one, and the ids of the special tokens.
        max_length: tokens in a row, which the model's positions have to cover.

    Raises:
        UserError: `model_type` is unknown, an override is not a field of its configuration, or a value is invalid.
    """
    default = _default_config(model_type)
    overrides = dict(overrides or {})
    _check_overrides(overrides, default, vocabulary_size(tokenizer))
    overrides.setdefault("vocab_size", vocabulary_size(tokenizer))
    try:
        config = AutoConfig.for_model(model_type, **special_token_ids(default, tokenizer), **overrides)
    except Exception as error:  # configurations validate themselves, each with its own kind of error
        raise UserError(f"config_overrides: {' '.join(str(error).split())[:300]}") from error
    check_positions(config, max_length)
    return config


def _default_config(model_type: str) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(model_type)
    except (ValueError, KeyError) as error:
        nearest = get_close_matches(model_type, list(CONFIG_MAPPING.keys()), 1, 0)[0]
        raise UserError(f"model_type {model_type!r} is unknown to transformers; did you mean {nearest!r}?") from error


def _check_overrides(overrides: dict[str, Any], default: PreTrainedConfig, vocab_size: int) -> None:
    for name in overrides:
        if not hasattr(default, name):
            nearest = get_close_matches(name, default.to_dict(), 1, 0)[0]
            raise UserError(f"config_overrides: {default.model_type} has no {name!r}; did you mean {nearest!r}?")
    check_numbers(overrides, "config_overrides")
    size = overrides.get("vocab_size", vocab_size)
    if not isinstance(size, int):
        raise UserError(f"config_overrides: vocab_size is {size!r}, not a number; remove it")
    if size < vocab_size:
        raise UserError(f"config_overrides: vocab_size {size} is smaller than the tokenizer's {vocab_size}; remove it")


def special_token_ids(default: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The `..._token_id` fields of a configuration, from the tokenizer.

    Args:
        default: the default configuration of the architecture, which tells which of the fields it has.
        tokenizer: the tokenizer of the model.
    """
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL_TOKENS}
    # A tokenizer without cls and sep frames rows by bos and eos, see `data.tokenization.framing`.
    for name, substitute in (("cls_token_id", "bos_token_id"), ("sep_token_id", "eos_token_id")):
        if ids[name] is None and getattr(default, name, None) is not None:
            ids[name] = ids[substitute]
    if getattr(default, "is_encoder_decoder", False):
        # T5's decoder starts with the pad token, BART's with eos.
        starts_with_eos = getattr(default, "decoder_start_token_id", None) == default.eos_token_id
        ids["decoder_start_token_id"] = ids["eos_token_id"] if starts_with_eos else ids["pad_token_id"]
        if getattr(default, "forced_eos_token_id", None) is not None:
            ids["forced_eos_token_id"] = ids["eos_token_id"]
    if hasattr(default, "mask_token_id"):  # EuroBERT's default lies outside a small vocabulary
        ids["mask_token_id"] = tokenizer.mask_token_id
    return ids


def check_positions(config: PreTrainedConfig, max_length: int) -> None:
    """Raise `UserError` if a row of `max_length` tokens is longer than the model's positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and 0 < positions < max_length:  # XLNet's -1 means no limit
        raise UserError(
            f"max_length {max_length} is longer than the model's {positions} positions; lower it, or raise "
            "max_position_embeddings in config_overrides"
        )


def load_config(name_or_path: str) -> PreTrainedConfig:
    """`AutoConfig.from_pretrained` without remote code.

    Raises:
        UserError: there is no such model, or its configuration cannot be read.
    """
    check_model_folder(name_or_path)
    check_foreign_code(name_or_path)
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"model_name_or_path {name_or_path} cannot be loaded ({first_sentence(error)}); set it to a folder or a "
            "model of the Hub"
        ) from error
