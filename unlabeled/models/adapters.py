"""LoRA adapters: added to a model, loaded onto it, and saved with a base model of their own."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, cached_file

from unlabeled import compat
from unlabeled.config import AdapterArguments
from unlabeled.errors import UserError
from unlabeled.models.adapter_files import OWN_BASE, OWN_BASE_PATH, absolute_name
from unlabeled.models.errors import first_sentence
from unlabeled.models.vocabulary import gathered
from unlabeled.runtime.files import write_json
from unlabeled.runtime.safe_loading import check_foreign_code
from unlabeled.runtime.staging import staged_folder
from unlabeled.runtime.write_errors import user_error_on_failed_write

# PEFT and TRL read the attribute under its old name.
warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)

ADAPTER_NAME = "default"  # PEFT's name for an adapter that is given none

# --- Adding and loading -----------------------------------------------------------------------------------------------


def build_lora_config(
    model_args: AdapterArguments,
    task_type: str,
    modules_to_save: Sequence[str] | None = None,
    trainable_token_indices: dict[str, list[int]] | None = None,
) -> LoraConfig:
    """The `LoraConfig` that `AdapterArguments` describe.

    Args:
        model_args: the kind of adapter, its rank, scale, dropout and target modules.
        task_type: a value of `peft.TaskType`, such as "CAUSAL_LM".
        modules_to_save: names of modules that are trained in full, such as a new head.
        trainable_token_indices: rows of embeddings that are trained as well, see `new_token_rows`.

    Raises:
        UserError: lora_target_modules names one of `modules_to_save`.
    """
    target_modules: str | set[str] = model_args.lora_target_modules
    if target_modules != "all-linear":
        target_modules = set(model_args.lora_target_modules.split(","))
        trained_in_full = target_modules & {name.split(".")[-1] for name in modules_to_save or ()}
        if trained_in_full:
            raise UserError(f"lora_target_modules: all of {min(trained_in_full)}, a new head, is trained; leave it out")
    return LoraConfig(
        task_type=task_type,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=target_modules,
        use_rslora=model_args.adapter == "rslora",
        use_dora=model_args.adapter == "dora",
        modules_to_save=None if modules_to_save is None else list(modules_to_save),
        trainable_token_indices=trainable_token_indices,
    )


def add_lora_adapter(
    model: PreTrainedModel | PeftModel,
    model_args: AdapterArguments,
    task_type: str,
    *,
    modules_to_save: Sequence[str] | None = None,
    new_token_ids: Sequence[int] = (),
    rebuild_base: Callable[[], PreTrainedModel] | None = None,
) -> PreTrainedModel | PeftModel:
    """Add the adapter that `model_args` ask for. Without one, and if the model has one already, nothing is done.

    Args:
        model: the model to adapt.
        model_args: the kind of adapter, its rank, scale, dropout and target modules.
        task_type: a value of `peft.TaskType`, such as "CAUSAL_LM".
        modules_to_save: names of modules that are trained in full, such as a new head.
        new_token_ids: tokens whose embeddings are new and have to be trained.
        rebuild_base: if the base model differs from the one on disk, such as by new tokens or a new head, a function
            that loads it again as it was before training. The base model is then saved with the adapter, see
            `has_own_base`.

    Raises:
        UserError: lora_target_modules does not fit the model.
    """
    if model_args.adapter == "none" or isinstance(model, PeftModel):
        return model
    rows = new_token_rows(model, list(new_token_ids))
    adapted = apply_lora_config(model, build_lora_config(model_args, task_type, modules_to_save, rows))
    adapted.rebuild_base = rebuild_base
    return adapted


def apply_lora_config(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """`get_peft_model`, with its errors in one sentence.

    Raises:
        UserError: the target modules are not among the model's linear layers, or contain its output head.
    """
    output = model.get_output_embeddings()
    head = next((name for name, module in model.named_modules() if output is not None and module is output), None)
    if head and not isinstance(config.target_modules, str) and head.split(".")[-1] in config.target_modules:
        raise UserError(f"lora_target_modules: TRL's loss would bypass an adapter of {head}; leave it out")
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"lora_target_modules: {first_sentence(error)}; all-linear fits any model") from error
    adapted.peft_config[ADAPTER_NAME].base_model_name_or_path = absolute_name(model.name_or_path)
    return expose_head_bias(adapted)


def new_token_rows(model: PreTrainedModel, token_ids: list[int]) -> dict[str, list[int]] | None:
    """`LoraConfig(trainable_token_indices=...)` for new tokens: their rows in the input and output embeddings.

    By itself PEFT trains the rows of the input embeddings only, and new tokens would stay equally likely forever.

    Args:
        model: with the tokens in its embeddings.
        token_ids: ids of the new tokens.

    Returns:
        The ids by module name, with one module if the embeddings are tied; None without new tokens.

    Raises:
        UserError: under ZeRO-3, where PEFT does not find these rows in the shards.
    """
    if not token_ids:
        return None
    if is_deepspeed_zero3_enabled():
        raise UserError("ZeRO-3 cannot train an adapter for a model without chat tokens; use ds_configs/zero2.yaml")
    tables = {id(table.weight): table for table in (model.get_output_embeddings(), model.get_input_embeddings())}
    return {name: token_ids for name, module in model.named_modules() if module in tables.values()}


def load_adapter(model: PreTrainedModel, name_or_path: str, is_trainable: bool = False) -> PeftModel:
    """`PeftModel.from_pretrained` for weights in .safetensors files; by itself PEFT would read a pickle as well.

    Raises:
        UserError: the adapter is broken, belongs to another model, or is a pickle.
    """
    check_foreign_code(name_or_path, name_or_path)
    try:
        if not os.path.isdir(name_or_path):
            cached_file(name_or_path, ADAPTER_SAFE_WEIGHTS_NAME)  # raises if the Hub has only a pickle
        return PeftModel.from_pretrained(model, name_or_path, is_trainable=is_trainable)
    except Exception as error:  # a dozen kinds, as for models
        raise UserError(
            f"the adapter {name_or_path} cannot be loaded ({first_sentence(error)}); restore it, or set another"
        ) from error


def write_token_rows_to_base(model: PeftModel) -> None:
    """Copy the rows that an adapter has learned for new tokens into the base model.

    The model computes the same. But the reference model that TRL keeps of an adapter takes these rows from the base
    model, and only the rest from the adapter.
    """
    for layer in compat.trainable_token_layers(model):
        if not layer.tied_adapter:
            with torch.no_grad(), gathered(layer.base_layer.weight):
                rows = layer.token_indices[ADAPTER_NAME]
                layer.base_layer.weight[rows] = layer.trainable_tokens_delta[ADAPTER_NAME]


def expose_head_bias(model: PeftModel) -> PeftModel:
    """Give an output head with new tokens the attribute `bias` of its base layer, which TRL's loss reads."""
    head = model.get_output_embeddings()
    if compat.is_trainable_tokens_wrapper(head):
        head.bias = head.original_module.bias
    return model


