"""Models from scratch and from checkpoints, with weights in float32 and every weight accounted for."""

import os
from collections.abc import Iterable
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging
from transformers.utils.logging import disable_progress_bar

from unlabeled import compat
from unlabeled.config import ModelArguments
from unlabeled.errors import UserError
from unlabeled.models.configs import scratch_config
from unlabeled.models.errors import first_sentence
from unlabeled.models.generation_config import repair_generation_config
from unlabeled.models.vocabulary import fit_to_tokenizer, gathered
from unlabeled.models.weight_files import WRAPPER_PREFIX, without_wrapper_prefix
from unlabeled.runtime.model_folders import check_model_folder
from unlabeled.runtime.processes import print_on_main
from unlabeled.runtime.safe_loading import check_foreign_code


def load_or_init_model(
    auto_class: type[Any],
    model_args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    training_args: TrainingArguments,
) -> PreTrainedModel:
    """The model of a pretraining run: continued from `model_name_or_path`, or `model_type` from scratch.

    A continued model is fitted to the tokenizer. A model that can generate has its cache switched off, as a cache
    disables the isolation of packed documents by `position_ids`; exported models have it on again.

    Args:
        auto_class: such as `AutoModelForCausalLM`.
        model_args: names the model and its attention implementation.
        tokenizer: sets the vocabulary and the special tokens.
        training_args: for `max_length` and `device`, where the model is put.

    Returns:
        The model in float32, on `training_args.device`.

    Raises:
        UserError: there is no such model, it cannot be continued, or its sizes are invalid.
    """
    if model_args.model_name_or_path:
        model = load_pretrained(auto_class, model_args.model_name_or_path, model_args.attn_implementation)
        fit_to_tokenizer(model, tokenizer, training_args.max_length)
    else:
        overrides = cast(dict[str, Any] | None, model_args.config_overrides)  # parsed from a string if necessary
        config = scratch_config(model_args.model_type, overrides, tokenizer, training_args.max_length)
        model = init_model(auto_class, config, model_args.attn_implementation)
    if model.can_generate():
        model.config.use_cache = False
    return model.to(training_args.device)


def init_model(auto_class: type[Any], config: PreTrainedConfig, attn_implementation: str) -> PreTrainedModel:
    """`auto_class.from_config` in float32, with weights that do not depend on the number of processes.

    Under ZeRO-3 transformers initializes each module after it was sharded, on its device and in another order, which
    gives other weights for the same seed. There the first process initializes the model as a single process would, in
    its main memory (4 bytes a parameter, until the shards are filled), and distributes it parameter by parameter; no
    other process holds the whole model.

    Raises:
        UserError: the architecture refuses its sizes or its attention implementation.
    """
    if not is_deepspeed_zero3_enabled():
        return _model_from_config(auto_class, config, attn_implementation)
    is_first = torch.distributed.get_rank() == 0
    whole_parameters = {}
    if is_first:
        with compat.without_zero3_sharding():
            whole_model = _model_from_config(auto_class, config, attn_implementation)
        whole_parameters = dict(whole_model.named_parameters())
        del whole_model
    model = _model_from_config(auto_class, config, attn_implementation)
    for name, parameter in model.named_parameters():
        with torch.no_grad(), gathered(parameter):
            if is_first:
                parameter.copy_(whole_parameters.pop(name))
    return model


def _model_from_config(auto_class: type[Any], config: PreTrainedConfig, attn_implementation: str) -> PreTrainedModel:
    try:
        return auto_class.from_config(
            config, trust_remote_code=False, dtype=torch.float32, attn_implementation=attn_implementation
        )
    except Exception as error:  # each architecture complains of sizes and attention in its own way
        raise UserError(
            f"no model of model_type {config.model_type} can be made ({first_sentence(error)}); correct model_type, "
            "config_overrides or attn_implementation"
        ) from error


def load_pretrained(
    auto_class: type[Any], name_or_path: str, attn_implementation: str, quiet: bool = False, **options: Any
) -> PreTrainedModel:
    """Load a model to continue it, and print which heads are new and which weights are not used.

    Args:
        auto_class: such as `AutoModelForCausalLM`.
        name_or_path: a local folder, or a model name on the Hub.
        attn_implementation: as in `from_pretrained`.
        quiet: print nothing, as the model was loaded before.
        options: further arguments of `from_pretrained`.

    Raises:
        UserError: see `load_with_info`.
    """
    model, info = load_with_info(auto_class, name_or_path, attn_implementation, quiet, **options)
    description = describe_loading(name_or_path, info)
    if description and not quiet:
        print_on_main(description)
    return model


