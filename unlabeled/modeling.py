"""A model from scratch, continued or with an adapter, and loaded again as it was saved."""

import json
import os
import re
import warnings
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.modeling_utils import set_zero3_state
from transformers.utils.logging import disable_progress_bar
from transformers.utils.peft_utils import find_adapter_config_file

from unlabeled import UserError

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
    overrides.setdefault("vocab_size", len(tokenizer))
    if overrides["vocab_size"] < len(tokenizer):
        raise UserError(
            f"config_overrides: vocab_size {overrides['vocab_size']} is smaller than the tokenizer's {len(tokenizer)}; "
            "remove it"
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
    if len(tokenizer) <= before:
        return False
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
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
            return auto_class.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation)
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


def load_pretrained(auto_class, name_or_path: str, attn_implementation: str, **options) -> PreTrainedModel:
    """`auto_class.from_pretrained` in float32 (master weights), with one sentence when there is no such model."""
    disable_progress_bar()  # loading takes less time than it takes to read of it
    if name_or_path.startswith((".", "/", "~")) and not os.path.isdir(name_or_path):
        raise UserError(f"model_name_or_path: there is no folder {name_or_path}; correct the path")
    try:
        options |= {"dtype": torch.float32, "attn_implementation": attn_implementation}
        return auto_class.from_pretrained(name_or_path, use_safetensors=True, **options)  # a pickle may be a program
    except Exception as error:  # a dozen kinds, among them that of a broken .safetensors
        raise UserError(
            f"model_name_or_path {name_or_path} cannot be loaded ({_reason(error)}); set it to a folder or a model of "
            "the Hub that this objective can continue"
        ) from error


def load_config(name_or_path: str) -> PreTrainedConfig:
    """`AutoConfig.from_pretrained`, with one sentence when there is no such model."""
    try:
        return AutoConfig.from_pretrained(name_or_path)
    except Exception as error:
        raise UserError(
            f"model_name_or_path {name_or_path} cannot be loaded ({_reason(error)}); set it to a folder or a model of "
            "the Hub"
        ) from error


def adapter_base(name_or_path: str) -> str | None:
    """The model that an adapter in this folder or on the Hub was trained on; None where there is no adapter."""
    try:
        file = find_adapter_config_file(name_or_path)
    except OSError:  # neither a folder nor a name that the Hub knows; `load_pretrained` says so
        return None
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]


def load_for_tuning(args, alone: bool = False) -> PreTrainedModel | PeftModel:
    """The model that `AdapterArguments` name, with every weight that it has learned.

    `alone`: in one process only, when training is over.

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
    model = load_pretrained(AutoModelForCausalLM, base or name, args.attn_implementation, **options)
    if base is None:
        return model
    if is_deepspeed_zero3_enabled() and (
        args.adapter == "none" or PeftConfig.from_pretrained(name).trainable_token_indices
    ):
        raise UserError(f"{name} is an adapter that ZeRO-3 cannot read; merge it first with scripts/merge_adapter.py")
    model = PeftModel.from_pretrained(model, name, is_trainable=args.adapter != "none")
    if args.adapter == "none":
        return model.merge_and_unload().requires_grad_(True)
    there = model.peft_config["default"]
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
        return _with_bias(get_peft_model(model, config))
    except ValueError as error:
        raise UserError(f"lora_target_modules: {_reason(error)}; all-linear fits any model") from error


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
    model, info = auto_class.from_pretrained(base or folder, dtype=torch.float32, output_loading_info=True)
    wrong = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    if base:
        model = PeftModel.from_pretrained(model, folder)
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
