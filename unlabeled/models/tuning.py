"""Models for fine-tuning: with all weights or an adapter, and as they were before training."""

from collections.abc import Sequence
from functools import partial

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from unlabeled import compat
from unlabeled.config import AdapterArguments
from unlabeled.data.chat_templates import stop_at_end_of_turn
from unlabeled.data.tokenization import vocabulary_size
from unlabeled.errors import UserError
from unlabeled.models.adapter_files import absolute_name, adapter_base
from unlabeled.models.adapters import (
    ADAPTER_NAME,
    add_lora_adapter,
    expose_head_bias,
    load_adapter,
    write_token_rows_to_base,
)
from unlabeled.models.errors import first_sentence
from unlabeled.models.loading import load_pretrained
from unlabeled.models.vocabulary import fit_to_tokenizer
from unlabeled.models.weight_files import has_wrapper_prefix


def load_model_for_tuning(
    model_args: AdapterArguments,
    tokenizer: PreTrainedTokenizerBase,
    training_args: TrainingArguments,
    new_tokens: Sequence[str] = (),
) -> PreTrainedModel | PeftModel:
    """The causal language model of an SFT or DPO run, ready for training.

    The model is fitted to the tokenizer, stops at the end of a turn, has its cache switched off and gets the adapter
    that `model_args` ask for. An adapter that `model_name_or_path` already is, is trained further. If the base model
    of a new adapter had to change, it is saved with the adapter later, see `models.adapters.has_own_base`.

    Args:
        model_args: names the model and describes the adapter.
        tokenizer: with the chat template of the run.
        training_args: for `max_length` and `device`, where the model is put.
        new_tokens: control tokens that the chat template added to the tokenizer.

    Returns:
        The model in float32 (with qlora in 4 bits), on `training_args.device`.

    Raises:
        UserError: there is no such model, or the adapter does not fit it.
    """
    model = load_for_tuning(model_args)
    eos_changed = stop_at_end_of_turn(model, tokenizer)
    base_changed = eos_changed or vocabulary_size(tokenizer) > model.config.vocab_size
    if base_changed and isinstance(model, PeftModel):
        raise UserError(f"{model_args.model_name_or_path} is an adapter; merge it before you change its chat template")
    fit_to_tokenizer(model, tokenizer, training_args.max_length)
    model.config.use_cache = False  # a cache disables the isolation by position_ids; exported models have it on
    rebuild_base = None
    if base_changed:
        rebuild_base = partial(load_initial_model, model_args, tokenizer, training_args.max_length)
    new_token_ids = tokenizer.convert_tokens_to_ids(list(new_tokens))
    model = add_lora_adapter(model, model_args, "CAUSAL_LM", new_token_ids=new_token_ids, rebuild_base=rebuild_base)
    if model_args.adapter != "qlora":  # bitsandbytes has put it on the device
        model.to(training_args.device)
    return model


def load_reference_model(
    model_args: AdapterArguments, tokenizer: PreTrainedTokenizerBase, training_args: TrainingArguments
) -> PreTrainedModel | None:
    """The frozen reference model of a DPO run, or None if it needs no model of its own.

    With an adapter, the reference is the same model without it; precomputed log-probabilities need none.

    Args:
        model_args: names the model that the run starts from.
        tokenizer: with the chat template of the run.
        training_args: for `max_length` and `precompute_ref_log_probs`.
    """
    if model_args.adapter != "none" or training_args.precompute_ref_log_probs:
        return None
    reference = load_for_tuning(model_args, quiet=True).requires_grad_(False)
    fit_to_tokenizer(reference, tokenizer, training_args.max_length)
    return reference