def load_with_info(
    auto_class: type[Any],
    name_or_path: str,
    attn_implementation: str,
    quiet: bool = False,
    other_heads: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, dict]:
    """`auto_class.from_pretrained` in float32, with every weight of its layers from the checkpoint.

    Args:
        auto_class: such as `AutoModelForCausalLM`.
        name_or_path: a local folder, or a model name on the Hub.
        attn_implementation: as in `from_pretrained`.
        quiet: print nothing about repairs.
        other_heads: a head of another shape, for other labels, is initialized anew instead of refused.
        options: further arguments of `from_pretrained`.

    Returns:
        The model, and the loading info of `from_pretrained(output_loading_info=True)`. Its missing, mismatched and
        unexpected keys are those of heads (or of a pooler) only.

    Raises:
        UserError: there is no such model, or its checkpoint lacks weights of layers or has weights of other layers.
    """
    disable_progress_bar()  # it is done before anyone has read it
    if name_or_path.startswith((".", "/", "~")) and not os.path.isdir(os.path.expanduser(name_or_path)):
        raise UserError(f"model_name_or_path: there is no folder {name_or_path}; correct the path")
    name_or_path = os.path.expanduser(name_or_path)
    check_model_folder(name_or_path)
    check_foreign_code(name_or_path)
    # Mismatches are judged by `check_loading`, which `describe_loading` follows with a sentence instead of a table.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    options |= {"dtype": torch.float32, "attn_implementation": attn_implementation}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_wrapper_prefix(name_or_path) as folder:
            model, info = auto_class.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, **options)
        if folder != name_or_path and not quiet:
            print_on_main(f"the weights of {name_or_path} have the names of a wrapped model: read without its prefix")
    except UserError:
        raise
    except Exception as error:  # a dozen kinds, among them that of a broken .safetensors
        raise UserError(
            f"model_name_or_path {name_or_path} cannot be loaded ({first_sentence(error)}); set it to a folder or a "
            "model of the Hub that this objective can continue"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    model.name_or_path = model.config.name_or_path = name_or_path
    check_loading(model, info, name_or_path, other_heads)
    repair = repair_generation_config(model, name_or_path)
    if repair and not quiet:
        print_on_main(repair)
    return model, info


def check_loading(model: PreTrainedModel, info: dict, name_or_path: str, other_heads: bool = False) -> None:
    """Check that the checkpoint and the layers of the model have the same weights.

    A head or a pooler may be new or left over, and so may the decoder of a model of which only the encoder is used, as
    stages differ in these. Anything else would start from random weights, or be lost.

    Args:
        model: the loaded model.
        info: its loading info.
        name_or_path: where it was loaded from, for the message.
        other_heads: whether heads may have other shapes than in the checkpoint.

    Raises:
        UserError: weights of layers are missing, unexpected or of another shape.
    """
    layers = _layer_names(model)
    missing = _keys_of_layers(info["missing_keys"], layers, model.base_model_prefix)
    unexpected = _keys_of_layers(info["unexpected_keys"], layers, model.base_model_prefix)
    unexpected += sorted(key for key in info["unexpected_keys"] if WRAPPER_PREFIX.match(key))
    shapes = {key: (tuple(saved), tuple(expected)) for key, saved, expected in info["mismatched_keys"]}
    mismatched = _keys_of_layers(shapes, layers, model.base_model_prefix) if other_heads else sorted(shapes)
    if mismatched:
        saved, expected = shapes[mismatched[0]]
        defect = (
            f"has {len(mismatched)} weights whose shapes are not those of its config.json, such as {mismatched[0]}: "
            f"{saved} and not {expected}"
        )
    elif missing:
        defect = f"lacks {len(missing)} weights of the model that its config.json describes, such as {missing[0]}"
    elif unexpected:
        defect = f"has {len(unexpected)} weights that its config.json has no place for, such as {unexpected[0]}"
    else:
        return
    raise UserError(
        f"model_name_or_path: the checkpoint of {name_or_path} {defect}; save the whole model again with "
        "save_pretrained, or correct its config.json"
    )


def _layer_names(model: PreTrainedModel) -> set[str]:
    """The top-level modules of the model's backbone, without an output head that is among them, as in T5."""
    backbone = model.base_model
    names = {name.split(".")[0] for name, _ in backbone.named_parameters()}
    if backbone is model:
        head = model.get_output_embeddings()
        names -= {name for name, module in model.named_modules() if module is head}
    return names


def _keys_of_layers(keys: Iterable[str], layers: set[str], base_model_prefix: str) -> list[str]:
    """Those of a checkpoint's keys that belong to these layers, sorted; poolers are no layers."""
    selected = []
    for key in sorted(keys):
        name = key.removeprefix(f"{base_model_prefix}.")
        if name.split(".")[0] in layers and ".pooler." not in f".{name}":
            selected.append(key)
    return selected


def describe_loading(name_or_path: str, info: dict) -> str | None:
    """A sentence about new heads and weights that are not used, or None if there are none."""
    parts = []
    if info["missing_keys"]:
        parts.append(f"has no weights for {_module_names(info['missing_keys'])}, which begin at random")
    if info["unexpected_keys"]:
        parts.append(f"has weights for {_module_names(info['unexpected_keys'])}, which are not used")
    return f"{name_or_path} " + ", and ".join(parts) if parts else None


def _module_names(keys: Iterable[str]) -> str:
    return ", ".join(sorted({key.rsplit(".", 1)[0] for key in keys}))
