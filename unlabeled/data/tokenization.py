"""Tokenizers: loading one, the special tokens that an objective needs, and text to ids."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, overload

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unlabeled.data.control_tokens import control_tokens, plain_control_tokens, rename_tokens
from unlabeled.data.encoding import EncodedText, bare_backend, encode_texts
from unlabeled.data.text import error_summary
from unlabeled.errors import UserError
from unlabeled.runtime.model_folders import check_model_folder

MAX_VOCABULARY = 20_000_000

# --- Loading a tokenizer ----------------------------------------------------------------------------------------------


def load_tokenizer(name_or_path: str, key: str = "tokenizer_name_or_path", **options: Any) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a folder or of a model on the Hub. Code in the folder is never run.

    Args:
        name_or_path: the folder or the name on the Hub.
        key: the key that sets it, for messages.
        options: for `from_pretrained`; saved with the tokenizer.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    remedy = "set another"
    if key.startswith("tokenizer"):
        remedy += ", or make one with scripts/train_tokenizer.py"
    path = os.path.expanduser(name_or_path)
    if not os.path.isdir(path) and (path.startswith((".", "/")) or path.count("/") > 1):
        raise UserError(f"{key}: there is no folder {name_or_path}; {remedy}")
    try:
        check_model_folder(path)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False, **options)
    except Exception as error:  # many types, among them bare Exception for a broken tokenizer.json
        raise UserError(f"{key}: no tokenizer in {name_or_path} ({error_summary(error)}); {remedy}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{key}: {name_or_path} has no fast tokenizer (tokenizer.json); {remedy}")
    # From a model's folder without tokenizer files, some classes make a tokenizer of nothing but special tokens.
    if len(tokenizer) == len(tokenizer.added_tokens_decoder):
        raise UserError(f"{key}: {name_or_path} holds a model but no tokenizer; {remedy}")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise UserError(
            f"{key}: model_max_length in the tokenizer_config.json of {name_or_path} is "
            f"{tokenizer.model_max_length!r}, not a number; correct it"
        )
    if vocabulary_size(tokenizer) > MAX_VOCABULARY:
        raise UserError(
            f"{key}: the tokenizer in {name_or_path} has the id {vocabulary_size(tokenizer) - 1:,}, and a model would "
            f"need a vector for each id below that; {remedy}"
        )
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The rows that an embedding table needs: the largest id + 1. `len(tokenizer)` is less where ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def ordinary_ids(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """The ids that text is made of, int64, ascending: neither control tokens nor ids without a token."""
    control = {*control_tokens(tokenizer).values(), *tokenizer.all_special_ids}
    return np.array(sorted(set(tokenizer.get_vocab().values()) - control), dtype=np.int64)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256, in hexadecimal, of what determines the ids of a text. The framing around it is not part of that."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {part: backend[part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    names = plain_control_tokens(tokenizer)
    if names:  # they are encoded as characters, and which tokens they are also depends on the chat template
        state["control_tokens"] = sorted(names)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


# --- Special tokens ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Framing:
    """The ids before and after each document."""

    prefix_id: int
    suffix_id: int


def framing(tokenizer: PreTrainedTokenizerFast, objective: str) -> Framing:
    """The special tokens around a document: bos and eos for "clm" and "span", cls and sep for "mlm".

    A tokenizer without bos uses eos at both ends (the convention of GPT-2), so that the first token of a document has
    something to be predicted from. Without cls or sep, bos and eos take their places (descendants of Llama such as
    EuroBERT).

    Raises:
        UserError: the tokenizer lacks a token that the objective needs, or a pad token. Except for "mlm", pad must not
            be eos, since collators that recognize padding by its id would never teach the end of a text.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    bos_id, eos_id, pad_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    if objective == "mlm":
        prefix_id = bos_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
        suffix_id = eos_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
        needed = {"cls (or bos)": prefix_id, "sep (or eos)": suffix_id, "mask": tokenizer.mask_token_id}
    else:
        prefix_id = eos_id if bos_id is None else bos_id
        suffix_id = eos_id
        needed = {"eos": eos_id}
    missing = [token for token, token_id in needed.items() if token_id is None]
    if missing:
        algorithm = {"clm": "bpe", "mlm": "wordpiece", "span": "unigram"}[objective]
        raise UserError(
            f"the tokenizer {name} lacks {' and '.join(missing)}, which {objective} needs; name such a token in its "
            f"tokenizer_config.json, or make a tokenizer with scripts/train_tokenizer.py --algorithm {algorithm}"
        )
    if pad_id is None or (objective != "mlm" and pad_id == eos_id):
        fault = "has no pad token" if pad_id is None else f"pads with its eos token {tokenizer.eos_token}"
        raise UserError(
            f"the tokenizer {name} {fault}; give it a pad_token of its own in its tokenizer_config.json, or with "
            "ensure_pad_token of unlabeled.data.tokenization"
        )
    return Framing(prefix_id, suffix_id)


