"""Closed forms of parameter counts against the models themselves, and against published numbers."""

import pytest
import torch
from test_budget import SMALL, SMALL_MODELS, on_meta
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from unlabeled.planning import count_parameters, training_flops_per_token
from unlabeled.planning.shapes import DEFAULTS, count_shape, lora_parameters, shape_of

CLASSES = {
    "llama": AutoModelForCausalLM, "mistral": AutoModelForCausalLM, "qwen3": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM, "eurobert": AutoModelForMaskedLM, "bert": AutoModelForMaskedLM,
    "modernbert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM,
}  # fmt: skip
OTHER = {  # sizes that all differ within a configuration
    "llama": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "eurobert": {"num_key_value_heads": 2},
    "modernbert": {"num_hidden_layers": 5, "local_attention": 16},
}


def check_shape(model_type: str, overrides: dict) -> None:
    config = AutoConfig.for_model(model_type, **overrides)
    model, shape = on_meta(CLASSES[model_type], config), shape_of(model_type, overrides)
    counts = count_parameters(model)
    assert count_shape(shape) == counts
    lengths = (100, 23) if counts.encoder else (100,)
    assert training_flops_per_token(shape, counts, *lengths) == training_flops_per_token(config, counts, *lengths)


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_defaults(model_type):
    assert set(CLASSES) == set(DEFAULTS)
    check_shape(model_type, {})


@pytest.mark.parametrize("model_type", OTHER)
def test_other_sizes(model_type):
    check_shape(model_type, SMALL | {"hidden_size": 64, "intermediate_size": 168} | OTHER[model_type])


def test_architecture_specific_names():
    check_shape("gpt2", {"n_embd": 96, "n_layer": 3, "n_head": 4, "n_positions": 77, "n_inner": 100, "vocab_size": 333})
    sizes = {"d_model": 96, "d_kv": 10, "d_ff": 120, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    check_shape("t5", sizes | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})


def test_published_t5_base():
    """222,903,552 (Raffel et al. 2019: "about 220 million"); of T5 1.1, which transformers 5 ties too, as many."""
    sizes = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    newer = sizes | {"d_ff": 2048, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    for overrides in (sizes, newer):
        check_shape("t5", overrides)
        assert count_shape(shape_of("t5", overrides)).total == 222_903_552


def test_lora_parameters():
    from peft import LoraConfig, get_peft_model

    auto_class, config = SMALL_MODELS["llama"]
    with torch.device("meta"):
        model = get_peft_model(auto_class.from_config(config), LoraConfig(r=8, target_modules="all-linear"))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lora_parameters(shape_of("llama", config.to_dict()), 8) == trainable
