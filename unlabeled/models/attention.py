"""Isolation of packed documents: attention by document lengths, and a check that documents cannot see each other.

Documents that share a row are kept apart by block masks, or by their lengths. A mask costs memory and time with the
square of the row's length. Attention that is given the documents' lengths (`flash_attention_2` and its successors, or
`varlen`, PyTorch's built-in variable-length flash attention) computes nothing between documents; its batches are one
long row, see `DataCollatorForPackedLanguageModeling(flat=True)`.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from unlabeled import compat
from unlabeled.data.collators import DataCollatorForPackedLanguageModeling
from unlabeled.errors import UserError

VARLEN = "varlen"
# Largest difference of two logits that should be equal, relative to the largest logit or to 1. Kernels differ in
# rounding with the length of a row; a leak is larger by orders of magnitude.
ISOLATION_TOLERANCE = 1e-3


def needs_flat_batches(config: PreTrainedConfig) -> bool:
    """Whether a model's attention reads the lengths of documents instead of masks, and so needs flat batches."""
    implementation = compat.attention_implementation(config)
    return implementation == VARLEN or "flash" in implementation


def attention_autocast(model: PreTrainedModel) -> torch.autocast:
    """The autocast to call a model in outside training: flash attention on a GPU does not support float32."""
    device_type = model.device.type
    enabled = needs_flat_batches(model.config) and device_type != "cpu"
    return torch.autocast(device_type, torch.bfloat16, enabled=enabled)


# --- Attention by document lengths ------------------------------------------------------------------------------------


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`attn_implementation: varlen`: PyTorch's built-in variable-length flash attention.

    On a GPU this is `torch.nn.attention.varlen`, in half precision; on a CPU documents are computed one at a time.

    Args:
        module: the attention layer; its `is_causal` is used if the argument is None.
        query: (1, heads, tokens, head_dim).
        key: (1, key heads, tokens, head_dim); the number of heads is a multiple of the number of key heads.
        value: as `key`.
        attention_mask: has to be None.
        scaling: factor of the scores; 1 / sqrt(head_dim) if it is None.
        dropout: has to be 0.
        is_causal: a token attends only to those before it and itself.
        sliding_window: a token attends only to tokens less than this far away, as transformers counts for flash
            attention.
        cu_seq_lens_q: int32 (documents + 1,), the start of each document and the end of the last one; empty documents
            may follow. None if there is only one document.
        max_length_q: an upper bound of the documents' lengths in tokens.
        kwargs: further arguments of attention functions, which are not used.

    Returns:
        (1, tokens, heads, head_dim), and None for the attention weights.

    Raises:
        UserError: dropout, float32 on a GPU, or rows that are not flat: with a mask, padded, or continued from a cache.
    """
    if dropout:
        raise UserError("attn_implementation varlen has no dropout; set attention dropout to 0 in config_overrides")
    if attention_mask is not None or len(query) > 1 or query.shape[2] != key.shape[2]:
        raise UserError("attn_implementation varlen reads flat batches of packed rows only; set it to sdpa")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    device_type = query.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else query.dtype
    if device_type == "cuda" and dtype == torch.float32:
        raise UserError("attn_implementation varlen has no float32 on a GPU; set precision to bf16")
    if cu_seq_lens_q is None:
        max_length_q = query.shape[2]
        cu_seq_lens_q = torch.tensor([0, max_length_q], dtype=torch.int32, device=query.device)
    window = -1 if sliding_window is None else sliding_window - 1
    attend = varlen_attn if device_type == "cuda" else attend_by_document
    output = attend(
        query[0].transpose(0, 1).to(dtype),
        key[0].transpose(0, 1).to(dtype),
        value[0].transpose(0, 1).to(dtype),
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(window, 0 if is_causal else window),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None], None


@torch.compiler.disable
def attend_by_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """`torch.nn.attention.varlen.varlen_attn` for devices without such a kernel: (tokens, heads, head_dim)."""
    outputs = []
    left, right = window_size
    for start, end in pairwise(cu_seq_q.unique().tolist()):
        length = end - start
        mask = None
        if -1 < left < length - 1:
            distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
            mask = ((distance >= -left) & (distance <= right)).to(query.device)
        output = F.scaled_dot_product_attention(
            query[start:end].transpose(0, 1)[None],
            key[start:end].transpose(0, 1)[None],
            value[start:end].transpose(0, 1)[None],
            mask,
            is_causal=right == 0 and mask is None,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


# No mask function is registered for it. So transformers makes no masks, and does not search the positions for document
# boundaries, for which the main thread would wait for the GPU.
AttentionInterface.register(VARLEN, varlen_attention)


# --- Masks ------------------------------------------------------------------------------------------------------------


def sliding_window(config: PreTrainedConfig) -> int | None:
    """How far the sliding layers of a bidirectional model see to each side, in tokens; None without such layers."""
    layers = getattr(config, "layer_types", None) or []
    return config.sliding_window if "sliding_attention" in layers else None


def separate_cross_attention_mask(model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook that gives an encoder-decoder a mask of its own for cross-attention.

    Register it with `model.register_forward_pre_hook(separate_cross_attention_mask, with_kwargs=True)`.

    Encoder-decoders take one mask for the encoder and for cross-attention. With packed documents these differ, as
    inputs and targets have different lengths. If the batch has a `cross_attention_mask`, the encoder runs first, with
    the encoder's mask.
    """
    cross_attention_mask = kwargs.pop("cross_attention_mask", None)
    if cross_attention_mask is not None:
        input_ids = kwargs.pop("input_ids")
        encoder_mask = kwargs.pop("attention_mask")
        kwargs["encoder_outputs"] = model.get_encoder()(input_ids=input_ids, attention_mask=encoder_mask)
        kwargs["attention_mask"] = cross_attention_mask
    return args, kwargs


