"""Who sees whom: documents that share a row are kept apart by masks or by their lengths, and each run tries it out.

A mask of a row costs memory and time with the square of its length, also where it says no. Attention that is told the
lengths of the documents instead (`flash_attention_2` and its successors, or `varlen`, torch's own) computes nothing
between them; for it a batch is one long row (`DataCollatorForPackedLanguageModeling(flat=True)`).
"""

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from unlabeled.errors import UserError

VARLEN = "varlen"


def takes_lengths(config: PreTrainedConfig) -> bool:
    """Whether a model's attention is told the lengths of the documents, and so wants flat batches without masks."""
    return config._attn_implementation == VARLEN or "flash" in config._attn_implementation


def precision_of_attention(model) -> torch.autocast:
    """What a model has to be called under outside training: on a GPU there is no flash attention in float32."""
    kind = model.device.type
    return torch.autocast(kind, torch.bfloat16, enabled=takes_lengths(model.config) and kind != "cpu")


def varlen_attention(
    module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, is_causal=None, sliding_window=None,
    cu_seq_lens_q=None, max_length_q=None, **kwargs,
):  # fmt: skip
    """`attn_implementation: varlen`: flash attention over documents of different lengths, which torch brings along.

    On a GPU by `torch.nn.attention.varlen`, in half precision; on a CPU document by document.

    Args:
        query, key, value: (1, heads, tokens, head_dim), key and value with as many heads or a divisor of them.
        sliding_window: a token sees those less than this far away (as flash attention counts in transformers).
        cu_seq_lens_q: int32 (documents + 1,), where documents begin, and the end; empty ones may follow. None where
            there is but one.
        max_length_q: at least the tokens of the longest document.

    Returns:
        (1, tokens, heads, head_dim) and None, for attention weights.

    Raises:
        UserError: attention with dropout, in float32 on a GPU, or over rows that are not flat: with a mask, padded, or
            continued from a cache.
    """
    if dropout:
        raise UserError("attn_implementation varlen has no dropout; set attention dropout to 0 in config_overrides")
    if attention_mask is not None or len(query) > 1 or query.shape[2] != key.shape[2]:
        raise UserError("attn_implementation varlen reads flat batches of packed rows only; set it to sdpa")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    device = query.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    if device == "cuda" and kind == torch.float32:
        raise UserError("attn_implementation varlen has no float32 on a GPU; set precision to bf16")
    if cu_seq_lens_q is None:
        max_length_q = query.shape[2]
        cu_seq_lens_q = torch.tensor([0, max_length_q], dtype=torch.int32, device=query.device)
    back = -1 if sliding_window is None else sliding_window - 1
    out = (varlen_attn if device == "cuda" else _one_by_one)(
        *(x[0].transpose(0, 1).to(kind) for x in (query, key, value)),
        cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
        scale=scaling, window_size=(back, 0 if causal else back), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out[None], None


@torch.compiler.disable
def _one_by_one(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """`varlen_attn` where there is no such kernel."""
    found, (left, right) = [], window_size
    for start, end in pairwise(cu_seq_q.unique().tolist()):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        mask, length = None, end - start
        if -1 < left < length - 1:
            ahead = torch.arange(length)[None, :] - torch.arange(length)[:, None]
            mask = ((ahead >= -left) & (ahead <= right)).to(q.device)
        causal = right == 0 and mask is None
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=enable_gqa)
        found.append(out[0].transpose(0, 1))
    return torch.cat(found)


# Without a function for its masks transformers makes none, nor looks into the positions for documents, for which the
# main thread would wait for the GPU.
AttentionInterface.register(VARLEN, varlen_attention)


def sliding_window(config: PreTrainedConfig) -> int | None:
    """The distance that a bidirectional model's sliding layers see to each side, or None where it has none."""
    layers = getattr(config, "layer_types", None) or []
    return config.sliding_window if "sliding_attention" in layers else None


def separate_cross_attention_mask(model, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward hook, `model.register_forward_pre_hook(separate_cross_attention_mask, with_kwargs=True)`.

    Encoder-decoders take one mask for the encoder and for what the decoder sees of it. With packed documents these
    differ, as inputs and targets have other lengths: so the encoder runs first, with its own.
    """
    cross = kwargs.pop("cross_attention_mask", None)
    if cross is not None:
        mask = kwargs.pop("attention_mask")
        kwargs["encoder_outputs"] = model.get_encoder()(input_ids=kwargs.pop("input_ids"), attention_mask=mask)
        kwargs["attention_mask"] = cross
    return args, kwargs


@torch.no_grad()
def check_isolation(model, collator) -> str:
    """Prove on the model itself that packed documents do not see each other; returns a line for the plan.

    Two documents share a row. Changing one must leave the other's logits as they are, in both directions, and the
    second must give what it gives alone, where the model counts its positions itself (RoBERTa's do not start at 0).
    Backends differ in what they honour, so nothing is believed without this.

    Raises:
        UserError: it leaks.
    """
    if not collator.isolate_documents:
        return "off: documents in one row see each other (isolate_documents)"
    if is_deepspeed_zero3_enabled():
        return "by position_ids and block masks; not checked here, the weights are sharded"
    ordinary = np.setdiff1d(np.arange(len(collator.tokenizer)), collator.tokenizer.all_special_ids)
    size = min(collator.max_length // 2, collator.probe_tokens)
    first, other_first, second, other_second = np.random.default_rng(0).choice(ordinary, (4, size))

    def logits(*documents: np.ndarray, bare: bool = False) -> torch.Tensor:
        batch = send_to_device(collator.probe(documents, bare), model.device)
        with precision_of_attention(model):
            return model(**batch).logits[0].float().cpu()

    was_training = model.training
    model.eval()
    try:
        both = logits(first, second)
        half = len(both) // 2
        leaks = {
            "the first document sees the second": both[:half] - logits(first, other_second)[:half],
            "the second document sees the first": both[half:] - logits(other_first, second)[half:],
            "a packed document differs from the same document alone": both[half:] - logits(second, bare=True),
        }
    except Exception as error:  # whatever an architecture without position_ids or with other masks does
        reason = f"{type(error).__name__}: {str(error).strip()[:200]}".splitlines()[0]
        raise UserError(
            f"{type(model).__name__} cannot read packed documents ({reason}); choose another model_type"
        ) from error
    model.train(was_training)
    for what, difference in leaks.items():
        if difference.abs().max() > 1e-3 * max(1.0, float(both.abs().max())):
            raise UserError(
                f"{type(model).__name__} with attn_implementation {model.config._attn_implementation} leaks between "
                f"packed documents ({what}); set attn_implementation to sdpa, or isolate_documents to false"
            )
    return "checked: packed documents do not see each other"
