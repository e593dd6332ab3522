"""Checks of folders from other sources, so that reading them never runs a program that they contain.

Three kinds of content in a model folder or a checkpoint can be a program:

- Python modules that a configuration names (`auto_map`). They are never loaded, as every loading call of this project
  passes `trust_remote_code=False`; the check here only gives a better message.
- Kernels of the Hub that a configuration names as its attention implementation.
- Pickles. Weights are read from .safetensors files only. The states in a checkpoint are pickles, and the classes that
  they name are checked before they are read.
"""

import json
from pathlib import Path

from unlabeled.errors import UserError
from unlabeled.runtime.files import read_optional_json

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX_FILES = ("model.safetensors.index.json", "adapter_model.safetensors.index.json")
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")

# Classes that Trainer and DeepSpeed write into checkpoints besides tensors, containers and numbers. None of them runs
# anything but its own constructor. The names are those of torch.serialization.get_unsafe_globals_in_checkpoint.
CHECKPOINT_CLASSES = {
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy.ndarray",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",  # numpy 1
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def check_foreign_code(folder: str | Path, key: str = "model_name_or_path") -> None:
    """Check that a local model folder can be read without running a program in it.

    The name of a model on the Hub passes: what is downloaded is read with `use_safetensors=True` and
    `trust_remote_code=False`.

    Args:
        folder: of a model or an adapter; its subfolders are not checked.
        key: the key or path that the message begins with.

    Raises:
        UserError: the architecture is a Python module in the folder, the weights are only there as pickles, or the
            configuration takes attention from a kernel of the Hub.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    _check_architecture(folder, key)
    for name in ("config.json", "adapter_config.json"):
        _check_attention_of_config(folder / name, key)
    for name in INDEX_FILES:
        _check_weight_index(folder / name, key)
    check_weights(folder, "model", "pytorch_model", key)
    if (folder / "adapter_config.json").is_file():
        check_weights(folder, "adapter_model", "adapter_model", key)


def _check_architecture(folder: Path, key: str) -> None:
    from transformers import CONFIG_MAPPING

    config = read_optional_json(folder / "config.json")
    model_type = config.get("model_type")
    is_known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if config.get("auto_map") and not is_known:
        raise UserError(
            f"{key}: the model_type {model_type!r} of {folder} is a program in that folder, which is not "
            "run; choose a model whose architecture transformers has"
        )


def _check_attention_of_config(file: Path, key: str) -> None:
    config = read_optional_json(file)
    for attention_key in ATTENTION_KEYS:
        attention = config.get(attention_key)
        if "/" in json.dumps(attention):  # a string, or a dictionary with one for each part of the model
            raise UserError(
                f"{key}: {file} takes its attention from {attention}, a program of the Hub, which is not run; remove "
                "that key"
            )


def _check_weight_index(file: Path, key: str) -> None:
    weight_map = read_optional_json(file).get("weight_map")
    if not isinstance(weight_map, dict):
        return
    for weight_file in weight_map.values():
        if not str(weight_file).endswith(".safetensors"):
            raise UserError(
                f"{key}: {file} names {weight_file}, which is no .safetensors file; save the model again with "
                "save_pretrained"
            )


def check_attention(attn_implementation: str) -> None:
    """Raise `UserError` for the name of a kernel, which transformers would download and run."""
    if "/" in attn_implementation:
        raise UserError(
            f"attn_implementation: {attn_implementation!r} is a program of the Hub, which is not run; set it to sdpa, "
            "varlen or flash_attention_2"
        )


def check_weights(folder: Path, safe_name: str, pickle_name: str, key: str) -> None:
    """Check that a folder has weights as .safetensors files if it has any.

    Args:
        folder: of a model or an adapter.
        safe_name: how the names of .safetensors files begin.
        pickle_name: how the names of pickles begin.
        key: the key or path that the message begins with.

    Raises:
        UserError: there are only pickles.
    """
    pickles = sorted(file for file in folder.glob(f"{pickle_name}*") if file.suffix in PICKLE_SUFFIXES)
    if pickles and not any(folder.glob(f"{safe_name}*.safetensors")):
        raise UserError(
            f"{key}: {pickles[0]} is a pickle, which may run a program when it is read; save the weights as "
            ".safetensors, as save_pretrained does"
        )


def check_checkpoint(checkpoint: str | Path) -> None:
    """Check that the pickles of a checkpoint name only classes that Trainer and DeepSpeed write.

    Trainer reads its states with `weights_only=True`, which refuses other classes with a traceback; DeepSpeed reads its
    own without, and would run them. The classes are read from the disassembled pickle, and nothing of it is run.

    Raises:
        UserError: a pickle names another class or cannot be checked, or DeepSpeed's folder is outside the checkpoint.
    """
    import torch

    checkpoint = Path(checkpoint)
    remedy = f"delete {checkpoint}, which no run of this project has written so, and run this again"
    for file in sorted(checkpoint.rglob("*")):
        if file.suffix not in PICKLE_SUFFIXES or not file.is_file():
            continue
        try:
            classes = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - CHECKPOINT_CLASSES
        except Exception as error:  # an older format than torch.save writes, TorchScript, or no pickle at all
            raise UserError(f"{file} is no state of a training run that can be checked; {remedy}") from error
        if classes:
            raise UserError(f"{file} would run {min(classes)} when it is read; {remedy}")
    latest = checkpoint / "latest"  # where DeepSpeed keeps the name of its folder
    if latest.is_file():
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if Path(name).name != name or name in ("", ".."):
            raise UserError(
                f"{latest} names {name!r}, which is no folder of this checkpoint; delete {checkpoint} and run this "
                "again"
            )
