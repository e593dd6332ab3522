"""Parameter counts in closed form, so that a plan need not import torch.

Models of other architectures are counted on the meta device, see `counts.count_parameters`.
"""

from types import SimpleNamespace
from typing import Any

from unlabeled.planning.counts import ParameterCounts

# The defaults of transformers' configs, by the names that most of them share.
_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048,
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "sliding_window": None,
}  # fmt: skip
_T5 = {
    "vocab_size": 32128, "hidden_size": 512, "head_dim": 64, "intermediate_size": 2048, "num_hidden_layers": 6,
    "num_decoder_layers": None, "num_attention_heads": 8, "relative_attention_num_buckets": 32,
    "feed_forward_proj": "relu", "tie_word_embeddings": True,
}  # fmt: skip
DEFAULTS: dict[str, dict] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096,
                         "max_position_embeddings": 131072},
    "qwen3": _LLAMA | {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128,
                       "max_position_embeddings": 32768},
    "eurobert": _LLAMA | {"vocab_size": 128256, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                          "num_attention_heads": 12, "max_position_embeddings": 8192},
    "gpt2": {"vocab_size": 50257, "max_position_embeddings": 1024, "hidden_size": 768, "num_hidden_layers": 12,
             "num_attention_heads": 12, "intermediate_size": None, "tie_word_embeddings": True},
    "bert": {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_size": 768,
             "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
             "tie_word_embeddings": True},
    "modernbert": {"vocab_size": 50368, "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22,
                   "num_attention_heads": 12, "max_position_embeddings": 8192, "local_attention": 128,
                   "global_attn_every_n_layers": 3, "layer_types": None, "tie_word_embeddings": True},
    "t5": _T5,
}  # fmt: skip
ALIASES = {
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_inner": "intermediate_size", "n_positions": "max_position_embeddings",
    "d_model": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size", "d_kv": "head_dim",
}  # fmt: skip


GPT2_TYPES = ("gpt2", "bert")  # with biases, positions in a table, and a feed-forward block without a gate


def shape_of(model_type: str, overrides: dict[str, Any] | None = None) -> SimpleNamespace:
    """Return the sizes of a model by the names of a Hugging Face config, defaults included.

    Args:
        model_type: A key of `DEFAULTS`.
        overrides: As in `config_overrides` of a recipe. Entries that change no size are kept and have no effect.

    Raises:
        KeyError: The architecture is not in `DEFAULTS`.
    """
    sizes = {ALIASES.get(name, name): value for name, value in (overrides or {}).items()}
    shape = SimpleNamespace(**DEFAULTS[model_type] | sizes | {"model_type": model_type})
    heads = shape.num_attention_heads
    shape.head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    shape.num_key_value_heads = getattr(shape, "num_key_value_heads", None) or heads
    shape.intermediate_size = shape.intermediate_size or 4 * shape.hidden_size
    if model_type == "t5":
        shape.num_decoder_layers = shape.num_decoder_layers or shape.num_hidden_layers
    if model_type == "modernbert":
        shape.sliding_window = shape.local_attention // 2
        shape.layer_types = shape.layer_types or _modernbert_layer_types(shape)
    return shape


def _modernbert_layer_types(shape: SimpleNamespace) -> list[str]:
    """Every n-th layer, from the first on, has full attention."""
    return [
        "sliding_attention" if layer % shape.global_attn_every_n_layers else "full_attention"
        for layer in range(shape.num_hidden_layers)
    ]


def count_shape(shape: SimpleNamespace) -> ParameterCounts:
    """Return what `count_parameters` counts of the model that the recipes build from `shape`.

    The numbers are equal, not approximate (`tests/test_shapes.py`).
    """
    if shape.model_type == "t5":
        return _count_t5(shape)
    if shape.model_type in GPT2_TYPES:
        return _count_gpt2_or_bert(shape)
    if shape.model_type == "modernbert":
        return _count_modernbert(shape)
    return _count_llama(shape)


