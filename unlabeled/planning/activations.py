"""Bytes of the activations that the layers of a model save for the backward pass, from the sizes in its config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Block:
    """What a layer saves for its backward pass, where architectures differ (transformers 5.23, torch 2.13).

    Attributes:
        values_per_norm: Values of the model's width that a norm saves. RMSNorm is written in Python and saves its input
            in fp32, and the normalized input for the gradient of its weight. LayerNorm is one operation and saves its
            input.
        linear_inputs: Linear layers that read the output of a norm. They share it, but autocast makes a copy for each.
        attention_values: Queries, keys, values and output, in multiples of heads · head_dim. Where one matrix makes q,
            k and v, and q and k are rotated, v is a view that keeps all three alive as they were; eager attention
            copies them.
        has_gate: Whether the feed-forward block saves the two factors of a gate and their product.
        has_fp32_softmax: Whether eager attention takes its softmax in fp32, whatever the precision.
        has_qk_norm: Whether the queries and keys of each head have an RMSNorm.
        has_position_bias: Whether a learned bias is added to the scores (T5). The CPU has no fused attention for it,
            and masks have as many heads.
        values_outside: Values of the model's width that the embeddings, the last norm and the layers of the output
            head save.
        default_activation: The activation function where the config names none.
    """

    values_per_norm: int = 2
    linear_inputs: int = 5
    attention_values: int = 4
    has_gate: bool = True
    has_fp32_softmax: bool = True
    has_qk_norm: bool = False
    has_position_bias: bool = False
    values_outside: int = 3
    default_activation: str = "silu"

    @property
    def has_fused_matrices(self) -> bool:
        """Whether one matrix makes queries, keys and values, and another one both halves of a gated layer."""
        return self.linear_inputs == 2


LLAMA = Block()  # also Mistral, EuroBERT and every architecture that is not listed
GPT2 = Block(
    values_per_norm=1,
    linear_inputs=2,
    has_gate=False,
    has_fp32_softmax=False,
    default_activation="gelu_new",
)
BERT = Block(values_per_norm=1, linear_inputs=4, has_gate=False, has_fp32_softmax=False, values_outside=6)
T5 = Block(
    linear_inputs=4,
    has_gate=False,
    has_fp32_softmax=False,
    has_position_bias=True,
    default_activation="relu",
)
BLOCKS = {
    "qwen3": Block(has_qk_norm=True),
    "gpt2": GPT2,
    "bert": BERT,
    "bart": replace(BERT, values_outside=3),
    "modernbert": Block(values_per_norm=1, linear_inputs=2, attention_values=6, values_outside=5),
    "t5": T5,
    "mt5": T5,
    "umt5": T5,
}
# Values of the inner width that an activation function saves. Most save input and output; ReLU the output alone (T5
# casts it, which makes a copy under autocast); GPT-2's GELU is written in Python and saves three more in between.
DEFAULT_VALUES_PER_ACTIVATION = 2
VALUES_PER_ACTIVATION = {"gelu_new": 5, "relu": 1}


@dataclass(frozen=True)
class SavedActivations:
    """The activations that a model saves for its backward pass, in bytes.

    A sum over the distinct tensors that autograd saves. `tests/test_memory.py` compares it with
    `torch.autograd.graph.saved_tensors_hooks`: within 4 % (T5: 10 %). For BERT all in half precision it is equation 1
    of Korthikanti et al. 2022 without the attention scores.

    Attributes:
        config: Sizes of the model by the names of a Hugging Face config.
        value_bytes: Bytes of a value in the precision of the matrix products.
        autocast: Whether only the matrix products are in half precision and the rest in fp32, as without DeepSpeed.
        attention: sdpa (with a mask), eager, flash_attention_2 or varlen.
        norms_are_frozen: Whether the weights of norms are not trained, because an adapter is.
        on_cpu: Whether dropout saves its mask in the precision of the values, as on a CPU, or as bytes.
    """

    config: Any
    value_bytes: int
    autocast: bool
    attention: str
    norms_are_frozen: bool
    on_cpu: bool

    @property
    def block(self) -> Block:
        """What the layers of this architecture save."""
        return find_block(self.config)

    @property
    def residual_bytes(self) -> int:
        """Bytes of a value of the residual stream, which autocast leaves in fp32."""
        return 4 if self.autocast else self.value_bytes

    @property
    def norm_bytes(self) -> int:
        """Bytes that a norm saves for each value of its input."""
        if self.block.values_per_norm == 1:
            return self.residual_bytes
        return 4 + (0 if self.norms_are_frozen else self.residual_bytes)

    def outside_bytes(self, tokens: int) -> int:
        """Bytes that the embeddings, the last norm and the layers of the output head save."""
        value_bytes = 4 if self.block.values_per_norm == 2 else self.residual_bytes
        return self.block.values_outside * value_bytes * self.config.hidden_size * tokens

    def checkpoint_bytes(self, tokens: int) -> int:
        """Bytes of the input of one layer, all that it saves under activation checkpointing."""
        return self.residual_bytes * self.config.hidden_size * tokens

    def widest_gradient_bytes(self, tokens: int) -> int:
        """Bytes of the gradients of the widest values of a layer, those of the feed-forward block."""
        values = 3 if self.block.has_gate else 2
        _, _, inner = inner_sizes(self.config)
        return values * self.value_bytes * tokens * inner

    def layer_bytes(self, tokens: int, keys: int, encoder_length: int = 0) -> int:
        """Bytes that one layer saves.

        Args:
            tokens: Tokens of the micro-batch that the layer reads.
            keys: Tokens that each of them attends to: the length of a row.
            encoder_length: Of a decoder layer with cross-attention, the length of the encoder's rows.
        """
        per_token = self._self_attention_bytes(keys) + self._feed_forward_bytes()
        if not encoder_length:
            return tokens * per_token
        width = self.config.hidden_size
        query_width, _, _ = inner_sizes(self.config)
        per_token += (self.norm_bytes + self.value_bytes + self._dropout_mask_bytes) * width
        per_token += 2 * self.value_bytes * query_width
        per_token += self._score_bytes(encoder_length, is_cross_attention=True)
        per_encoder_token = 2 * self.value_bytes * query_width  # keys and values
        if self.autocast:
            per_encoder_token += 2 * self.value_bytes * width  # and copies of the states that they are made of
        rows = tokens // keys
        return tokens * per_token + rows * encoder_length * per_encoder_token

    @property
    def _dropout_mask_bytes(self) -> int:
        """Bytes of the mask of dropout for each value; 0 without dropout."""
        dropout = first_of(self.config, "hidden_dropout_prob", "resid_pdrop", "dropout_rate", "dropout")
        if not dropout:
            return 0
        return self.value_bytes if self.on_cpu else 1

    @property
    def _has_attention_dropout(self) -> bool:
        names = ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout", "dropout_rate")
        return bool(first_of(self.config, *names))

    @property
    def _is_flash(self) -> bool:
        return "flash" in self.attention or self.attention == "varlen"

    def _self_attention_bytes(self, keys: int) -> int:
        """Bytes per token of both norms of a layer, self-attention and the dropout after each sublayer."""
        block = self.block
        width = self.config.hidden_size
        query_width, key_width, _ = inner_sizes(self.config)
        linear_inputs = block.linear_inputs if self.autocast else 2
        per_token = 2 * self.norm_bytes * width + self.value_bytes * width * linear_inputs
        if block.has_qk_norm:
            normalized = 0 if self.norms_are_frozen else self.value_bytes
            per_token += (4 + normalized) * (query_width + key_width)
        # sdpa with a mask and eager attention repeat keys and values for each query head, flash attention does not.
        values = (4 if self.attention == "eager" else block.attention_values) * query_width
        if self._is_flash:
            values -= 2 * (query_width - key_width)
        per_token += self.value_bytes * values
        return per_token + self._score_bytes(keys) + 2 * self._dropout_mask_bytes * width

    def _feed_forward_bytes(self) -> int:
        """Bytes per token of the feed-forward block without its norm and the dropout after it."""
        block = self.block
        _, _, inner = inner_sizes(self.config)
        names = ("dense_act_fn", "activation_function", "hidden_activation", "hidden_act")
        activation = first_of(self.config, *names) or block.default_activation
        values = VALUES_PER_ACTIVATION.get(activation, DEFAULT_VALUES_PER_ACTIVATION)
        if block.has_gate:
            values += 2
        if self.autocast and activation == "relu":
            values += 1
        per_value = self.value_bytes * values
        if block.has_position_bias:  # T5 has dropout within the block, too
            per_value += self._dropout_mask_bytes
        return per_value * inner

    def _score_bytes(self, keys: int, is_cross_attention: bool = False) -> int:
        """Bytes per token of the attention scores, or of what fused attention saves in their place."""
        heads = self.config.num_attention_heads
        has_dropout = self._has_attention_dropout
        has_position_bias = self.block.has_position_bias
        if self.attention == "eager":
            return heads * keys * self._eager_score_bytes()
        is_fused = (
            self._is_flash or not self.on_cpu or not (has_dropout or (has_position_bias and not is_cross_attention))
        )
        if not is_fused:  # the CPU computes it as eager attention does, all in fp32
            query_width, _, _ = inner_sizes(self.config)
            return heads * keys * (12 if has_dropout else 4) + 3 * (4 - self.value_bytes) * query_width
        log_sum_exp = 4 * heads
        if self._is_flash:
            return log_sum_exp
        mask = self.value_bytes * keys * (heads if has_position_bias else 1)
        return log_sum_exp + mask

    def _eager_score_bytes(self) -> int:
        """Bytes of a score: the softmax, a copy for the product with the values, and the mask of dropout."""
        softmax = 4 if self.block.has_fp32_softmax or self.autocast else self.value_bytes
        has_dropout = self._has_attention_dropout
        copy = self.value_bytes if has_dropout or self.value_bytes < softmax else 0
        if not has_dropout:
            return softmax + copy
        return softmax + copy + (softmax if self.on_cpu else 1)


def find_block(config: Any) -> Block:
    """Return the block of an architecture, `LLAMA` if it is not listed."""
    block = BLOCKS.get(config.model_type, LLAMA)
    is_gated = "gated" in (getattr(config, "feed_forward_proj", None) or "")  # T5 1.1
    if not is_gated:
        return block
    return replace(block, linear_inputs=block.linear_inputs + 1, has_gate=True, default_activation="gelu_new")


def first_of(config: Any, *names: str) -> Any:
    """Return the first of these attributes that the config has and that is not empty, or None."""
    for name in names:
        value = getattr(config, name, None)
        if value:
            return value
    return None


def inner_sizes(config: Any) -> tuple[int, int, int]:
    """Return the widths of the queries of all heads, of the keys of all heads, and of the feed-forward block."""
    heads = config.num_attention_heads
    query_width = heads * (first_of(config, "head_dim", "d_kv") or config.hidden_size // heads)
    key_width = query_width * (first_of(config, "num_key_value_heads") or heads) // heads
    inner = first_of(config, "intermediate_size", "n_inner", "d_ff", "encoder_ffn_dim") or 4 * config.hidden_size
    return query_width, key_width, inner
