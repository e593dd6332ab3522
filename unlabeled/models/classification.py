"""Models with a head for classes, tags or numbers, and what is checked of them before training."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from unlabeled import compat
from unlabeled.config import AdapterArguments, DownstreamArguments
from unlabeled.data.labeled_rows import LabeledSplit
from unlabeled.data.labels import Task
from unlabeled.errors import UserError
from unlabeled.models.adapter_files import adapter_base
from unlabeled.models.adapters import add_lora_adapter
from unlabeled.models.configs import load_config
from unlabeled.models.loading import load_with_info
from unlabeled.models.vocabulary import fit_to_tokenizer


def load_classifier(
    auto_class: type,
    model_args: AdapterArguments,
    training_args: DownstreamArguments,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    is_causal: bool | None = None,
) -> tuple[PreTrainedModel, dict[str, bool]]:
    """A model with a head for the labels of a task, with all its weights or an adapter to train.

    Args:
        auto_class: `AutoModelForSequenceClassification` or `AutoModelForTokenClassification`.
        model_args: names the model and describes the adapter.
        training_args: for `max_length` and `seed`.
        tokenizer: of the model.
        task: the labels.
        is_causal: overrides whether a token sees only those before it, where it is not None.

    Returns:
        the model in float32, and the modules that are trained in full whether or not there is an adapter:
        {name: whether it is initialized at random}.

    Raises:
        UserError: as `load_with_new_head` does, or the adapter does not fit the model.
    """

    def load() -> tuple[PreTrainedModel, dict[str, bool]]:
        model, heads = load_with_new_head(auto_class, model_args, task, tokenizer, is_causal)
        fit_to_tokenizer(model, tokenizer, training_args.max_length)
        return model, heads

    def rebuild_base() -> PreTrainedModel:
        set_seed(training_args.seed)  # the new head is initialized as it was when training began
        return load()[0]

    model, heads = load()
    task_type = "TOKEN_CLS" if task.words else "SEQ_CLS"
    model = add_lora_adapter(model, model_args, task_type, modules_to_save=list(heads), rebuild_base=rebuild_base)
    return model, heads


def load_with_new_head(
    auto_class, args, task: Task, tokenizer, is_causal: bool | None
) -> tuple[PreTrainedModel, dict[str, bool]]:
    """The model that the arguments name, with a head for the labels of a task.

    A checkpoint that has a head for as many labels is continued with it.

    Args:
        auto_class: `AutoModelForSequenceClassification` or `AutoModelForTokenClassification`.
        args: `AdapterArguments`.
        is_causal: overrides whether a token sees only those before it, where it is not None.

    Returns:
        the model with weights in float32, and the modules that are trained in full, as they belong to the head or are
        not in the checkpoint: {name: whether it is initialized at random}.

    Raises:
        UserError: there is no such model or head, or the combination would not be exact.
    """
    name = args.model_name_or_path
    if is_deepspeed_zero3_enabled():
        raise UserError("ZeRO-3 would draw a new head in shards, another one for each number of processes; use ZeRO-2")
    if args.adapter == "qlora":
        raise UserError("adapter: qlora would quantize the new head as well; set it to lora")
    if adapter_base(name):
        raise UserError(f"model_name_or_path {name} is an adapter; merge it first with scripts/merge_adapter.py")
    config = load_config(name)
    if not compat.has_model_class(auto_class, config):
        kind = auto_class.__name__.removeprefix("AutoModelFor")
        raise UserError(f"transformers has no model for {kind} of model_type {config.model_type}; choose another model")
    if is_causal is not None:
        if config.is_encoder_decoder:
            raise UserError("is_causal is for models of one stack; remove it for an encoder-decoder")
        config.is_causal = is_causal
    config.update(task.config | {"pad_token_id": tokenizer.pad_token_id})
    model, info = load_with_info(auto_class, name, args.attn_implementation, other_heads=True, config=config)
    new_weights = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    heads = {}
    for name, module in model.named_children():
        if name != model.base_model_prefix and list(module.parameters()):
            heads[name] = any(key.split(".")[0] == name for key in new_weights)
    # What else the checkpoint did not have, such as BERT's pooler.
    others = {key.rsplit(".", 1)[0] for key in new_weights if key.split(".")[0] not in heads}
    return model, heads | dict.fromkeys(sorted(others), True)


def describe_heads(heads: dict[str, bool]) -> str:
    """A line for the plan: which modules are new, and which the checkpoint had."""
    new = [name for name, is_new in heads.items() if is_new]
    continued = [name for name, is_new in heads.items() if not is_new]
    parts = []
    if new:
        parts.append(f"new: {', '.join(new)}")
    if continued:
        parts.append(f"continued: {', '.join(continued)}")
    return "; ".join(parts)


@torch.no_grad()
def check_direction(model, is_causal: bool | None) -> str:
    """Measure whether a token sees those after it, and return a line for the plan.

    Raises:
        UserError: the architecture does not do what `is_causal` says.
    """
    if model.config.is_encoder_decoder:
        return "bidirectional in the encoder"
    ids = torch.tensor([[7, 8, 9, 10], [7, 8, 9, 11]], device=model.device) % model.config.vocab_size
    states = model.eval().base_model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    is_bidirectional = bool((states[0, :3] - states[1, :3]).abs().max() > 1e-6)
    if is_causal is not None and is_bidirectional is is_causal:
        raise UserError(f"{type(model).__name__} does not honour is_causal: {str(is_causal).lower()}; remove the key")
    return "bidirectional" if is_bidirectional else "causal (is_causal: false makes it bidirectional)"


def describe_pooling(model) -> str:
    """What of a text the head of a stock model for sequence classification reads."""
    config = model.config
    if config.is_encoder_decoder:
        return "the decoder's state at the end token"
    if compat.is_generic_classifier(model) or hasattr(model, "score"):
        return "the last token that is no padding"
    pooling = getattr(config, "classifier_pooling", None)
    return {"mean": "the mean of the tokens", "late": "the mean of the tokens' scores"}.get(pooling, "the first token")


def reads_type_ids(model) -> bool:
    """Whether the model has an embedding of token types. GPT-2 takes `token_type_ids` too, but adds word vectors."""
    return (getattr(model.config, "type_vocab_size", None) or 0) > 1


def check_end_tokens(model, splits: dict[str, LabeledSplit], name: str) -> None:
    """Heads of encoder-decoders read the state at the end token, of which each text needs exactly one."""
    eos = model.config.eos_token_id
    rows = [row["input_ids"] for split in splits.values() for row in split.rows]
    if model.config.is_encoder_decoder and any((row == eos).sum() != 1 or row[-1] != eos for row in rows):
        raise UserError(f"the tokenizer of {name} does not end each text with its end token, which the head reads")