def load_initial_model(
    model_args: AdapterArguments, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> PreTrainedModel | PeftModel:
    """The model as it was before training, without a new adapter. For one process, when training is over.

    Args:
        model_args: names the model that the run started from.
        tokenizer: with the chat template of the run.
        max_length: tokens in a row.
    """
    compat.forget_deepspeed_config()  # under ZeRO-3 this process would wait for the others to load their shards
    model = load_for_tuning(model_args, quiet=True)
    fit_to_tokenizer(model, tokenizer, max_length)
    stop_at_end_of_turn(model, tokenizer)
    return model


def load_for_tuning(model_args: AdapterArguments, quiet: bool = False) -> PreTrainedModel | PeftModel:
    """The model that `AdapterArguments` name, with every weight that it has learned.

    If `model_name_or_path` is an adapter, a run with an adapter trains it further (TRL keeps a frozen copy of it as the
    reference), and a run that trains all weights merges it into its base model. A second adapter beside it would leave
    the first behind.

    Args:
        model_args: names the model and describes the adapter.
        quiet: do not print what was repaired, as the model was loaded before.

    Raises:
        UserError: there is no such model, or the run asks for another adapter than the existing one.
    """
    name = model_args.model_name_or_path
    base = adapter_base(name)
    model = load_pretrained(
        AutoModelForCausalLM,
        base or name,
        model_args.attn_implementation,
        quiet=quiet,
        **_quantization_options(model_args),
    )
    if model_args.adapter != "none" and has_wrapper_prefix(base or name):
        raise UserError(
            f"the weights of {base or name} are named as in a wrapped model, so nobody could load an adapter onto it; "
            "save the model inside the wrapper again, or set adapter: none"
        )
    if base is None:
        return model
    trains_all_weights = model_args.adapter == "none"
    if is_deepspeed_zero3_enabled() and (
        trains_all_weights or PeftConfig.from_pretrained(name).trainable_token_indices
    ):
        raise UserError(f"{name} is an adapter that ZeRO-3 cannot read; merge it first with scripts/merge_adapter.py")
    model = load_adapter(model, name, is_trainable=not trains_all_weights)
    if trains_all_weights:
        return _merge_adapter(model, name)
    model.peft_config[ADAPTER_NAME].base_model_name_or_path = absolute_name(base)
    _check_same_adapter(model, model_args)
    write_token_rows_to_base(model)
    return expose_head_bias(model)


def _quantization_options(model_args: AdapterArguments) -> dict:
    """Arguments of `from_pretrained`: for qlora those of Dettmers et al. 2023 (arXiv:2305.14314), otherwise none."""
    if model_args.adapter != "qlora":
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config}


def _merge_adapter(model: PeftModel, name: str) -> PreTrainedModel:
    try:
        return model.merge_and_unload().requires_grad_(True)
    except (NotImplementedError, RuntimeError, ValueError) as error:  # kinds of adapters that cannot be merged
        raise UserError(
            f"the adapter {name} cannot be merged into its model ({first_sentence(error)}); set adapter to train it "
            "further"
        ) from error


def _check_same_adapter(model: PeftModel, model_args: AdapterArguments) -> None:
    """Raise `UserError` if an existing adapter is not of the kind and size that the run asks for."""
    existing = model.peft_config[ADAPTER_NAME]
    if existing.use_dora:
        existing_kind = "dora"
    elif existing.use_rslora:
        existing_kind = "rslora"
    else:
        existing_kind = "lora"
    requested_kind = "lora" if model_args.adapter == "qlora" else model_args.adapter
    settings = {
        "adapter": (requested_kind, existing_kind),
        "lora_r": (model_args.lora_r, existing.r),
        "lora_alpha": (model_args.lora_alpha, existing.lora_alpha),
        "lora_dropout": (model_args.lora_dropout, existing.lora_dropout),
    }
    name = model_args.model_name_or_path
    for key, (requested, value) in settings.items():
        if requested != value:
            raise UserError(
                f"{name} is an adapter with {key} {value}, not {requested}; set {key} to {value} to train it further, "
                "or merge it first with scripts/merge_adapter.py"
            )