def ensure_pad_token(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Set a pad token where the tokenizer has none, or pads with eos: unk if that is not eos, otherwise `<|pad|>`.

    A new token makes `vocabulary_size(tokenizer)` grow; the caller resizes the embeddings.

    Returns:
        A sentence for the log, or None if nothing was changed.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return None
    if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token
        return f"the tokenizer has no pad token of its own: its unknown token {tokenizer.unk_token} now pads"
    size = len(tokenizer)
    add_special_tokens(tokenizer, {"pad_token": "<|pad|>"})
    kind = "new" if len(tokenizer) > size else "known"
    return f"the tokenizer has no pad token of its own: the {kind} token <|pad|> (id {tokenizer.pad_token_id}) now pads"


def add_special_tokens(tokenizer: PreTrainedTokenizerFast, tokens: dict[str, str | list[str]]) -> None:
    """`tokenizer.add_special_tokens`, but new tokens never get an id that is in use.

    The library numbers new tokens from the number of tokens on. Where ids have gaps, that may be the id of another one.

    Raises:
        UserError: a new token would take the id of another token.
    """
    token_of_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    tokenizer.add_special_tokens(tokens, replace_extra_special_tokens=False)
    for value in tokens.values():
        for token in [value] if isinstance(value, str) else value:
            token_id = tokenizer.convert_tokens_to_ids(token)
            if token_of_id.get(token_id, token) != token:
                raise UserError(
                    f"the tokenizer {tokenizer.name_or_path} numbers the new token {token} as {token_id}, the id of "
                    f"{token_of_id[token_id]!r}, since its ids have gaps; name one of its own tokens, or take another "
                    "tokenizer"
                )


# --- Text to ids ------------------------------------------------------------------------------------------------------


@overload
def encode_batch(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], word_starts: Literal[False] = False
) -> list[np.ndarray]: ...


@overload
def encode_batch(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], word_starts: Literal[True]
) -> tuple[list[np.ndarray], list[np.ndarray]]: ...


def encode_batch(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], word_starts: bool = False
) -> list[np.ndarray] | tuple[list[np.ndarray], list[np.ndarray]]:
    """Encode whole texts with the tokenizer's threads, without special tokens, truncation, padding and warnings.

    The name of a control token inside of a text, such as "<|endoftext|>", is encoded as its characters. Unigram models
    whose special tokens are ordinary pieces, such as T5's, cannot do that: there the name is left out. Tags such as
    `<think>` are tokens where the tokenizer does not call them special.

    Args:
        tokenizer: any fast tokenizer.
        texts: the texts.
        word_starts: also mark the first token of each word. Words are the tokenizer's own (`word_ids`). Where it does
            not split text into words, as Llama 2's, they start at SentencePiece's mark for a space.

    Returns:
        int32 (tokens,) for each text. With `word_starts` a pair: those, and bool (tokens,) for each text.
    """
    encoded = _encode_as_text(tokenizer.backend_tokenizer, texts, word_starts)
    ids = [text.ids for text in encoded]
    # The backend still recognizes control tokens that are not special: texts with their names are encoded by a copy
    # that does not.
    names = plain_control_tokens(tokenizer)
    affected = [number for number, text in enumerate(texts) if any(name in text for name in names)]
    if affected:
        renamed = rename_tokens(tokenizer, names)
        encoded_again = _encode_as_text(renamed.backend, [texts[number] for number in affected], word_starts)
        for number, text in zip(affected, encoded_again, strict=True):
            encoded[number] = text
            ids[number] = renamed.original_ids(text.ids)
    starts = [text.word_starts for text in encoded]
    unexpected = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    unexpected.discard(tokenizer.unk_token_id)
    for number, text_ids in enumerate(ids):
        is_text = ~np.isin(text_ids, list(unexpected))
        if not is_text.all():
            ids[number] = text_ids[is_text]
            if word_starts:
                starts[number] = starts[number][is_text]
    return (ids, starts) if word_starts else ids


def _encode_as_text(backend: Tokenizer, texts: list[str], word_starts: bool) -> list[EncodedText]:
    with bare_backend(backend, split_special_tokens=True):
        return encode_texts(backend, texts, word_starts=word_starts)


def token_offsets(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """The characters (start, end) of each token, as `return_offsets_mapping` gives them.

    The names of special tokens are encoded as their characters.

    Returns:
        int64 (tokens, 2) for each text.
    """
    backend = tokenizer.backend_tokenizer
    with bare_backend(backend, split_special_tokens=True, post_process=True):
        return [text.offsets for text in encode_texts(backend, texts, offsets=True)]


def bytes_per_token(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> float:
    """UTF-8 bytes of the texts divided by their tokens, without framing.

    Raises:
        UserError: there is no text.
    """
    texts = iter(texts)
    size = 0
    tokens = 0
    while batch := list(islice(texts, 1000)):
        size += sum(len(text.encode("utf-8")) for text in batch)
        tokens += sum(len(ids) for ids in encode_batch(tokenizer, batch))
    if not tokens:
        raise UserError("there is no text to count the tokens of; choose data that is not empty")
    return size / tokens