def _count_llama(shape: SimpleNamespace) -> ParameterCounts:
    """Llama, Mistral, Qwen3 and EuroBERT: gated layers, two RMSNorms in each and one at the end."""
    width = shape.hidden_size
    inner = shape.intermediate_size
    vectors = 2 * width
    if shape.model_type == "qwen3":
        vectors += 2 * shape.head_dim  # norms of queries and keys
    if shape.attention_bias:
        vectors += (shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim + width
    if shape.mlp_bias:
        vectors += 2 * inner + width
    matrices = sum(inputs * outputs for inputs, outputs in _llama_matrices(shape))
    return _sum_counts(shape, matrices, vectors, outside_vectors=width)


def _count_gpt2_or_bert(shape: SimpleNamespace) -> ParameterCounts:
    """GPT-2 and BERT: a feed-forward block without a gate, biases, and two LayerNorms in each layer."""
    width = shape.hidden_size
    inner = shape.intermediate_size
    matrices = 4 * width**2 + 2 * width * inner
    biases = 5 * width + inner
    norms = 4 * width
    positions = shape.max_position_embeddings * width
    if shape.model_type == "gpt2":
        return _sum_counts(shape, matrices, biases + norms, outside_vectors=2 * width, other_tables=positions)
    token_types = shape.type_vocab_size * width
    transform_bias = width  # of the matrix in the head
    outside_norms = 4 * width
    decoder_bias = shape.vocab_size
    return _sum_counts(
        shape,
        matrices,
        biases + norms,
        outside_vectors=transform_bias + outside_norms + decoder_bias,
        other_tables=positions + token_types,
        head_matrix=width**2,
    )


def _count_modernbert(shape: SimpleNamespace) -> ParameterCounts:
    """ModernBERT: gated layers without biases, and a bias of the output head."""
    width = shape.hidden_size
    matrices = 4 * width**2 + 3 * width * shape.intermediate_size
    # Norms of the embeddings, after the layers and in the head; the first layer has none before its attention.
    outside_norms = (1 + 1 + 1 - 1) * width
    decoder_bias = shape.vocab_size
    return _sum_counts(shape, matrices, 2 * width, outside_norms + decoder_bias, head_matrix=width**2)


def _sum_counts(
    shape: SimpleNamespace,
    matrices: int,
    vectors: int,
    outside_vectors: int,
    other_tables: int = 0,
    head_matrix: int = 0,
) -> ParameterCounts:
    """Add up the parameters of a model that is an encoder or a decoder.

    Args:
        shape: The sizes of the model.
        matrices: Weights of the matrices of a layer.
        vectors: Biases and norms of a layer.
        outside_vectors: Biases and norms outside the layers.
        other_tables: Input tables other than that of the tokens.
        head_matrix: Weights of a matrix before the output head.
    """
    layers = shape.num_hidden_layers
    token_table = shape.vocab_size * shape.hidden_size
    embedding = token_table + other_tables
    untied_head = 0 if shape.tie_word_embeddings else token_table
    return ParameterCounts(
        total=embedding + untied_head + head_matrix + outside_vectors + layers * (matrices + vectors),
        embedding=embedding,
        matmul=layers * matrices + head_matrix + token_table,
        head=token_table,
    )


def _count_t5(shape: SimpleNamespace) -> ParameterCounts:
    """T5: an encoder and a decoder, tied whatever the config says, as transformers 5 ties every T5."""
    width = shape.hidden_size
    token_table = shape.vocab_size * width
    projection = width * shape.num_attention_heads * shape.head_dim
    feed_forward_matrices = 3 if shape.feed_forward_proj.startswith("gated") else 2
    feed_forward = feed_forward_matrices * width * shape.intermediate_size
    encoder = shape.num_hidden_layers * (4 * projection + feed_forward)
    decoder = shape.num_decoder_layers * (8 * projection + feed_forward)
    cross_attention_of_encoder = shape.num_decoder_layers * 2 * projection  # keys and values of the encoder's output
    norms = (2 * shape.num_hidden_layers + 3 * shape.num_decoder_layers + 2) * width
    distance_tables = 2 * shape.relative_attention_num_buckets * shape.num_attention_heads
    return ParameterCounts(
        total=token_table + distance_tables + encoder + decoder + norms,
        embedding=token_table + distance_tables,
        matmul=encoder + decoder + token_table,
        head=token_table,
        encoder=encoder + cross_attention_of_encoder,
    )


def _llama_matrices(shape: SimpleNamespace) -> list[tuple[int, int]]:
    """The inputs and outputs of each matrix of a gated layer."""
    width = shape.hidden_size
    inner = shape.intermediate_size
    query_width = shape.num_attention_heads * shape.head_dim
    key_width = shape.num_key_value_heads * shape.head_dim
    return [
        (width, query_width),
        (width, key_width),
        (width, key_width),
        (query_width, width),
        (width, inner),
        (width, inner),
        (inner, width),
    ]


def lora_parameters(shape: SimpleNamespace, rank: int) -> int:
    """Return the parameters of LoRA on all linear layers of a gated model.

    rank · (inputs + outputs) for each matrix (Hu et al. 2021, arXiv:2106.09685).
    """
    return rank * shape.num_hidden_layers * sum(inputs + outputs for inputs, outputs in _llama_matrices(shape))
