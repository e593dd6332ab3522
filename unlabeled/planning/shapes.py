"""Parameter counts in closed form, so that a plan does not wait for torch; other architectures are counted on meta."""

from types import SimpleNamespace

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


def shape_of(model_type: str, overrides: dict | None = None) -> SimpleNamespace:
    """The sizes of a config by Hugging Face's names, defaults included; `KeyError` for an architecture not listed.

    Overrides that change no size are kept too and do no harm.
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
        kinds = ("full_attention", "sliding_attention")
        every = shape.global_attn_every_n_layers
        shape.layer_types = shape.layer_types or [kinds[i % every > 0] for i in range(shape.num_hidden_layers)]
    return shape


def count_shape(shape: SimpleNamespace) -> ParameterCounts:
    """What `count_parameters` counts of the model that the recipes build from `shape`; equal, not nearly (tested)."""
    width, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    table, kind = shape.vocab_size * width, shape.model_type
    if kind == "t5":
        return _count_t5(shape)
    if kind in ("gpt2", "bert"):
        matrices = 4 * width**2 + 2 * width * inner
        vectors = 9 * width + inner  # biases 5 · width + inner, two norms with biases
        embedding = table + shape.max_position_embeddings * width
        head, rest = 0, 2 * width
        if kind == "bert":
            embedding += shape.type_vocab_size * width
            head, rest = width**2, width + 4 * width + shape.vocab_size  # transform, two norms, the decoder's bias
    elif kind == "modernbert":
        matrices, vectors = 4 * width**2 + 3 * width * inner, 2 * width
        embedding, head = table, width**2
        rest = (1 + 1 + 1 - 1) * width + shape.vocab_size  # norms around the layers and in the head, none in layer 0
    else:
        matrices, _ = _llama_matrices(shape)
        heads = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim
        vectors = 2 * width + (2 * shape.head_dim if kind == "qwen3" else 0)  # Qwen3 has norms of queries and keys
        vectors += (heads + width if shape.attention_bias else 0) + (2 * inner + width if shape.mlp_bias else 0)
        embedding, head, rest = table, 0, width
    untied = 0 if shape.tie_word_embeddings else table
    return ParameterCounts(
        total=embedding + untied + head + rest + layers * (matrices + vectors),
        embedding=embedding,
        matmul=layers * matrices + head + table,
        head=table,
    )


def _llama_matrices(shape: SimpleNamespace) -> tuple[int, int]:
    """Weights of the matrices of a gated layer, and the sum of their inputs and outputs."""
    width, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
    sides = [(width, queries), (width, keys), (width, keys), (queries, width), (width, inner), (width, inner)]
    sides.append((inner, width))
    return sum(a * b for a, b in sides), sum(a + b for a, b in sides)


def lora_parameters(shape: SimpleNamespace, rank: int) -> int:
    """Parameters of LoRA on all linear layers of a gated model: rank · (inputs + outputs) of each (Hu et al. 2021)."""
    return rank * shape.num_hidden_layers * _llama_matrices(shape)[1]


def _count_t5(shape: SimpleNamespace) -> ParameterCounts:
    width, table = shape.hidden_size, shape.vocab_size * shape.hidden_size
    projection = width * shape.num_attention_heads * shape.head_dim
    feed_forward = (3 if shape.feed_forward_proj.startswith("gated") else 2) * width * shape.intermediate_size
    encoder = shape.num_hidden_layers * (4 * projection + feed_forward)
    seen = shape.num_decoder_layers * 2 * projection  # keys and values of what the decoder sees of the encoder
    decoder = shape.num_decoder_layers * (8 * projection + feed_forward)
    norms = (2 * shape.num_hidden_layers + 3 * shape.num_decoder_layers + 2) * width
    distances = 2 * shape.relative_attention_num_buckets * shape.num_attention_heads
    return ParameterCounts(  # tied, whatever the config says: transformers 5 ties every T5
        total=table + distances + encoder + decoder + norms,
        embedding=table + distances,
        matmul=encoder + decoder + table,
        head=table,
        encoder=encoder + seen,
    )
