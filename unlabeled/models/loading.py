"""A model from scratch, continued or with an adapter, and loaded again as it was saved."""

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.modeling_utils import set_zero3_state
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.logging import disable_progress_bar
from transformers.utils.peft_utils import find_adapter_config_file

from unlabeled.data.tokenization import vocabulary_size
from unlabeled.errors import UserError
from unlabeled.models.safe_loading import check_foreign_code
from unlabeled.runtime.checkpoints import user_error_on_failed_write, write_json
from unlabeled.runtime.files import check_model_folder, check_numbers, read_json, read_json_object
from unlabeled.runtime.staging import staged_folder

# PEFT and TRL ask for the old name, which transformers mirrors.
warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)


def scratch_config(model_type: str, overrides: dict | None, tokenizer, max_length: int) -> PreTrainedConfig:
    """`AutoConfig.for_model(model_type, **overrides)` with the tokenizer's vocabulary and special tokens.

    Raises:
        UserError: an unknown `model_type`, or an override that is no field of its config.
    """
    try:
        known = AutoConfig.for_model(model_type)
    except (ValueError, KeyError) as error:
        from transformers import CONFIG_MAPPING

        nearest = get_close_matches(model_type, list(CONFIG_MAPPING.keys()), 1, 0)[0]
        raise UserError(f"model_type {model_type!r} is unknown to transformers; did you mean {nearest!r}?") from error
    overrides = dict(overrides or {})
    for name in overrides:
        if not hasattr(known, name):
            nearest = get_close_matches(name, known.to_dict(), 1, 0)[0]
            raise UserError(f"config_overrides: {model_type} has no {name!r}; did you mean {nearest!r}?")
    check_numbers(overrides, "config_overrides")
    size = vocabulary_size(tokenizer)
    overrides.setdefault("vocab_size", size)
    if not isinstance(overrides["vocab_size"], int):
        raise UserError(f"config_overrides: vocab_size is {overrides['vocab_size']!r}, not a number; remove it")
    if overrides["vocab_size"] < size:
        raise UserError(
            f"config_overrides: vocab_size {overrides['vocab_size']} is smaller than the tokenizer's {size}; remove it"
        )
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "cls", "sep")}
    for name, frame in (("cls_token_id", "bos_token_id"), ("sep_token_id", "eos_token_id")):  # as `framing` has them
        if ids[name] is None and getattr(known, name, None) is not None:
            ids[name] = ids[frame]
    if getattr(known, "is_encoder_decoder", False):  # T5 begins an answer with its pad, BART with its eos
        begins = getattr(known, "decoder_start_token_id", None) == known.eos_token_id
        ids["decoder_start_token_id"] = ids["eos_token_id"] if begins else ids["pad_token_id"]
        if getattr(known, "forced_eos_token_id", None) is not None:
            ids["forced_eos_token_id"] = ids["eos_token_id"]
    if hasattr(known, "mask_token_id"):  # EuroBERT's default lies outside a small vocabulary
        ids["mask_token_id"] = tokenizer.mask_token_id
    try:
        config = AutoConfig.for_model(model_type, **ids, **overrides)
    except Exception as error:  # configs validate themselves, each with its own kind of error
        raise UserError(f"config_overrides: {' '.join(str(error).split())[:300]}") from error
    check_positions(config, max_length)
    return config


