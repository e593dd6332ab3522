"""Bits per byte of held-out text by the chain rule, for causal, masked and encoder-decoder models alike."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from unlabeled.data.tokenization import encode_batch
from unlabeled.runtime.files import write_json
from unlabeled.training.evaluation import bits_per_byte

TEXTS = 48
TOKENS_PER_TEXT = 48


@torch.no_grad()
def score_left_to_right(folder: Path, held_out: Path) -> None:
    """Predict each token of held-out texts from those before it, and write `left_to_right.json`.

    A masked model reads the tokens before and a mask. An encoder-decoder reads them and a sentinel, and predicts the
    first token of the span that the sentinel replaces. All results are code lengths by the chain rule, so they can be
    compared.
    """
    if (folder / "left_to_right.json").exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    token_ids = read_token_ids(tokenizer, held_out)
    architecture = AutoConfig.from_pretrained(folder, trust_remote_code=False).architectures[0]
    if architecture.endswith("ForCausalLM"):
        logits = causal_logits(folder, tokenizer, token_ids)
    elif architecture.endswith("ForMaskedLM"):
        logits = masked_logits(folder, tokenizer, token_ids)
    else:
        logits = span_logits(folder, tokenizer, token_ids)
    nats = -logits.double().log_softmax(-1).gather(-1, token_ids[:, :, None]).sum()
    assert torch.isfinite(nats)
    text_bytes = sum(len(tokenizer.decode(ids).encode()) for ids in token_ids)
    score = {"bits_per_byte": bits_per_byte(nats.item(), text_bytes), "bytes": text_bytes, "texts": len(token_ids)}
    write_json(folder / "left_to_right.json", score)


def read_token_ids(tokenizer: PreTrainedTokenizerBase, held_out: Path) -> torch.Tensor:
    """int64 (texts, tokens): the first tokens of texts that are spread over all those that are long enough."""
    texts = [json.loads(line)["text"] for line in held_out.read_text(encoding="utf-8").splitlines()]
    long_enough = [ids[:TOKENS_PER_TEXT] for ids in encode_batch(tokenizer, texts) if len(ids) >= TOKENS_PER_TEXT]
    stride = max(len(long_enough) // TEXTS, 1)
    return torch.tensor([ids.tolist() for ids in long_enough[::stride][:TEXTS]])


def causal_logits(folder: Path, tokenizer: PreTrainedTokenizerBase, token_ids: torch.Tensor) -> torch.Tensor:
    """(texts, tokens, vocabulary): the logits of a causal model."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    inputs = torch.cat([make_column(tokenizer.bos_token_id, token_ids), token_ids], dim=1)
    return model(inputs).logits[:, :-1]


def masked_logits(folder: Path, tokenizer: PreTrainedTokenizerBase, token_ids: torch.Tensor) -> torch.Tensor:
    """(texts, tokens, vocabulary): the logits of a masked model at a mask after the tokens before."""
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=False).eval()
    bos = make_column(tokenizer.bos_token_id, token_ids)
    mask = make_column(tokenizer.mask_token_id, token_ids)
    eos = make_column(tokenizer.eos_token_id, token_ids)
    logits = []
    for position in range(TOKENS_PER_TEXT):
        inputs = torch.cat([bos, token_ids[:, :position], mask, eos], dim=1)
        logits.append(model(inputs).logits[:, position + 1])
    return torch.stack(logits, dim=1)


def span_logits(folder: Path, tokenizer: PreTrainedTokenizerBase, token_ids: torch.Tensor) -> torch.Tensor:
    """(texts, tokens, vocabulary): the logits of an encoder-decoder for the token after the first sentinel."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=False).eval()
    sentinel = make_column(tokenizer.convert_tokens_to_ids("<extra_id_0>"), token_ids)
    eos = make_column(tokenizer.eos_token_id, token_ids)
    decoder_start = make_column(model.config.decoder_start_token_id, token_ids)
    decoder_inputs = torch.cat([decoder_start, sentinel], dim=1)
    logits = []
    for position in range(TOKENS_PER_TEXT):
        inputs = torch.cat([token_ids[:, :position], sentinel, eos], dim=1)
        logits.append(model(input_ids=inputs, decoder_input_ids=decoder_inputs).logits[:, -1])
    return torch.stack(logits, dim=1)


def make_column(token_id: int, token_ids: torch.Tensor) -> torch.Tensor:
    """int64 (texts, 1): a token for each text."""
    return torch.full((len(token_ids), 1), token_id)