# --- A base model of its own ------------------------------------------------------------------------------------------


def has_own_base(model: torch.nn.Module) -> bool:
    """Whether the base model of the model's adapter is on no disk, so that `save_own_base` has to save it."""
    return getattr(model, "rebuild_base", None) is not None


def clear_base_name(model: PeftModel) -> None:
    """Remove the name of an adapter's base model, before an adapter with a base of its own is saved.

    PEFT reads the configuration of the base model that an adapter names, and asks the Hub if there is no such folder.
    With an empty name it does neither, so files that an interrupted run left behind do not affect what is saved.
    """
    model.peft_config[ADAPTER_NAME].base_model_name_or_path = ""


def save_own_base(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Save the base model of an adapter in the adapter's folder, so that `from_pretrained(folder)` finds it there.

    transformers takes a folder that has an adapter and a config.json as a whole model with an adapter, and reads its
    weights from the files that the index names, relative to the folder. So it loads from any working directory, and
    after the folder was moved.

    The base model is complete or absent whenever this is interrupted, and a repeat writes all of it again.

    Args:
        base: the base model as it was before training.
        tokenizer: its tokenizer.
        folder: where the adapter was saved already. Its adapter_config.json then names the base by `OWN_BASE_PATH`.

    Raises:
        UserError: the disk is full, or cannot be written to.
    """
    own_base = Path(folder, OWN_BASE)
    with user_error_on_failed_write(folder, "the base model of the adapter"):
        shutil.rmtree(own_base, ignore_errors=True)  # of a run that was interrupted
        with staged_folder(own_base) as staged:
            base.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
        _copy_configs(own_base, Path(folder), ("config.json", "generation_config.json"))
        write_json(Path(folder, "model.safetensors.index.json"), _weight_index(own_base))
        adapter_config = Path(folder, "adapter_config.json")
        config = json.loads(adapter_config.read_text(encoding="utf-8"))
        write_json(adapter_config, config | {"base_model_name_or_path": OWN_BASE_PATH})


def _copy_configs(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        if (source / name).exists():
            temporary = target / f"{name}.tmp"
            shutil.copyfile(source / name, temporary)
            os.replace(temporary, target / name)


def _weight_index(own_base: Path) -> dict:
    """The content of a model.safetensors.index.json that is put beside the folder of the weights."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for file in sorted(own_base.glob("*.safetensors")):
        total_size += file.stat().st_size
        with safe_open(file, framework="pt") as tensors:
            weight_map |= dict.fromkeys(tensors.keys(), f"{own_base.name}/{file.name}")
    return {"metadata": {"total_size": total_size}, "weight_map": weight_map}