def check_positions(config: PreTrainedConfig, max_length: int) -> None:
    """Raises UserError when a row is longer than the positions of the model."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and 0 < positions < max_length:  # XLNet's -1 means any
        raise UserError(
            f"max_length {max_length} is longer than the model's {positions} positions; lower it, or raise "
            "max_position_embeddings in config_overrides"
        )


def fit_to_tokenizer(model: PreTrainedModel, tokenizer, max_length: int) -> bool:
    """Make a continued model hold every token, and check its positions. True when it had to grow.

    The vectors of new tokens are the mean of the others, so that nothing depends on a random state.
    """
    check_positions(model.config, max_length)
    before = model.config.vocab_size
    size = vocabulary_size(tokenizer)
    if size <= before:
        return False
    model.resize_token_embeddings(size, mean_resizing=False)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    for weight in {id(table.weight): table.weight for table in tables if table is not None}.values():
        with torch.no_grad(), _gathered(weight):
            weight[before:] = weight[:before].mean(dim=0)
    return True


def _gathered(parameter):
    """Under ZeRO-3 the whole parameter, written back when the block ends; otherwise nothing special."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def from_scratch(auto_class, config: PreTrainedConfig, attn_implementation: str) -> PreTrainedModel:
    """`auto_class.from_config` in float32 (master weights), drawn alike on one process, on many, and in shards.

    Under ZeRO-3 transformers draws each module after it was sharded, on its device and in another order: other weights
    for the same seed. There the first process draws the model as a single one would, in its main memory (4 bytes a
    parameter, until the shards are filled), and hands it out parameter by parameter; no other process holds it whole.

    Raises:
        UserError: the architecture refuses its sizes or its attention.
    """

    def draw() -> PreTrainedModel:
        try:
            options = {"dtype": torch.float32, "attn_implementation": attn_implementation}
            return auto_class.from_config(config, trust_remote_code=False, **options)
        except Exception as error:  # each architecture complains of sizes and attention in its own way
            raise UserError(
                f"no model of model_type {config.model_type} can be made ({_reason(error)}); correct model_type, "
                "config_overrides or attn_implementation"
            ) from error

    if not is_deepspeed_zero3_enabled():
        return draw()
    whole = {}
    if first := torch.distributed.get_rank() == 0:
        with set_zero3_state():  # what transformers enters where a model is not to be sharded once more
            whole = dict(draw().named_parameters())
    model = draw()
    for name, parameter in model.named_parameters():
        with torch.no_grad(), _gathered(parameter):
            if first:
                parameter.copy_(whole.pop(name))
    return model


def load_pretrained(
    auto_class, name_or_path: str, attn_implementation: str, quiet: bool = False, **options
) -> PreTrainedModel:
    """`load_with_info` for a model that is continued; what the checkpoint lacks or holds besides is printed.

    Args:
        quiet: do not print, as the model was loaded before.

    Raises:
        UserError: as `load_with_info` does.
    """
    model, info = load_with_info(auto_class, name_or_path, attn_implementation, quiet, **options)
    report = describe_loading(name_or_path, info)
    if report and not quiet:
        print_on_main(report)
    return model


def load_with_info(
    auto_class,
    name_or_path: str,
    attn_implementation: str,
    quiet: bool = False,
    other_heads: bool = False,
    **options,
) -> tuple[PreTrainedModel, dict]:
    """`auto_class.from_pretrained` in float32 (master weights), with all weights of its layers from the checkpoint.

    Args:
        other_heads: a head of another size, for other labels, is drawn anew.

    Returns:
        The model, and what `from_pretrained(output_loading_info=True)` tells of it. Keys that are missing, mismatched
        or unexpected are those of heads (or of a pooler) only.

    Raises:
        UserError: there is no such model; or its checkpoint lacks weights of layers, or has weights of other layers.
    """
    disable_progress_bar()  # loading takes less time than it takes to read of it
    if name_or_path.startswith((".", "/", "~")) and not os.path.isdir(os.path.expanduser(name_or_path)):
        raise UserError(f"model_name_or_path: there is no folder {name_or_path}; correct the path")
    name_or_path = os.path.expanduser(name_or_path)
    check_model_folder(name_or_path)
    check_foreign_code(name_or_path)
    options |= {"dtype": torch.float32, "attn_implementation": attn_implementation}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `check_loading` looks at them
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # `check_loading` and `describe_loading` say it in a sentence instead of a table
    try:
        with without_wrapper_prefix(name_or_path) as folder:
            model, info = auto_class.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, **options)
            if folder != name_or_path and not quiet:
                print_on_main(
                    f"the weights of {name_or_path} have the names of a wrapped model: read without its prefix"
                )
    except UserError:
        raise
    except Exception as error:  # a dozen kinds, among them that of a broken .safetensors
        raise UserError(
            f"model_name_or_path {name_or_path} cannot be loaded ({_reason(error)}); set it to a folder or a model of "
            "the Hub that this objective can continue"
        ) from error
    finally:
        logging.set_verbosity(level)
    model.name_or_path = model.config.name_or_path = name_or_path
    check_loading(model, info, name_or_path, other_heads)
    repair = repair_generation_config(model, name_or_path)
    if repair and not quiet:
        print_on_main(repair)
    return model, info


