"""What makes two runs the same run: the content of their files, wherever those lie, and the keys of their YAML."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedTokenizerFast

from unlabeled.config.resume_keys import KEYS_FREE_TO_CHANGE_ON_RESUME
from unlabeled.errors import UserError
from unlabeled.models.adapter_files import adapter_base
from unlabeled.reporting.lineage import non_default_arguments
from unlabeled.runtime.files import file_sha256, read_json
from unlabeled.runtime.processes import compute_once, print_on_main
from unlabeled.runtime.run_comparison import CONTENTS, NAMES

# Keys that name a file or a folder. What these hold decides whether a run is the same, not what they are called.
NAMED_FILES = {"model_name_or_path", "tokenizer_name_or_path", "chat_template"}

CONFIGS = (
    "config.json", "generation_config.json", "adapter_config.json", "adapter_model.safetensors",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
WEIGHTS, WEIGHT_INDEX = "model.safetensors", "model.safetensors.index.json"

# Sections of a DeepSpeed configuration that say how the work is divided, or what is logged of it.
FREE_DEEPSPEED = {
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "train_batch_size",
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "activation_checkpointing", "aio", "checkpoint",
    "comms_logger", "csv_monitor", "dump_state", "elasticity", "flops_profiler", "memory_breakdown", "steps_per_print",
    "tensorboard", "timers", "wall_clock_breakdown", "wandb",
}  # fmt: skip

LARGE = 5_000_000_000  # bytes of weights that take long enough to be announced


def run_identity(manifest: dict, tokenizer: PreTrainedTokenizerFast, *arguments) -> dict:
    """What `acquire_output_dir` compares: text, model, tokenizer, objective, budget, optimizer, seed. It is collective.

    The first process reads the files of the model, and the others wait for it as long as it takes.

    Args:
        manifest: of the data; its `fingerprint` is of their content.
        arguments: dataclasses with the keys of the run.

    Raises:
        UserError: a file of the model cannot be read.
    """
    values = non_default_arguments(*arguments)
    identity = {key: value for key, value in values.items() if key not in KEYS_FREE_TO_CHANGE_ON_RESUME | NAMED_FILES}
    plugin = next((args.deepspeed_plugin for args in arguments if getattr(args, "deepspeed_plugin", None)), None)
    contents = {
        "the tokenizer": tokenizer_content(tokenizer),
        "the DeepSpeed configuration": deepspeed_content(plugin.deepspeed_config if plugin else {}),
    }
    name = values.get("model_name_or_path")
    if name:
        contents["model_name_or_path"] = compute_once(lambda: model_content(name))
    names = {key: value for key, value in values.items() if key in NAMED_FILES}
    identity |= {"text": manifest["fingerprint"], CONTENTS: contents, NAMES: names}
    if "sha256" in manifest:  # other versions of the libraries may have made other rows of the same text
        identity["rows"] = manifest["sha256"]
    return identity


def model_content(name_or_path: str) -> dict[str, str]:
    """{file: sha256} of what `from_pretrained` reads of a model but its tokenizer; of an adapter, also of its base.

    A model of the Hub has been loaded before this is called: its files are in the cache.

    Raises:
        UserError: a file cannot be read, or the base of an adapter is gone.
    """
    files = dict(_model_files(name_or_path, ""))
    size = sum(os.path.getsize(path) for path in files.values())
    if size > LARGE:
        print_on_main(f"reading {size / 1e9:.1f} GB of weights once, to know the model again when the run is resumed")
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(_sha256, files.values()), strict=True))


def _model_files(name_or_path: str, prefix: str) -> Iterator[tuple[str, Path]]:
    """(name, path) of the files of a model; those of the base of an adapter are named `base/...` wherever they lie."""
    folder = model_folder(name_or_path)
    names = [name for name in CONFIGS if (folder / name).is_file()]
    if "adapter_config.json" in names:
        # A folder that holds an adapter and its base has copies of files of the base for transformers to find.
        names = [name for name in names if name.startswith("adapter_")]
        yield from _model_files(adapter_base(str(folder)), f"{prefix}base/")
    else:
        names += _weight_files(folder)
    if "modules.json" in names:  # of sentence-transformers: each module has a folder
        for module in read_json(folder / "modules.json"):
            inside = folder / module["path"]
            if inside != folder:
                names += [f"{module['path']}/{name}" for name in CONFIGS if (inside / name).is_file()]
                names += [f"{module['path']}/{name}" for name in _weight_files(inside)]
    for name in names:
        yield f"{prefix}{name}", folder / name


def _weight_files(folder: Path) -> list[str]:
    """The weights that transformers takes: one file, or else the shards that an index names."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / WEIGHT_INDEX).is_file():
        return []
    shards = read_json(folder / WEIGHT_INDEX)["weight_map"].values()
    return [WEIGHT_INDEX, *sorted(set(shards))]


def model_folder(name_or_path: str) -> Path:
    """The folder itself, or where the cache holds what was loaded of a model of the Hub.

    Raises:
        UserError: the cache does not hold it.
    """
    path = os.path.expanduser(name_or_path)
    if os.path.isdir(path):
        return Path(path)
    try:
        return Path(snapshot_download(name_or_path, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"model_name_or_path: {name_or_path} is not in the cache of the Hub ({type(error).__name__}), so a resumed "
            "run could not tell whether it has changed; download it with `hf download`"
        ) from error


def _sha256(path: Path) -> str:
    try:
        if path.name == "adapter_config.json":  # but for where its base lies, whose files are read themselves
            config = read_json(path)
            config.pop("base_model_name_or_path", None)
            return _json_sha256(config)
        return file_sha256(path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); make it readable") from error


def _json_sha256(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tokenizer_content(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """{part: sha256} of what a tokenizer makes of a text and of a conversation."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = [backend[part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens", "post_processor")]
    return {
        "vocabulary": _json_sha256(vocabulary),
        "special tokens": _json_sha256(tokenizer.special_tokens_map),
        "chat template": _json_sha256(tokenizer.chat_template),
    }


def deepspeed_content(config: dict) -> dict:
    """The sections of a DeepSpeed configuration that a result depends on; "auto" follows from the keys of the run."""

    def without_auto(value):
        if isinstance(value, dict):
            return {key: without_auto(entry) for key, entry in value.items() if entry != "auto"}
        return value

    counted = without_auto({key: value for key, value in config.items() if key not in FREE_DEEPSPEED})
    return {key: value for key, value in counted.items() if value != {}}
