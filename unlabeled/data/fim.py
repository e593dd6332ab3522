"""Fill-in-the-middle: documents rearranged so that a causal model learns to infill (Bavarian et al. 2022).

A text is cut into prefix, middle and suffix, which are written either as prefix, suffix, middle (PSM) or as suffix,
prefix, middle (SPM), with a special token in front of each part (arXiv:2207.14255).
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerFast

from unlabeled.data.held_out import unit_hash
from unlabeled.data.tokenization import add_special_tokens, encode_batch, framing, token_offsets

# The tokens in front of prefix, suffix and middle, as Qwen2.5 names them.
FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
# Tokens that a piece may grow by: bos, eos, the three of `FIM_TOKENS`, and 4 by cuts inside of tokens, which is enough
# for 98 % of the pieces.
GROWTH = 9


def add_fim_tokens(tokenizer: PreTrainedTokenizerFast, fim_rate: float) -> str | None:
    """Add those of `FIM_TOKENS` to the tokenizer that it lacks, unless `fim_rate` is 0.

    The caller resizes the embeddings of the model.

    Returns:
        A sentence for the log, or None if no token was added.
    """
    if not fim_rate:
        return None
    vocabulary = tokenizer.get_vocab()
    new = [token for token in FIM_TOKENS if token not in vocabulary]
    if not new:
        return None
    add_special_tokens(tokenizer, {"additional_special_tokens": new})
    return f"new tokens to fill in the middle: {', '.join(new)}"


def is_rearranged(text: str, fim_rate: float) -> bool:
    """Whether a document is among the share to rearrange, which depends on its content alone."""
    return fim_rate > 0 and unit_hash(b"fim" + text.encode("utf-8")) < fim_rate


@dataclass(frozen=True)
class RearrangedText:
    """A document as framed pieces of token ids.

    Attributes:
        pieces: int32 (tokens,) each, with bos, and with eos where a piece is rearranged or ends the document.
        rearranged: the number of pieces in PSM or SPM order; the others are too long for the added tokens.
    """

    pieces: list[np.ndarray]
    rearranged: int


def rearrange(texts: list[str], tokenizer: PreTrainedTokenizerFast, max_length: int) -> dict[str, RearrangedText]:
    """Cut documents into pieces of at most `max_length` tokens and rearrange each piece for infilling.

    PSM and SPM are equally likely. Prefix, middle and suffix are tokenized separately. A piece that would become longer
    than `max_length` stays in its original order.

    Args:
        texts: documents without duplicates.
        tokenizer: has `FIM_TOKENS`.
        max_length: tokens in a row, at least 16.

    Returns:
        The result for each text.
    """
    split_texts = _split_texts(texts, tokenizer, max_length - GROWTH)
    parts = [part for pieces in split_texts for piece in pieces for part in cut_in_three(piece)]
    encoded = iter(encode_batch(tokenizer, parts))
    frame = framing(tokenizer, "clm")
    results: dict[str, RearrangedText] = {}
    for text, pieces in zip(texts, split_texts, strict=True):
        framed: list[np.ndarray] = []
        rearranged = 0
        for number, piece in enumerate(pieces, start=1):
            prefix, middle, suffix = next(encoded), next(encoded), next(encoded)
            ids = _in_fim_order(tokenizer, piece, prefix, middle, suffix)
            ids = np.concatenate([[frame.prefix_id], ids, [frame.suffix_id]])
            if len(ids) <= max_length:
                rearranged += 1
            else:
                ids = np.concatenate([[frame.prefix_id], *encode_batch(tokenizer, [piece])])
                if number == len(pieces):  # eos marks the end of the document, not of a piece
                    ids = np.append(ids, frame.suffix_id)
            framed.append(ids.astype(np.int32))
        results[text] = RearrangedText(framed, rearranged)
    return results


def cut_in_three(text: str) -> tuple[str, str, str]:
    """(prefix, middle, suffix) of a text, cut at two random characters that depend on its content alone."""
    raw = text.encode("utf-8")
    first, second = sorted(int(unit_hash(purpose + raw) * (len(text) + 1)) for purpose in (b"one", b"two"))
    return text[:first], text[first:second], text[second:]


def _split_texts(texts: list[str], tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> list[list[str]]:
    """Each text as consecutive pieces of at most `max_tokens` tokens."""
    split_texts = []
    for text, offsets in zip(texts, token_offsets(tokenizer, texts), strict=True):
        cuts = [0, *offsets[max_tokens::max_tokens, 0].tolist(), len(text)]
        split_texts.append([text[start:end] for start, end in pairwise(cuts) if start < end])
    return split_texts


def _in_fim_order(
    tokenizer: PreTrainedTokenizerFast, piece: str, prefix: np.ndarray, middle: np.ndarray, suffix: np.ndarray
) -> np.ndarray:
    """The ids of a piece in PSM or SPM order, without bos and eos."""
    prefix_id, suffix_id, middle_id = ([token_id] for token_id in tokenizer.convert_tokens_to_ids(list(FIM_TOKENS)))
    if unit_hash(b"order" + piece.encode("utf-8")) < 0.5:
        return np.concatenate([prefix_id, prefix, suffix_id, suffix, middle_id, middle])
    # SPM as Bavarian et al. train it jointly with PSM: the prefix directly before the middle.
    return np.concatenate([prefix_id, suffix_id, suffix, middle_id, prefix, middle])