# --- Check ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_isolation(model: PreTrainedModel, collator: DataCollatorForPackedLanguageModeling) -> str:
    """Check on the model itself that packed documents do not see each other.

    Two documents share a row. If one of them changes, the logits of the other have to stay the same, in both
    directions, and the second document has to give the logits that it gives alone. There the model counts its own
    positions, which do not start at 0 in RoBERTa. Attention implementations differ in which masks they honour, so this
    is tested before every run.

    Args:
        model: on the device and with the attention implementation of the run.
        collator: of the run.

    Returns:
        A line for the run plan.

    Raises:
        UserError: documents see each other, or the model cannot read packed documents.
    """
    if not collator.isolate_documents:
        return "off: documents in one row see each other (isolate_documents)"
    if is_deepspeed_zero3_enabled():
        return "by position_ids and block masks; not checked here, the weights are sharded"
    was_training = model.training
    model.eval()
    try:
        leaks, largest_logit = _isolation_differences(model, collator)
    except Exception as error:  # architectures without position_ids or with other masks raise anything
        reason = f"{type(error).__name__}: {str(error).strip()[:200]}".splitlines()[0]
        raise UserError(
            f"{type(model).__name__} cannot read packed documents ({reason}); choose another model_type"
        ) from error
    model.train(was_training)
    for leak, difference in leaks.items():
        if difference > ISOLATION_TOLERANCE * max(1.0, largest_logit):
            raise UserError(
                f"{type(model).__name__} with attn_implementation {compat.attention_implementation(model.config)} "
                f"leaks between packed documents ({leak}); set attn_implementation to sdpa, or isolate_documents to "
                "false"
            )
    return "checked: packed documents do not see each other"


def _isolation_differences(
    model: PreTrainedModel, collator: DataCollatorForPackedLanguageModeling
) -> tuple[dict[str, float], float]:
    """The largest difference of logits for each kind of leak, and the largest logit."""
    first, other_first, second, other_second = _random_documents(collator)
    both = _probe_logits(model, collator, first, second)
    half = len(both) // 2
    with_other_second = _probe_logits(model, collator, first, other_second)
    with_other_first = _probe_logits(model, collator, other_first, second)
    alone = _probe_logits(model, collator, second, bare=True)
    leaks = {
        "the first document sees the second": both[:half] - with_other_second[:half],
        "the second document sees the first": both[half:] - with_other_first[half:],
        "a packed document differs from the same document alone": both[half:] - alone,
    }
    return {leak: float(difference.abs().max()) for leak, difference in leaks.items()}, float(both.abs().max())


def _random_documents(collator: DataCollatorForPackedLanguageModeling) -> np.ndarray:
    """Four documents of random ordinary tokens: int64 (4, tokens)."""
    ordinary = np.setdiff1d(np.arange(len(collator.tokenizer)), collator.tokenizer.all_special_ids)
    size = min(collator.max_length // 2, collator.probe_tokens)
    return np.random.default_rng(0).choice(ordinary, (4, size))


def _probe_logits(
    model: PreTrainedModel,
    collator: DataCollatorForPackedLanguageModeling,
    *documents: np.ndarray,
    bare: bool = False,
) -> torch.Tensor:
    """Logits of documents in one row, float32 (tokens, vocabulary); `bare`, without positions and masks."""
    batch = send_to_device(collator.probe(documents, bare), model.device)
    with attention_autocast(model):
        return model(**batch).logits[0].float().cpu()
