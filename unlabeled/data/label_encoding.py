"""Texts, pairs of texts and words as tokens with the tokenizer's frame, cut to a length."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from unlabeled.data.control_tokens import control_tokens, is_markup
from unlabeled.data.encoding import BATCH_CHARACTERS, keep_beginning


@dataclass(frozen=True)
class FramedText:
    """A text with the tokenizer's special tokens around it.

    Attributes:
        input_ids: int32 (tokens,).
        type_ids: int32 (tokens,), 1 in the second text of a pair.
        first_tokens: {word: position of its first token}, for words.
        is_truncated: whether tokens were cut off.
    """

    input_ids: np.ndarray
    type_ids: np.ndarray
    first_tokens: dict[int, int]
    is_truncated: bool


def encode_framed(
    tokenizer: PreTrainedTokenizerFast, texts: list[list[str]], max_length: int, words: bool
) -> list[FramedText]:
    """Encode texts with the tokenizer's own frame, as a pipeline does, truncated on the right to `max_length` tokens.

    Words after the first get a leading space, so that each tokenizer splits them as in running text; byte-level ones
    have other tokens for the beginning of a text. The name of a control token in a text is encoded as its characters,
    or left out.

    Args:
        tokenizer: any fast tokenizer.
        texts: one text, a pair of texts, or the words of a sentence each.
        max_length: tokens of a text at most.
        words: whether `texts` are words.
    """
    backend = tokenizer.backend_tokenizer
    control_ids = {token_id for token, token_id in control_tokens(tokenizer).items() if not is_markup(token, tokenizer)}
    control_ids.discard(tokenizer.unk_token_id)
    framed: list[FramedText] = []
    with _truncating_backend(backend, max_length):
        for batch in _batches(backend, texts, max_length, words):
            encodings = backend.encode_batch(batch, is_pretokenized=words)
            framed += [_framed_text(encoding, tokenizer, control_ids, words) for encoding in encodings]
    return framed


@contextmanager
def _truncating_backend(backend: Tokenizer, max_length: int) -> Iterator[None]:
    """Truncate without padding, and split the names of special tokens, until the block ends."""
    truncation = backend.truncation
    padding = backend.padding
    encode_special_tokens = backend.encode_special_tokens
    backend.no_padding()
    backend.enable_truncation(max_length, strategy="longest_first", direction="right")
    backend.encode_special_tokens = True  # a misnomer: True splits the names of special tokens
    try:
        yield
    finally:
        if truncation is None:
            backend.no_truncation()
        else:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
        backend.encode_special_tokens = encode_special_tokens


def _batches(backend: Tokenizer, texts: list[list[str]], max_length: int, words: bool) -> Iterator[list]:
    """What `Tokenizer.encode_batch` takes, in batches of bounded size. Of long texts only the beginning is kept."""
    batch: list[Any] = []
    size = 0
    for text in texts:
        if words:
            item: Any = [text[0], *(f" {word}" for word in text[1:])]
        else:
            parts = [keep_beginning(backend, part, max_length) for part in text]
            item = parts[0] if len(parts) == 1 else tuple(parts)
        length = len(item) if isinstance(item, str) else sum(len(part) for part in item)
        if batch and size + length > BATCH_CHARACTERS:
            yield batch
            batch = []
            size = 0
        batch.append(item)
        size += length
    if batch:
        yield batch


def _framed_text(
    encoding: Encoding, tokenizer: PreTrainedTokenizerFast, control_ids: set[int], words: bool
) -> FramedText:
    is_frame = np.array(encoding.special_tokens_mask, dtype=bool)
    is_kept = is_frame | ~np.isin(encoding.ids, list(control_ids))
    ids = np.array(encoding.ids, dtype=np.int32)[is_kept]
    type_ids = np.array(encoding.type_ids, dtype=np.int32)[is_kept]
    first_tokens: dict[int, int] = {}
    if words:
        word_ids = np.array(encoding.word_ids, dtype=float)[is_kept]  # NaN in the frame
        for position, word in enumerate(word_ids):
            if not np.isnan(word):
                first_tokens.setdefault(int(word), position)
    if not len(ids):  # a text of control characters, for a tokenizer without a frame
        ids = np.array([tokenizer.pad_token_id], dtype=np.int32)
        type_ids = np.zeros(1, dtype=np.int32)
    return FramedText(ids, type_ids, first_tokens, is_truncated=bool(encoding.overflowing))
