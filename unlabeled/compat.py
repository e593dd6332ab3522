"""Every use of a private or undocumented part of a library, with the reason why no public one does the job.

Names with a leading underscore, and importable names that no documentation mentions, may change in any release. They
are used through the functions below only, and private methods that subclasses override are listed in
`OVERRIDDEN_METHODS`. `tests/test_compat.py` fails if a release changes one of them, and if another private name is used
anywhere in the package, the recipes or the scripts.

Versions are those in which a name is known to exist; "by" marks the version in which it was first checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn
    from transformers import PreTrainedConfig, Trainer


# --- transformers -----------------------------------------------------------------------------------------------------


def attention_implementation(config: PreTrainedConfig) -> str:
    """The attention implementation that a model's configuration was loaded with, such as "sdpa".

    `attn_implementation` is a public argument of `from_pretrained`, but it can be read back only from this private
    property. Since transformers 4.36.
    """
    return config._attn_implementation


def has_model_class(auto_class: type[Any], config: PreTrainedConfig) -> bool:
    """Whether an auto class has a model for this kind of configuration.

    Without it, the answer is a `ValueError` of `from_pretrained`, after the weights were downloaded, whose message
    lists all configurations. Since transformers 4.0.
    """
    return type(config) in auto_class._model_mapping


def has_loaded_adapter(model: nn.Module) -> bool:
    """Whether a model got a PEFT adapter from transformers itself (`load_adapter`, `add_adapter`).

    `active_adapters()` raises for models without adapters instead of returning an empty list. Since transformers 4.33.
    """
    return getattr(model, "_hf_peft_config_loaded", False)


def without_zero3_sharding() -> AbstractContextManager[None]:
    """A context in which transformers does not shard a new model, although ZeRO-3 is configured.

    transformers uses it for models inside models. There is no other way to create a whole model under ZeRO-3. By
    transformers 5.23.
    """
    from transformers.modeling_utils import set_zero3_state

    return set_zero3_state()


def forget_deepspeed_config() -> None:
    """Let models be loaded whole from now on, although the run used ZeRO-3.

    transformers keeps DeepSpeed's configuration in a global variable, which has no documented way to unset it. Since
    transformers 4.10.
    """
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def find_adapter_config(name_or_path: str) -> str | None:
    """The path of an adapter's adapter_config.json, downloaded if necessary; None if there is no adapter.

    `PeftConfig.from_pretrained` cannot tell a model without adapter from a failed download. Since transformers 4.33.

    Raises:
        OSError: there is no such folder and no such repository.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    return find_adapter_config_file(name_or_path)


