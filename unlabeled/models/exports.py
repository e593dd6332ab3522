"""Saved models loaded again, to check that they are complete."""

import os
import re
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel

from unlabeled import compat
from unlabeled.models.adapter_files import absolute_name, adapter_base
from unlabeled.models.adapters import ADAPTER_NAME, load_adapter
from unlabeled.runtime.safe_loading import check_foreign_code


def rename_dora_magnitudes(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's tensors under names that PEFT and transformers both read.

    transformers 5.23 does not find DoRA's magnitudes under the name that PEFT writes, and loads the adapter without
    them.
    """
    return {re.sub("lora_magnitude_vector$", r"\g<0>.weight", name): tensor for name, tensor in adapter.items()}


def load_and_check_export(
    auto_class: type[Any], folder: str, trained: torch.nn.Module | None = None
) -> PreTrainedModel | PeftModel:
    """Load a saved model as its users will, and check that it is complete. For use when training is over.

    Args:
        auto_class: such as `AutoModelForCausalLM`.
        folder: of a whole model, or of an adapter.
        trained: the model that was saved, for a comparison of its trained weights bit for bit.

    Returns:
        The model in float32 and evaluation mode, on the CPU.

    Raises:
        RuntimeError: a weight is missing, or differs from the trained one.
    """
    compat.forget_deepspeed_config()  # under ZeRO-3 this process would wait for the others to load their shards
    base = adapter_base(folder)
    check_foreign_code(base or folder, base or folder)
    model, info = auto_class.from_pretrained(
        base or folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True, trust_remote_code=False
    )
    wrong = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    if base:
        model = load_adapter(model, folder)
        model.peft_config[ADAPTER_NAME].base_model_name_or_path = absolute_name(base)
        wrong += _wrong_adapter_tensors(model, folder)
    if trained is not None:
        wrong += _differing_parameters(model, trained)
    if wrong:
        raise RuntimeError(f"{folder} is not what was trained: {wrong[:3]} and {max(len(wrong) - 3, 0)} more differ")
    return model.eval()


def _wrong_adapter_tensors(model: PeftModel, folder: str) -> list[str]:
    """Names of the adapter's tensors that its file lacks, or has in another shape; PEFT would not complain."""
    saved = rename_dora_magnitudes(load_file(os.path.join(folder, "adapter_model.safetensors")))
    expected = rename_dora_magnitudes(get_peft_model_state_dict(model))
    return [name for name in expected if name not in saved or saved[name].shape != expected[name].shape]


def _differing_parameters(loaded: torch.nn.Module, trained: torch.nn.Module) -> list[str]:
    """Names of the trained parameters that are not the same after loading."""
    loaded_parameters = dict(loaded.named_parameters())
    differing = []
    for name, parameter in trained.named_parameters():
        if not parameter.requires_grad or not parameter.numel():  # ZeRO-3 leaves empty parameters, nothing to compare
            continue
        expected = parameter.detach().cpu().float()
        if name not in loaded_parameters or not torch.equal(loaded_parameters[name], expected):
            differing.append(name)
    return differing
