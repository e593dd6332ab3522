"""What the layers of a model keep for the backward pass, from the sizes in its config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Block:
    """What a layer keeps for its backward pass, where architectures differ (transformers 5.23, torch 2.13).

    Attributes:
        norm: values of the model's width that a norm keeps. RMSNorm is written out in Python: its input in fp32, and
            the normalised input for the gradient of its weight. LayerNorm is one operation and keeps its input.
        inputs: linear layers that read a norm's output. They share it, but autocast makes a copy for each.
        attention: queries, keys, values and output, in multiples of heads · head_dim. Where one matrix makes q, k, v
            and q, k are then rotated, the values are a view that keeps all three as they were alive; eager attention
            copies them.
        gated: the feed-forward block also keeps what its gate is multiplied with, and their product.
        upcast: eager attention takes its softmax in fp32 whatever the precision.
        head_norm: queries and keys of each head have an RMSNorm.
        bias: scores have a learned bias (T5), for which the CPU has no fused attention; and masks have as many heads.
        outside: values of the model's width that the embeddings, the last norm and the head's own layers keep.
        activation: where the config names none.
    """

    norm: int = 2
    inputs: int = 5
    attention: int = 4
    gated: bool = True
    upcast: bool = True
    head_norm: bool = False
    bias: bool = False
    outside: int = 3
    activation: str = "silu"


LLAMA = Block()  # and Mistral, EuroBERT and all that are not listed
T5 = Block(inputs=4, gated=False, upcast=False, bias=True, activation="relu")
BLOCKS = {
    "qwen3": Block(head_norm=True),
    "gpt2": Block(norm=1, inputs=2, gated=False, upcast=False, activation="gelu_new"),
    "bert": Block(norm=1, inputs=4, gated=False, upcast=False, outside=6),
    "bart": Block(norm=1, inputs=4, gated=False, upcast=False),
    "modernbert": Block(norm=1, inputs=2, attention=6, outside=5),
    **dict.fromkeys(("t5", "mt5", "umt5"), T5),
}
# Values of the inner width that an activation keeps: input and output, of ReLU the output alone (which T5 casts, to a
# copy under autocast); GPT-2's GELU is written out in Python and keeps three between them.
ACTIVATIONS = {"gelu_new": 5, "relu": 1}


@dataclass(frozen=True)
class SavedActivations:
    """What decides how much a layer keeps, apart from its sizes.

    Attributes:
        size: bytes of a value in the working precision.
        autocast: matrix products are in half precision and the rest in fp32, as without DeepSpeed.
        attention: sdpa, with a mask; eager; flash_attention_2 or varlen.
        frozen: an adapter is trained and norms are not.
        cpu: dropout keeps its mask as values, elsewhere as bytes.
    """

    block: Block
    size: int
    autocast: bool
    attention: str
    frozen: bool
    cpu: bool

    @property
    def stream(self) -> int:
        """Bytes of a value between the layers: autocast leaves them in fp32."""
        return 4 if self.autocast else self.size


def layer_bytes(config: Any, kept: SavedActivations, tokens: int, keys: int, sources: int = 0) -> int:
    """Bytes that one layer keeps for the backward pass of `tokens` tokens, each of which sees `keys`.

    Of a decoder that reads an encoder, `sources` is the length of the encoder's rows. A sum over the distinct tensors
    that autograd saves; tests/test_memory.py compares it with `torch.autograd.graph.saved_tensors_hooks`: to 4 % (T5:
    10 %). For BERT all in half precision it is equation 1 of Korthikanti et al. 2022, less the scores.
    """
    block, size, width, heads = kept.block, kept.size, config.hidden_size, config.num_attention_heads
    q, kv, inner = inner_sizes(config)
    activation = first_of(config, "dense_act_fn", "activation_function", "hidden_activation", "hidden_act")
    activation = activation or block.activation
    dropout = first_of(config, "hidden_dropout_prob", "resid_pdrop", "dropout_rate", "dropout")
    forgets = first_of(config, "attention_probs_dropout_prob", "attn_pdrop", "attention_dropout", "dropout_rate")
    mask = (size if kept.cpu else 1) if dropout else 0
    norm = kept.stream if block.norm == 1 else 4 + (0 if kept.frozen else kept.stream)
    eager, flash = kept.attention == "eager", "flash" in kept.attention or kept.attention == "varlen"

    def scores(keys: int, cross: bool = False) -> int:
        if eager:  # softmax; a copy for the product, of another precision or after dropout; its mask
            wide = 4 if block.upcast or kept.autocast else size
            copy = size if forgets or size < wide else 0
            return heads * keys * (wide + copy + ((wide if kept.cpu else 1) if forgets else 0))
        if not flash and kept.cpu and (forgets or (block.bias and not cross)):  # as eager attention, and all in fp32
            return heads * keys * (12 if forgets else 4) + 3 * (4 - size) * q
        return 4 * heads + (0 if flash else size * keys * (heads if block.bias else 1))  # log-sum-exp, mask as numbers

    per_token = 2 * norm * width + size * width * (block.inputs if kept.autocast else 2)
    per_token += (4 + (0 if kept.frozen else size)) * (q + kv) if block.head_norm else 0
    # sdpa with a mask and eager attention repeat keys and values for each query head.
    per_token += size * ((4 if eager else block.attention) * q - (2 * (q - kv) if flash else 0))
    per_token += scores(keys) + 2 * mask * width
    values = ACTIVATIONS.get(activation, 2) + 2 * block.gated + (kept.autocast and activation == "relu")
    per_token += (size * values + mask * block.bias) * inner  # T5 has dropout there, too
    if not sources:
        return tokens * per_token
    per_token += (norm + size + mask) * width + 2 * size * q + scores(sources, cross=True)
    read = 2 * size * q + (2 * size * width if kept.autocast else 0)  # keys and values, and what they are made of
    return tokens * per_token + tokens // keys * sources * read


def block_of(config: Any) -> Block:
    """The block of an architecture, `LLAMA` where it is not listed."""
    block = BLOCKS.get(config.model_type, LLAMA)
    gated = "gated" in (getattr(config, "feed_forward_proj", None) or "")  # T5 1.1
    return replace(block, inputs=block.inputs + 1, gated=True, activation="gelu_new") if gated else block


def first_of(config: Any, *names: str) -> Any:
    """The first of these that the config has and that is not empty, or None."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


def inner_sizes(config: Any) -> tuple[int, int, int]:
    """Width of the queries of all heads, of the keys of all heads, and of the feed-forward block."""
    heads = config.num_attention_heads
    q = heads * (first_of(config, "head_dim", "d_kv") or config.hidden_size // heads)
    inner = first_of(config, "intermediate_size", "n_inner", "d_ff", "encoder_ffn_dim") or 4 * config.hidden_size
    return q, q * (first_of(config, "num_key_value_heads") or heads) // heads, inner