# What `torch.compile` and DistributedDataParallel put before the name of each weight of the model that they wrap.
WRAPPER_PREFIX = re.compile(r"^(?:_orig_mod\.|module\.)+")


@contextmanager
def without_wrapper_prefix(name_or_path: str) -> Iterator[str]:
    """The folder itself; or, where all its weights are named as in a wrapped model, a copy for the while without that.

    Renaming by `from_pretrained(key_mapping=...)` is no way: `save_pretrained` would apply it backwards.

    Raises:
        UserError: some weights have the prefix and others have not.
    """
    keys = _keys_of_weights(name_or_path)
    every = [key for names in keys.values() for key in names]
    wrapped = [key for key in every if WRAPPER_PREFIX.match(key)]
    if not wrapped:
        yield name_or_path
        return
    if len(wrapped) < len(every):
        raise UserError(
            f"model_name_or_path {name_or_path}: {len(wrapped)} of its {len(every)} weights are named as in a wrapped "
            f"model, such as {wrapped[0]}; save it anew from the model inside the wrapper"
        )
    with tempfile.TemporaryDirectory(prefix="unwrapped-") as folder:
        for path in Path(name_or_path).resolve().iterdir():
            if not path.name.endswith((".safetensors", ".safetensors.index.json")):
                os.symlink(path, Path(folder, path.name))
        shards = {}
        for file, names in keys.items():
            tensors = load_file(file)
            save_file(
                {WRAPPER_PREFIX.sub("", name): tensors[name] for name in names},
                Path(folder, file.name),
                metadata={"format": "pt"},
            )
            shards |= {WRAPPER_PREFIX.sub("", name): file.name for name in names}
        if len(keys) > 1:
            index = {"metadata": {}, "weight_map": shards}
            Path(folder, "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        yield folder


def has_wrapper_prefix(folder: str) -> bool:
    return any(WRAPPER_PREFIX.match(key) for names in _keys_of_weights(folder).values() for key in names)


def _keys_of_weights(folder: str) -> dict[Path, list[str]]:
    """The names of the tensors in each weight file of a local folder; empty for a name of the Hub."""
    keys: dict[Path, list[str]] = {}
    for file in sorted(Path(folder).glob("model*.safetensors")) if os.path.isdir(folder) else []:
        with safe_open(file, framework="pt") as tensors:
            keys[file] = list(tensors.keys())
    return keys


def check_loading(model: PreTrainedModel, info: dict, name_or_path: str, other_heads: bool = False) -> None:
    """Raise `UserError` where a checkpoint and the layers of its model are not the same weights.

    A head may be new or left over, as may be a pooler, and the decoder of a model of which the encoder alone is used:
    stages have different ones. Everything else would begin at random, or be lost.
    """
    base = model.base_model
    layers = {name.split(".")[0] for name, _ in base.named_parameters()}
    if base is model:  # its head is among its layers, as T5's
        head = model.get_output_embeddings()
        layers -= {name for name, module in model.named_modules() if module is head}

    def of_layers(keys) -> list[str]:
        bare = {key: key.removeprefix(f"{model.base_model_prefix}.") for key in sorted(keys)}
        return [key for key, name in bare.items() if name.split(".")[0] in layers and ".pooler." not in f".{name}"]

    missing = of_layers(info["missing_keys"])
    unexpected = of_layers(info["unexpected_keys"])
    unexpected += sorted(key for key in info["unexpected_keys"] if WRAPPER_PREFIX.match(key))
    shapes = {key: (tuple(saved), tuple(wanted)) for key, saved, wanted in info["mismatched_keys"]}
    mismatched = of_layers(shapes) if other_heads else sorted(shapes)
    fault = None
    if mismatched:
        saved, wanted = shapes[mismatched[0]]
        fault = (
            f"has {len(mismatched)} weights whose shapes are not those of its config.json, such as {mismatched[0]}: "
            f"{saved} and not {wanted}"
        )
    elif missing:
        fault = f"lacks {len(missing)} weights of the model that its config.json describes, such as {missing[0]}"
    elif unexpected:
        fault = f"has {len(unexpected)} weights that its config.json has no place for, such as {unexpected[0]}"
    if fault:
        raise UserError(
            f"model_name_or_path: the checkpoint of {name_or_path} {fault}; save the whole model anew with "
            "save_pretrained, or correct its config.json"
        )


def describe_loading(name_or_path: str, info: dict) -> str | None:
    """A sentence on heads that are new, and on those that are left over; None where there are none."""

    def modules(keys) -> str:
        return ", ".join(sorted({key.rsplit(".", 1)[0] for key in keys}))

    parts = []
    if info["missing_keys"]:
        parts.append(f"has no weights for {modules(info['missing_keys'])}, which begin at random")
    if info["unexpected_keys"]:
        parts.append(f"has weights for {modules(info['unexpected_keys'])}, which are not used")
    return f"{name_or_path} " + ", and ".join(parts) if parts else None


def repair_generation_config(model: PreTrainedModel, name_or_path: str) -> str | None:
    """Make the generation config one that can be saved; a sentence for the log where something was changed.

    Many published models set `temperature` or `top_p` without `do_sample`. transformers loads them, and refuses to
    save them as soon as anything in the config has changed, which is at the first checkpoint.

    Raises:
        UserError: there is another fault in it.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not model.can_generate():
        return None
    if model.config.is_encoder_decoder and config.decoder_start_token_id is None:
        config.decoder_start_token_id = model.config.decoder_start_token_id  # `generate` does not look there
    try:
        config.validate(strict=True)
        return None
    except ValueError:
        sampled = config.do_sample
        config.do_sample = True
    try:
        config.validate(strict=True)
    except ValueError as error:
        config.do_sample = sampled
        raise UserError(
            f"generation_config.json of {name_or_path} cannot be saved again ({' '.join(str(error).split())[:300]}); "
            "correct it"
        ) from error
    return f"generation_config.json of {name_or_path} sets how to sample but not do_sample: it is saved with do_sample"


def print_on_main(sentence: str) -> None:
    """Print once, whatever the number of processes."""
    if os.environ.get("RANK", "0") == "0":
        print(sentence)


def load_config(name_or_path: str) -> PreTrainedConfig:
    """`AutoConfig.from_pretrained`, with one sentence when there is no such model."""
    check_model_folder(name_or_path)
    check_foreign_code(name_or_path)
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"model_name_or_path {name_or_path} cannot be loaded ({_reason(error)}); set it to a folder or a model of "
            "the Hub"
        ) from error


MAX_RANK = 65_536  # of an adapter
OWN_BASE = "base"  # the folder, inside that of an adapter, of a base model that is nowhere else
# How adapter_config.json names that folder. It holds no path of a machine, and because of the leading dot it is no
# valid name of a repository, so nothing ever asks the Hub for it.
OWN_BASE_PATH = f"./{OWN_BASE}"


def adapter_base(name_or_path: str) -> str | None:
    """The model that an adapter in this folder or on the Hub was trained on; None where there is no adapter.

    A base inside the adapter's folder is found there, wherever that was moved to. A relative path, which earlier
    versions wrote, is looked for in the working directory, then in the folders above the adapter.

    Raises:
        UserError: adapter_config.json cannot be read, or is that of no adapter; or the base is a folder that is not
            there. It is never looked up on the Hub, where the same name would be somebody else's model.
    """
    check_model_folder(name_or_path)
    try:
        file = find_adapter_config_file(name_or_path)
    except OSError:  # neither a folder nor a name that the Hub knows; `load_pretrained` says so
        return None
    if file is None:
        return None
    base = read_adapter_config(file)["base_model_name_or_path"]
    inside = Path(file).parent / OWN_BASE
    if Path(base).name == OWN_BASE and (inside / "config.json").is_file():
        return str(inside)
    if base == OWN_BASE_PATH:
        raise UserError(
            f"the base model of the adapter {name_or_path} is not in {inside}; copy it there from where the adapter "
            "was trained, or run the command of that run again"
        )
    path = os.path.expanduser(base)
    if os.path.isdir(path):
        return path
    if os.path.isdir(name_or_path) and not os.path.isabs(path):
        for parent in Path(name_or_path).resolve().parents:
            if (parent / base / "config.json").is_file():
                return str(parent / base)
    if _names_a_folder(base) or _trained_on_a_folder(name_or_path):
        raise UserError(
            f"the base model of the adapter {name_or_path}, the folder {base}, is not there; put it back, or set "
            "base_model_name_or_path in adapter_config.json to where it is"
        )
    return base


def _names_a_folder(base: str) -> bool:
    """Whether a base can be no repository of the Hub, which has at most one slash and begins with a letter or digit."""
    return base.startswith((".", "/", "~")) or base.count("/") > 1 or Path(base).name == OWN_BASE


def _trained_on_a_folder(adapter: str) -> bool:
    """Whether the lineage of an adapter says that its base was a local folder, of which the weights are listed."""
    try:
        parent = read_json(Path(adapter, "lineage.json"))["parent"]
        weights = parent["weights"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return "adapter_model.safetensors" not in weights  # whose own base may well be one of the Hub


def read_adapter_config(file: str | Path) -> dict:
    """The content of an adapter_config.json, with what is needed to load the adapter.

    Raises:
        UserError: it cannot be read, or a key is missing or impossible.
    """
    remedy = "restore it, or set another adapter"
    config = read_json_object(file, remedy)
    base, rank = config.get("base_model_name_or_path"), config.get("r", 1)
    if base is None or base == "":
        raise UserError(f"{file} names no base model, as the run that wrote it has not finished; run its command again")
    if not isinstance(base, str):
        raise UserError(f"{file}: base_model_name_or_path is {base!r}, not the name of a model; {remedy}")
    for key, kinds in (("peft_type", PeftType), ("task_type", TaskType)):
        known = [kind.value for kind in kinds]
        if config.get(key) not in (known if key == "peft_type" else [None, *known]):
            raise UserError(f"{file}: {key} is {config.get(key)!r}, which PEFT does not know; {remedy}")
    if config["peft_type"] != "LORA":
        # PEFT reads a tokenizer or a model for some of the others, without trust_remote_code=False.
        raise UserError(
            f"{file} is an adapter of type {config['peft_type']}, and only LORA is supported; set another adapter"
        )
    if not isinstance(rank, int) or not 0 < rank <= MAX_RANK:
        raise UserError(f"{file}: r is {rank!r}, not a rank from 1 to {MAX_RANK:,}; {remedy}")
    tokens = config.get("alora_invocation_tokens")
    if tokens is not None and not (isinstance(tokens, list) and all(type(token) is int for token in tokens)):
        raise UserError(f"{file}: alora_invocation_tokens is {tokens!r}, not a list of ids; {remedy}")
    return config


def findable(base: str) -> str:
    """What PEFT and transformers find from any working directory: a Hub name, or the absolute path of a folder."""
    path = os.path.expanduser(base)
    return os.path.abspath(path) if os.path.isdir(path) else base


def expect_own_base(model: PeftModel) -> None:
    """Before the adapter of `model` is saved: its base is to be saved by `save_own_base`, and is not there yet.

    PEFT reads the config of the base that an adapter names, and asks the Hub where it finds none. An empty name makes
    it do neither: what an interrupted run left behind has no say in what the next one saves.
    """
    model.peft_config["default"].base_model_name_or_path = ""


def save_own_base(base: PreTrainedModel, tokenizer, folder: str) -> None:
    """Save the base of an adapter inside its folder, such that `from_pretrained(folder)` finds it there for ever.

    transformers takes a folder that has an adapter and a config.json as a whole model with an adapter, and reads its
    weights from the files that the index names, relative to the folder: from any working directory, and after it moved.

    The adapter has to be in the folder already; its config then names the base by `OWN_BASE_PATH`. The base is complete
    or absent whenever this is interrupted, and a repeat writes all of it again.

    Raises:
        UserError: the disk is full, or cannot be written to.
    """
    own = Path(folder, OWN_BASE)
    with user_error_on_failed_write(folder, "the base model of the adapter"):
        shutil.rmtree(own, ignore_errors=True)  # of a run that was interrupted
        with staged_folder(own) as staged:
            base.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
        for name in ("config.json", "generation_config.json"):
            if (own / name).exists():
                shutil.copyfile(own / name, Path(folder, f"{name}.tmp"))
                os.replace(Path(folder, f"{name}.tmp"), Path(folder, name))
        weights: dict[str, str] = {}
        for file in sorted(own.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                weights |= dict.fromkeys(tensors.keys(), f"{OWN_BASE}/{file.name}")
        size = sum(file.stat().st_size for file in own.glob("*.safetensors"))
        index = {"metadata": {"total_size": size}, "weight_map": weights}
        write_json(Path(folder, "model.safetensors.index.json"), index)
        adapter = Path(folder, "adapter_config.json")
        config = json.loads(adapter.read_text(encoding="utf-8"))
        write_json(adapter, config | {"base_model_name_or_path": OWN_BASE_PATH})


def load_for_tuning(args, alone: bool = False, quiet: bool = False) -> PreTrainedModel | PeftModel:
    """The model that `AdapterArguments` name, with every weight that it has learned.

    Args:
        alone: in one process only, when training is over.
        quiet: do not print what was repaired; it was loaded before.

    An adapter is trained on where the run trains an adapter (TRL then keeps a frozen copy of it as the reference), and
    merged into its model where the run trains all weights. A second adapter beside it would leave the first behind.

    Raises:
        UserError: no such model, or the run asks for another adapter than the one that is there.
    """
    if alone:
        unset_hf_deepspeed_config()  # under ZeRO-3 this one process would wait for the others to load their shards
    name, options = args.model_name_or_path, {}
    if args.adapter == "qlora":  # Dettmers et al. 2023
        kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["quantization_config"] = BitsAndBytesConfig(**kind, bnb_4bit_compute_dtype=torch.bfloat16)
    base = adapter_base(name)
    model = load_pretrained(
        AutoModelForCausalLM, base or name, args.attn_implementation, quiet=alone or quiet, **options
    )
    if args.adapter != "none" and has_wrapper_prefix(base or name):
        raise UserError(
            f"the weights of {base or name} are named as in a wrapped model, so nobody could load an adapter onto it; "
            "save it anew from the model inside the wrapper, or set adapter: none"
        )
    if base is None:
        return model
    if is_deepspeed_zero3_enabled() and (
        args.adapter == "none" or PeftConfig.from_pretrained(name).trainable_token_indices
    ):
        raise UserError(f"{name} is an adapter that ZeRO-3 cannot read; merge it first with scripts/merge_adapter.py")
    model = load_adapter(model, name, is_trainable=args.adapter != "none")
    if args.adapter == "none":
        try:
            return model.merge_and_unload().requires_grad_(True)
        except (NotImplementedError, RuntimeError, ValueError) as error:  # kinds of adapters that cannot be merged
            raise UserError(
                f"the adapter {name} cannot be merged into its model ({_reason(error)}); set adapter to train it on"
            ) from error
    there = model.peft_config["default"]
    there.base_model_name_or_path = findable(base)  # where it is now
    asked = {
        "adapter": (args.adapter.replace("q", ""), "dora" if there.use_dora else f"{'rs' * there.use_rslora}lora"),
        "lora_r": (args.lora_r, there.r),
        "lora_alpha": (args.lora_alpha, there.lora_alpha),
        "lora_dropout": (args.lora_dropout, there.lora_dropout),
    }
    for key, (wanted, has) in asked.items():
        if wanted != has:
            raise UserError(
                f"{name} is an adapter with {key} {has}, not {wanted}; set {key} to {has} to train it on, or merge it "
                "first with scripts/merge_adapter.py"
            )
    # What new tokens have learned becomes part of the model too, which changes nothing here. But the reference that TRL
    # keeps takes these rows from the model, and only the rest from the adapter.
    for layer in (layer for layer in model.modules() if isinstance(layer, TrainableTokensLayer)):
        if not layer.tied_adapter:
            with torch.no_grad(), _gathered(layer.base_layer.weight):
                layer.base_layer.weight[layer.token_indices["default"]] = layer.trainable_tokens_delta["default"]
    return _with_bias(model)


def load_adapter(model: PreTrainedModel, name_or_path: str, is_trainable: bool = False) -> PeftModel:
    """`PeftModel.from_pretrained` for weights in .safetensors files; PEFT alone would read a pickle as well.

    Raises:
        UserError: the adapter is broken, belongs to another model, or is a pickle.
    """
    check_foreign_code(name_or_path, name_or_path)
    try:
        if not os.path.isdir(name_or_path):
            cached_file(name_or_path, ADAPTER_SAFE_WEIGHTS_NAME)  # raises where the Hub has a pickle alone
        return PeftModel.from_pretrained(model, name_or_path, is_trainable=is_trainable)
    except Exception as error:  # a dozen kinds, as of the model
        raise UserError(
            f"the adapter {name_or_path} cannot be loaded ({_reason(error)}); restore it, or set another"
        ) from error


def rows_of_tokens(model: PreTrainedModel, ids: list[int]) -> dict[str, list[int]] | None:
    """`LoraConfig(trainable_token_indices=...)` for tokens that are new: their rows in every table that is not tied.

    PEFT alone would train those of the input only, and new tokens would stay equally likely for ever.

    Raises:
        UserError: under ZeRO-3, where PEFT does not find these rows in the shards.
    """
    if ids and is_deepspeed_zero3_enabled():
        raise UserError("ZeRO-3 cannot train an adapter for a model without chat tokens; use ds_configs/zero2.yaml")
    tables = {id(table.weight): table for table in (model.get_output_embeddings(), model.get_input_embeddings())}
    return {name: ids for name, module in model.named_modules() if module in tables.values()} if ids else None


def add_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """`get_peft_model`, with one sentence where there are no such modules to adapt.

    Raises:
        UserError: lora_target_modules names none of the model's linear layers, its output head, or what is trained in
            full.
    """
    if config.target_modules != "all-linear":
        config.target_modules = set(config.target_modules.split(","))
        if whole := config.target_modules & {name.split(".")[-1] for name in config.modules_to_save or ()}:
            raise UserError(f"lora_target_modules: all of {min(whole)}, a new head, is trained; leave it out")
    output = model.get_output_embeddings()
    head = next((name for name, module in model.named_modules() if output is not None and module is output), None)
    if head and head.split(".")[-1] in config.target_modules:
        raise UserError(f"lora_target_modules: TRL's loss would pass an adapter of {head} by; leave it out")
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"lora_target_modules: {_reason(error)}; all-linear fits any model") from error
    adapted.peft_config["default"].base_model_name_or_path = findable(model.name_or_path)
    return _with_bias(adapted)


def _with_bias(model: PeftModel) -> PeftModel:
    """TRL's loss asks the output head for its bias, which PEFT does not pass on from a head with new tokens."""
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.bias = head.original_module.bias
    return model


def _reason(error: Exception) -> str:
    """The first sentence of a long complaint."""
    return re.split(r"\.\s|\n", str(error).strip() or type(error).__name__)[0].rstrip(".: ")[:300]


def readable_by_all(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's tensors under names that PEFT and `AutoModel` both read.

    Under the name that PEFT writes, transformers 5.23 does not find DoRA's magnitudes, and loads it without them.
    """
    return {re.sub("lora_magnitude_vector$", r"\g<0>.weight", name): tensor for name, tensor in adapter.items()}


def reload(auto_class, folder: str, trained: torch.nn.Module | None = None) -> PreTrainedModel | PeftModel:
    """Load what was just saved, as its users will, and make sure that it is all there. For when training is over.

    Raises:
        RuntimeError: a weight is missing, or is not the one that was trained, bit for bit.
    """
    unset_hf_deepspeed_config()  # under ZeRO-3 this one process would wait for the others to load their shards
    base = adapter_base(folder)
    check_foreign_code(base or folder, base or folder)
    model, info = auto_class.from_pretrained(
        base or folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True, trust_remote_code=False
    )
    wrong = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    if base:
        model = load_adapter(model, folder)
        model.peft_config["default"].base_model_name_or_path = findable(base)  # where it is now
        saved = readable_by_all(load_file(os.path.join(folder, "adapter_model.safetensors")))
        expected = readable_by_all(get_peft_model_state_dict(model))
        wrong += [name for name in expected if name not in saved or saved[name].shape != expected[name].shape]
    found = dict(model.named_parameters())
    for name, weight in trained.named_parameters() if trained is not None else ():
        if weight.requires_grad and weight.numel():  # ZeRO-3 leaves nothing to compare with
            same = name in found and torch.equal(found[name], weight.detach().cpu().float())
            wrong += [] if same else [name]
    if wrong:
        raise RuntimeError(f"{folder} is not what was trained: {wrong[:3]} and {max(len(wrong) - 3, 0)} more differ")
    return model.eval()
