"""The models of the objectives experiment: initial weights, conversion to an encoder, training cost."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from experiments.objectives.settings import MAX_LENGTH, MODEL_SIZES, T5_SIZES
from unlabeled.models.configs import scratch_config
from unlabeled.models.loading import init_model
from unlabeled.planning import count_parameters, training_flops_per_token
from unlabeled.planning.spans import Denoiser

# ModernBERT and its decoder have the same weights under other names, and with the same shapes but for Wqkv.
DECODER_PREFIXES = {"head.dense.": "lm_head.dense.", "head.norm.": "lm_head.norm."}
DECODER_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def make_encoder(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    config = scratch_config("modernbert", MODEL_SIZES, tokenizer, MAX_LENGTH)
    return init_model(AutoModelForMaskedLM, config, "sdpa")


def make_decoder(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    config = scratch_config("modernbert-decoder", MODEL_SIZES, tokenizer, MAX_LENGTH)
    return init_model(AutoModelForCausalLM, config, "sdpa")


def decoder_names(encoder_name: str) -> list[str]:
    """The names of the decoder's tensors that, concatenated, are a tensor of the encoder."""
    name = encoder_name
    for encoder_prefix, decoder_prefix in DECODER_PREFIXES.items():
        if name.startswith(encoder_prefix):
            name = name.replace(encoder_prefix, decoder_prefix)
    if "Wqkv" in name:
        return [name.replace("Wqkv", projection) for projection in DECODER_PROJECTIONS]
    return [name]


def make_initial_models(folder: Path, seed: int) -> Path:
    """Save the same random weights as a masked and as a causal model, unless they exist.

    Returns:
        The folder that holds `masked` and `causal`.
    """
    initial_folder = folder / f"seed-{seed}" / "start"
    if (initial_folder / "causal" / "model.safetensors").exists():
        return initial_folder
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    set_seed(seed)
    encoder = make_encoder(tokenizer)
    decoder = make_decoder(tokenizer)
    weights = {}
    for name, tensor in encoder.state_dict().items():
        names = decoder_names(name)
        for part_name, part in zip(names, tensor.chunk(len(names)), strict=True):
            weights[part_name] = part.contiguous()
    decoder.load_state_dict(weights)
    for name, model in {"masked": encoder, "causal": decoder}.items():
        model.save_pretrained(initial_folder / name)
        tokenizer.save_pretrained(initial_folder / name)
    return initial_folder


def convert_to_encoder(causal_folder: Path) -> Path:
    """Save the weights of a causal model as a bidirectional one, unless it exists.

    Returns:
        The folder of the converted model, `as_encoder` in that of the causal one.
    """
    encoder_folder = causal_folder / "as_encoder"
    if (encoder_folder / "model.safetensors").exists():
        return encoder_folder
    tokenizer = AutoTokenizer.from_pretrained(causal_folder, trust_remote_code=False)
    decoder = AutoModelForCausalLM.from_pretrained(causal_folder, trust_remote_code=False)
    decoder_weights = decoder.state_dict()
    encoder = make_encoder(tokenizer)
    weights = {
        name: torch.cat([decoder_weights[part_name] for part_name in decoder_names(name)])
        for name in encoder.state_dict()
    }
    encoder.load_state_dict(weights)
    encoder.save_pretrained(encoder_folder)
    tokenizer.save_pretrained(encoder_folder)
    return encoder_folder


def span_inputs_per_text_token() -> float:
    """How many input tokens span corruption makes of a token of text."""
    text_tokens, _ = Denoiser().fitting(MAX_LENGTH)
    return MAX_LENGTH / text_tokens


def flops_per_text_token(folder: Path) -> dict[str, float]:
    """FLOPs to train each arm on a token of text, with an output head that is computed at the targets only.

    The recipes compute the head at every position, which for masked models costs what this leaves out.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    config = scratch_config("modernbert", MODEL_SIZES, tokenizer, MAX_LENGTH)
    t5_config = scratch_config("t5", T5_SIZES, tokenizer, MAX_LENGTH)
    with torch.device("meta"):
        counts = count_parameters(AutoModelForMaskedLM.from_config(config, trust_remote_code=False))
        t5_counts = count_parameters(AutoModelForSeq2SeqLM.from_config(t5_config, trust_remote_code=False))
    # The sliding windows of the decoder are half as wide, which is less than a percent of the FLOPs here.
    causal = training_flops_per_token(config, counts, MAX_LENGTH)
    masked_15 = training_flops_per_token(config, counts, MAX_LENGTH, head_share=0.15)
    masked_30 = training_flops_per_token(config, counts, MAX_LENGTH, head_share=0.3)
    _, target_length = Denoiser().fitting(MAX_LENGTH)
    span = training_flops_per_token(t5_config, t5_counts, MAX_LENGTH, target_length)
    return {
        "causal": causal,
        "masked 0.15": masked_15,
        "masked 0.30": masked_30,
        "causal, then masked": masked_30,
        "span corruption": span * span_inputs_per_text_token(),
    }