def render_with_generation_regions(
    conversation: list[dict], chat_template: str, tools: list[dict] | None, variables: dict[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """Render a chat template, and find the text between its `{% generation %}` markers.

    `apply_chat_template` returns these regions as a mask of tokens only, which depends on how a tokenizer splits the
    text. Since transformers 4.54.

    Args:
        conversation: messages.
        chat_template: source of the template.
        tools: JSON schemas of tools.
        variables: further variables of the template, such as special tokens.

    Returns:
        The text, and the first character and the end of each region.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    [text], [regions] = render_jinja_template(
        conversations=[conversation],
        tools=tools,
        chat_template=chat_template,
        return_assistant_tokens_mask=True,
        **variables,
    )
    return text, [tuple(region) for region in regions]


def is_generic_classifier(model: nn.Module) -> bool:
    """Whether a sequence classifier reads the last token, as all do that share transformers' generic head.

    No attribute or configuration says which token a head reads. By transformers 5.23.
    """
    from transformers.modeling_layers import GenericForSequenceClassification

    return isinstance(model, GenericForSequenceClassification)


def prepare_inputs(trainer: Trainer, batch: dict[str, Any]) -> dict[str, Any]:
    """Move a batch to the trainer's device, in the dtype that DeepSpeed expects.

    The public `send_to_device` does not know about DeepSpeed's dtype. Since transformers 3.0.
    """
    return trainer._prepare_inputs(batch)


def running_loss(trainer: Trainer) -> torch.Tensor:
    """The sum of the losses since the last log: a scalar, which may be changed in place.

    A step that is left out must not count in the logged loss, and callbacks are called too late to change it. By
    transformers 5.23.
    """
    return trainer._tr_loss


# --- accelerate -------------------------------------------------------------------------------------------------------


def has_prepared_model(accelerator: Accelerator) -> bool:
    """Whether a model was prepared for training, and so wrapped, compiled or given to DeepSpeed already.

    To prepare it twice would wrap it twice, and no public attribute tells. Since accelerate 0.13.
    """
    return bool(accelerator._models)


# --- TRL --------------------------------------------------------------------------------------------------------------


def restore_token_count(trainer: Trainer, tokens: int) -> None:
    """Let TRL continue to count training tokens from `tokens`, in a resumed run.

    TRL keeps the count in this attribute only, which is in no checkpoint. Other trainers do not count. By TRL 1.16.
    """
    if hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = tokens


def clear_eval_metrics(trainer: Trainer) -> None:
    """Drop the evaluation metrics that TRL would add to the next log entry.

    They are means over batches, and there is no public way to leave them out. Since TRL 0.13.
    """
    trainer._metrics["eval"].clear()


# --- PEFT -------------------------------------------------------------------------------------------------------------


def trainable_token_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of an adapter that train rows of an embedding (`LoraConfig(trainable_token_indices=...)`).

    They have `base_layer`, `token_indices`, `trainable_tokens_delta` and `tied_adapter`. PEFT documents the option, not
    the layers, and has no way to write the rows to the base model without merging. Since PEFT 0.15.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            yield module


def is_trainable_tokens_wrapper(module: nn.Module | None) -> bool:
    """Whether PEFT has replaced this module by a wrapper that trains rows of it; it has `original_module`.

    The wrapper does not pass on the attribute `bias`. Since PEFT 0.15.
    """
    from peft.utils.other import TrainableTokensWrapper

    return isinstance(module, TrainableTokensWrapper)


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def lerp_all(tensors: Sequence[torch.Tensor], ends: Sequence[torch.Tensor], weight: float) -> list[torch.Tensor]:
    """tensor + weight (end - tensor) for each pair, in few kernels; see `torch.lerp`. Since PyTorch 2.1.

    PyTorch's own optimizers use these functions for lists of tensors, of which it documents only some.
    """
    import torch

    return list(torch._foreach_lerp(tensors, ends, weight))


def lerp_all_(tensors: Sequence[torch.Tensor], ends: Sequence[torch.Tensor], weight: float) -> None:
    """`lerp_all` in place."""
    import torch

    torch._foreach_lerp_(tensors, ends, weight)


def mul_all_(tensors: Sequence[torch.Tensor], factor: float) -> None:
    """Multiply each tensor by a number in place, in few kernels; see `lerp_all`. Since PyTorch 1.7."""
    import torch

    torch._foreach_mul_(tensors, factor)


def add_all_(tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor], alpha: float) -> None:
    """Add `alpha` times another tensor to each tensor in place, in few kernels; see `lerp_all`. Since PyTorch 1.7."""
    import torch

    torch._foreach_add_(tensors, others, alpha=alpha)


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter, also if ZeRO-3 has replaced it by a flat shard.

    DeepSpeed documents only how to gather the parameter. Since DeepSpeed 0.3.
    """
    return getattr(parameter, "ds_shape", parameter.shape)


def whole_numel(parameter: torch.Tensor) -> int:
    """The number of values of a parameter, also if ZeRO-3 has replaced it by a flat shard; see `whole_shape`."""
    return getattr(parameter, "ds_numel", parameter.numel())


# --- Private methods that are overridden ------------------------------------------------------------------------------


class OverriddenMethod(NamedTuple):
    """A private method of a library that a class of this package overrides."""

    library_class: str  # "module:Class"
    method: str
    parameters: tuple[str, ...]  # its signature, without self
    override: str  # the class of this package, "module:Class"
    reason: str


TRAINER = "transformers.trainer:Trainer"
SAVING = "unlabeled.training.saving:SavingMixin"
PUSHING = "unlabeled.hub.trainer_mixin:PushMixin"

OVERRIDDEN_METHODS = (
    OverriddenMethod(
        TRAINER,
        "_save",
        ("output_dir", "state_dict"),
        SAVING,
        "DeepSpeed's copies of tied weights are left out, and files that may contain secrets are removed.",
    ),
    OverriddenMethod(
        TRAINER,
        "_save_checkpoint",
        ("model", "trial"),
        SAVING,
        "A checkpoint is written to a staging folder and renamed, so that it is complete or absent.",
    ),
    OverriddenMethod(
        TRAINER,
        "_get_output_dir",
        ("trial",),
        SAVING,
        "The folder that `_save_checkpoint` writes to is the staging folder.",
    ),
    OverriddenMethod(
        TRAINER,
        "_load_rng_state",
        ("checkpoint",),
        SAVING,
        "A checkpoint of another number of processes has no random state for each of them.",
    ),
    OverriddenMethod(
        TRAINER,
        "_get_grad_norm",
        ("model", "grad_norm"),
        "unlabeled.training.trainer:ExactTrainerMixin",
        "It is called between the backward pass and the optimizer step, the only moment to leave a step out.",
    ),
    OverriddenMethod(
        TRAINER,
        "_push_from_checkpoint",
        ("checkpoint_folder",),
        PUSHING,
        "Trainer pushes a checkpoint before it is complete, and ignores failures.",
    ),
    OverriddenMethod(
        TRAINER,
        "_finish_current_push",
        (),
        PUSHING,
        "Pushes in the background are ours, and Trainer has to wait for them at the end.",
    ),
    OverriddenMethod(
        "sentence_transformers.base.trainer:BaseTrainer",
        "_save",
        ("output_dir", "state_dict"),
        "unlabeled.training.embedding:ExactSentenceTransformerTrainer",
        "It is called in every process, and each would write the same files.",
    ),
    OverriddenMethod(
        "trl:DPOTrainer",
        "_prepare_dataset",
        ("dataset", "processing_class", "args", "dataset_name"),
        "unlabeled.training.dpo:ExactDPOTrainer",
        "Pairs are tokenized already, with the beginning of answers that TRL's tokenization can lose.",
    ),
)
