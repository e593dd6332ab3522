"""Checks of folders that somebody else may have written: reading them never runs a program that lies in them.

Three kinds of files in a model folder or a checkpoint can hold a program: Python modules that a configuration names
(`auto_map`), kernels of the Hub that it names as its attention, and pickles. The first are never loaded, as every
loading call of this project passes `trust_remote_code=False`; here they get a sentence of their own. Weights are read
from .safetensors alone. The states in a checkpoint are pickles, of which each class is looked up before they are read.
"""

import json
from pathlib import Path

from unlabeled.errors import UserError
from unlabeled.runtime.files import read_optional_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX_FILES = ("model.safetensors.index.json", "adapter_model.safetensors.index.json")
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")

# What Trainer and DeepSpeed write into checkpoints besides tensors, containers and numbers. None of these runs anything
# but its own constructor. The names are those of torch.serialization.get_unsafe_globals_in_checkpoint.
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
    """Raise `UserError` where a local model folder cannot be read without running a program.

    That is where its architecture is a Python module in the folder, its weights are pickles alone, or its configuration
    takes attention from a kernel of the Hub. The name of a model on the Hub passes: what is downloaded is read with
    `use_safetensors=True` and `trust_remote_code=False`.

    Args:
        folder: of a model or an adapter; its subfolders are not looked at.
        key: the key or path that the message begins with.
    """
    from transformers import CONFIG_MAPPING

    folder = Path(folder)
    if not folder.is_dir():
        return
    config = read_optional_json(folder / "config.json")
    model_type = config.get("model_type")
    if config.get("auto_map") and not (isinstance(model_type, str) and model_type in CONFIG_MAPPING):
        raise UserError(
            f"{key}: the model_type {model_type!r} of {folder} is a program in that folder, which is not "
            "run; choose a model whose architecture transformers has"
        )
    for name in ("config.json", "adapter_config.json"):
        config = read_optional_json(folder / name)
        for attention in (config.get(part) for part in ATTENTION_KEYS):
            if "/" in json.dumps(attention):  # a string, or one for each part of the model
                raise UserError(
                    f"{key}: {folder / name} takes its attention from {attention}, a program of the Hub, which is "
                    "not run; remove that key"
                )
    for name in INDEX_FILES:
        files = read_optional_json(folder / name).get("weight_map")
        files = files.values() if isinstance(files, dict) else ()
        pickled = [file for file in files if not str(file).endswith(".safetensors")]
        if pickled:
            raise UserError(
                f"{key}: {folder / name} names {pickled[0]}, which is no .safetensors file; save the model anew with "
                "save_pretrained"
            )
    check_weights(folder, "model", "pytorch_model", key)
    if (folder / "adapter_config.json").is_file():
        check_weights(folder, "adapter_model", "adapter_model", key)


def check_attention(attn_implementation: str) -> None:
    """Raise `UserError` for the name of a kernel, which transformers would download and run."""
    if "/" in attn_implementation:
        raise UserError(
            f"attn_implementation: {attn_implementation!r} is a program of the Hub, which is not run; set it to sdpa, "
            "varlen or flash_attention_2"
        )


def check_weights(folder: Path, safe_name: str, pickle_name: str, key: str) -> None:
    """Raise `UserError` where there are weights of this name as a pickle and none as .safetensors."""
    pickles = sorted(file for file in folder.glob(f"{pickle_name}*") if file.suffix in PICKLES)
    if pickles and not any(folder.glob(f"{safe_name}*.safetensors")):
        raise UserError(
            f"{key}: {pickles[0]} is a pickle, which may run a program when it is read; save the weights as "
            ".safetensors, as save_pretrained does"
        )


def check_checkpoint(checkpoint: str | Path) -> None:
    """Raise `UserError` where a checkpoint has a pickle with other classes than Trainer and DeepSpeed write.

    Trainer reads its states with `weights_only=True`, which refuses them too, with a traceback; DeepSpeed reads its own
    without, and would run them. The classes are read from the disassembled pickle, nothing of which is run.
    """
    import torch

    checkpoint = Path(checkpoint)
    for file in sorted(file for file in checkpoint.rglob("*") if file.suffix in PICKLES and file.is_file()):
        remedy = f"delete {checkpoint}, which no run of this project has written so, and run this again"
        try:
            classes = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - CHECKPOINT_CLASSES
        except Exception as error:  # an older format than torch.save writes, TorchScript, or no pickle at all
            raise UserError(f"{file} is no state of a training run that can be checked; {remedy}") from error
        if classes:
            raise UserError(f"{file} would run {min(classes)} when it is read; {remedy}")
    latest = checkpoint / "latest"  # by which DeepSpeed finds its folder
    if latest.is_file():
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if Path(name).name != name or name in ("", ".."):
            raise UserError(
                f"{latest} names {name!r}, which is no folder of this checkpoint; delete {checkpoint} and run this "
                "again"
            )
