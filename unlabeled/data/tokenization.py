"""Tokenizers: training one from text, loading one, and turning text into ids exactly and fast."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unlabeled.data.encoding import SPACE, EncodedText, encode_texts
from unlabeled.errors import UserError
from unlabeled.runtime.model_folders import check_model_folder

ALGORITHMS = ("bpe", "wordpiece", "unigram")
PIPED = re.compile(r"<[|｜][^<>]+[|｜]>")
TAG = re.compile(r"</?(\w+)>")
MAX_VOCABULARY = 20_000_000
PIECE_CHARACTERS = 200_000  # that a tokenizer is trained on at a time
CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=[^\W\d_])")

# What a token never crosses. Byte-level BPE splits as GPT-4o does (`o200k_base` in github.com/openai/tiktoken): a word
# keeps its leading space and its contraction, digits go in threes. On held-out Shakespeare (scripts/get_demo_data.py)
# 2,048 tokens then give 2.85 bytes a token, with GPT-4's split 2.84, with GPT-2's 2.60; 8,192 give 3.44, 3.41, 3.06.
# Unigram splits at spaces as SentencePiece does, newlines at the end of their word: 2.66, with the finer split 2.54.
SPLITS = {
    "bpe": "|".join(
        [
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ),
    "unigram": r" ?\S+[\r\n]*|\s+(?!\S)|\s+",
}
SPECIAL = {
    "bpe": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"},
    "wordpiece": {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    "unigram": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
}
SENTINELS = {"unigram": [f"<extra_id_{i}>" for i in reversed(range(100))]}
TEMPLATES = {  # one text, two texts
    "bpe": ("$A", "$A $B:1"),
    "wordpiece": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "unigram": ("$A </s>", "$A </s> $B:1 </s>:1"),
}


def train_tokenizer(
    texts: Iterable[str], algorithm: str, vocab_size: int, lowercase: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer trained on `texts`, in the form that `save_pretrained` and `AutoTokenizer` know.

    - "bpe", for causal models: on bytes, so nothing is unknown and decoding gives back any text exactly (its lower case
      with `lowercase`). `<|endoftext|>` is bos and eos, as in GPT-2; `<|pad|>` is a token of its own.
    - "wordpiece", for masked models: as in BERT, [CLS] and [SEP] around the text; white space is lost. A character of
      `texts` can be encoded wherever it stands in a word of up to 500 characters.
    - "unigram", for span corruption: as in T5, `</s>` after the text, and `<extra_id_99>` to `<extra_id_0>` at the end
      of the vocabulary. Unlike T5's it keeps white space. A character that is not in `texts` is unknown.

    `model_max_length` stays unset: a tokenizer knows nothing of a model's positions. The same text always gives the
    same "bpe"; the trainers of the other two break ties at random.

    Args:
        vocab_size: what `len(tokenizer)` will be, special tokens included.

    Raises:
        UserError: no text, or a `vocab_size` too small for the alphabet, or larger than the text can fill.
    """
    if algorithm not in ALGORITHMS:
        raise UserError(f"algorithm: {algorithm!r} is none of {', '.join(ALGORITHMS)}")
    characters: set[str] = set()

    def stream() -> Iterator[str]:
        for text in texts:
            characters.update(text)
            yield from split_text(text)
        if algorithm == "wordpiece":  # each character inside a word too, or a new word with it there is [UNK]
            yield from (f"a{character}" for character in sorted(characters))

    backend, sentinels = _untrained(algorithm, lowercase), SENTINELS.get(algorithm, [])
    special = list(dict.fromkeys(SPECIAL[algorithm].values()))
    options = {"vocab_size": max(vocab_size - len(sentinels), 1), "special_tokens": special}
    options["show_progress"] = sys.stderr.isatty()
    if algorithm == "bpe":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, min_frequency=2, **options)
    elif algorithm == "wordpiece":
        trainer = trainers.WordPieceTrainer(min_frequency=2, **options)
    else:
        alphabet = sorted(set("".join(special)))
        trainer = trainers.UnigramTrainer(initial_alphabet=alphabet, unk_token="<unk>", **options)
    try:
        backend.train_from_iterator(stream(), trainer)
        size = backend.get_vocab_size() + len(sentinels)
    except Exception as error:
        if "not large enough to contain all chars" not in str(error):  # Unigram's complaint; the others just grow
            raise
        size = len(characters | set(alphabet)) + len(special) + len(sentinels)
    if not "".join(characters).strip():
        raise UserError("there is no text to train a tokenizer on; choose data that is not empty")
    if size > vocab_size:
        raise UserError(
            f"vocab_size: {vocab_size} is too small, as special tokens and the characters of this text take {size}; "
            "set it well above that"
        )
    if size < vocab_size:
        raise UserError(
            f"vocab_size: {vocab_size} is out of reach, this text yields only {size} tokens; set it to {size} or less, "
            "or train on more text"
        )
    if algorithm == "unigram":  # special tokens are pieces: let "</s>" in a text cost more as one than as characters
        pieces = json.loads(backend.to_str())["model"]["vocab"]
        pieces = [(piece, -1000.0 if piece in special else score) for piece, score in pieces]
        backend.model = models.Unigram(pieces, unk_id=special.index("<unk>"))
    backend.add_special_tokens(special + sentinels)
    single, pair = TEMPLATES[algorithm]
    ids = [(token, backend.token_to_id(token)) for token in special]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens=sentinels,
        clean_up_tokenization_spaces=False,
        **SPECIAL[algorithm],
    )


def split_text(text: str) -> Iterator[str]:
    """A text in pieces that have the words of the whole for each of `ALGORITHMS`: the library needs memory for each.

    Between a letter, a space and a letter, and after a line that ends with something else than white space, each of
    them splits, and nothing further away matters. A text without such a place stays whole.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        place = CUT.search(text, start + PIECE_CHARACTERS)
        if place is None:
            break
        yield text[start : place.start()]
        start = place.start()
    yield text[start:] if start else text


def _untrained(algorithm: str, lowercase: bool) -> Tokenizer:
    if algorithm == "wordpiece":
        # 500, because BERT's 100 make [UNK] of a sentence in a script without spaces.
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=500))
        backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        return backend
    split = pre_tokenizers.Split(Regex(SPLITS[algorithm]), behavior="isolated")
    if algorithm == "bpe":
        backend = Tokenizer(models.BPE())
        units = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend = Tokenizer(models.Unigram())
        metaspace = {"replacement": SPACE, "prepend_scheme": "never", "split": False}
        units = pre_tokenizers.Metaspace(**metaspace)
        backend.decoder = decoders.Metaspace(**metaspace)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, units])
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    return backend


def load_tokenizer(name_or_path: str, key: str = "tokenizer_name_or_path", **options) -> PreTrainedTokenizerFast:
    """The fast tokenizer in a folder or of a model on the Hub, as `key` names it. Code that lies there is never run.

    Args:
        options: for `from_pretrained`, and saved with the tokenizer.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    remedy = "set another" + (", or make one with scripts/train_tokenizer.py" if key.startswith("tokenizer") else "")
    path = os.path.expanduser(name_or_path)
    if not os.path.isdir(path) and (path.startswith((".", "/")) or path.count("/") > 1):
        raise UserError(f"{key}: there is no folder {name_or_path}; {remedy}")
    try:
        check_model_folder(path)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False, **options)
    except Exception as error:  # a dozen kinds, among them bare Exception for a broken tokenizer.json
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")[:200]
        raise UserError(f"{key}: no tokenizer in {name_or_path} ({reason}); {remedy}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{key}: {name_or_path} has no fast tokenizer (tokenizer.json); {remedy}")
    # For a model's folder without tokenizer files some classes give their special tokens and nothing else.
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
    """The ids of tokens that text is made of, int64, ascending: neither control tokens nor ids without a token."""
    control = {*control_tokens(tokenizer).values(), *tokenizer.all_special_ids}
    return np.array(sorted(set(tokenizer.get_vocab().values()) - control), dtype=np.int64)


@dataclass(frozen=True)
class Framing:
    """The ids before and after each document."""

    prefix_id: int
    suffix_id: int


def framing(tokenizer: PreTrainedTokenizerFast, objective: Literal["clm", "mlm", "span"]) -> Framing:
    """What frames a document: bos and eos for "clm" (of them "span" needs eos), cls and sep for "mlm".

    Without a bos, eos stands at both ends (the convention of GPT-2), so that each token of a document is predicted from
    something. Without cls or sep, bos and eos take their places (descendants of Llama such as EuroBERT).

    Raises:
        UserError: the tokenizer lacks a token that the objective needs, or a pad; or, but for "mlm", its pad is its
            eos, which collators that tell padding by its id would never teach.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    bos, eos, cls, sep, mask, pad = (
        getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "cls", "sep", "mask", "pad")
    )
    if objective != "mlm":
        prefix, suffix = (eos if bos is None else bos), eos
        needs, algorithm = {"eos": eos}, {"clm": "bpe", "span": "unigram"}[objective]
    else:
        prefix, suffix = (bos if cls is None else cls), (eos if sep is None else sep)
        needs, algorithm = {"cls (or bos)": prefix, "sep (or eos)": suffix, "mask": mask}, "wordpiece"
    if missing := [token for token, token_id in needs.items() if token_id is None]:
        raise UserError(
            f"the tokenizer {name} lacks {' and '.join(missing)}, which {objective} needs; name such a token in its "
            f"tokenizer_config.json, or make a tokenizer with scripts/train_tokenizer.py --algorithm {algorithm}"
        )
    if pad is None or (objective != "mlm" and pad == eos):
        fault = "has no pad token" if pad is None else f"pads with its eos token {tokenizer.eos_token}"
        raise UserError(
            f"the tokenizer {name} {fault}; give it a pad_token of its own in its tokenizer_config.json, or with "
            "ensure_pad_token of unlabeled.data.tokenization"
        )
    return Framing(prefix, suffix)


def ensure_pad_token(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Where a tokenizer has no pad, or pads with its eos, let it pad with unk if that is not eos, else with `<|pad|>`.

    A new token makes `vocabulary_size(tokenizer)` grow; the caller resizes the embeddings.

    Returns:
        A sentence for the log, or None when nothing was done.
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
    """`tokenizer.add_special_tokens`, where the ids of new tokens are those of no others.

    The library numbers new tokens from the count of those that are there. With gaps, that may be an id in use.

    Raises:
        UserError: a new token would take the place of another one.
    """
    before = {index: token for token, index in tokenizer.get_vocab().items()}
    tokenizer.add_special_tokens(tokens, replace_extra_special_tokens=False)
    for value in tokens.values():
        for token in [value] if isinstance(value, str) else value:
            index = tokenizer.convert_tokens_to_ids(token)
            if before.get(index, token) != token:
                raise UserError(
                    f"the tokenizer {tokenizer.name_or_path} numbers the new token {token} as {index}, the id of "
                    f"{before[index]!r}, since its ids have gaps; name one of its own tokens, or take another tokenizer"
                )


def encode_batch(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], word_starts: bool = False
) -> list[np.ndarray] | tuple[list[np.ndarray], list[np.ndarray]]:
    """The ids of whole texts by the tokenizer's threads: no special tokens, no truncation, no padding, no warnings.

    The name of a control token inside a text, say "<|endoftext|>", is encoded as the characters that it is. Unigram
    models whose special tokens are pieces like any other, such as T5's, cannot do that: there the name is left out.
    Tags such as `<think>` are tokens where the tokenizer does not call them special.

    Args:
        word_starts: also mark the first token of each word. Words are the tokenizer's own (`word_ids`); where it does
            not split text into words, as Llama 2's, they start at SentencePiece's mark for a space.

    Returns:
        One array for each text, int32 (tokens,). With `word_starts` a pair: those, and as many of bool (tokens,).
    """
    encoded = _encode_as_text(tokenizer.backend_tokenizer, texts, word_starts)
    ids = [text.ids for text in encoded]
    # Tokens that control without being called special are still found in a text: there a copy without them reads it.
    names = _plain_control_tokens(tokenizer)
    quoting = [number for number, text in enumerate(texts) if names and any(name in text for name in names)]
    if quoting:
        renamed = _without_tokens(tokenizer, names)
        spelled = _encode_as_text(renamed.backend, [texts[number] for number in quoting], word_starts)
        for number, text in zip(quoting, spelled, strict=True):
            encoded[number] = text
            ids[number] = renamed.original_ids(text.ids)
    starts = [text.word_starts for text in encoded]
    special = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    control = np.setdiff1d(special, [tokenizer.unk_token_id] if tokenizer.unk_token_id is not None else [])
    for i, document in enumerate(ids):
        text = ~np.isin(document, control)
        if not text.all():
            ids[i] = document[text]
            if word_starts:
                starts[i] = starts[i][text]
    return (ids, starts) if word_starts else ids


def _encode_as_text(backend: Tokenizer, texts: list[str], word_starts: bool) -> list[EncodedText]:
    with bare_backend(backend, split_special_tokens=True):
        return encode_texts(backend, texts, word_starts=word_starts)


def token_offsets(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """The characters (start, end) of each token of the texts, as `return_offsets_mapping` gives them.

    The names of special tokens are encoded as the characters that they are.

    Returns:
        One array for each text, int64 (tokens, 2).
    """
    backend = tokenizer.backend_tokenizer
    with bare_backend(backend, split_special_tokens=True, post_process=True):
        return [text.offsets for text in encode_texts(backend, texts, offsets=True)]


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """{token: id} of the added tokens that control a model, whether or not the tokenizer names them.

    These are all special ones, those of the form `<|name|>`, and those that the chat template writes.
    """
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    return {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
        or PIPED.fullmatch(token.content)
        or (token.content in template and not token.content.isspace())
    }


def is_markup(token: str, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether an added token is one of a pair such as `<think>` and `</think>`, and not a special one.

    Such tokens are written inside of a turn: they structure what a model says, and do not end it.
    """
    tag = TAG.fullmatch(token)
    known = tokenizer.added_tokens_encoder
    if not tag or f"<{tag[1]}>" not in known or f"</{tag[1]}>" not in known:
        return False
    return not tokenizer.added_tokens_decoder[known[token]].special


def _plain_control_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The control tokens that are not special, so that `encode_special_tokens` does not know them, but for markup."""
    added = tokenizer.added_tokens_decoder
    return [
        token
        for token, index in control_tokens(tokenizer).items()
        if not added[index].special and not is_markup(token, tokenizer)
    ]


_COPIES: WeakKeyDictionary = WeakKeyDictionary()  # tokenizer: its copy without some tokens


def _without_tokens(tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> "RenamedTokens":
    """A copy that does not find these tokens in a text; made once for each tokenizer."""
    copy = _COPIES.get(tokenizer)
    if copy is None or set(copy.names) != set(tokens):
        copy = _COPIES[tokenizer] = RenamedTokens(tokenizer, tokens)
    return copy


@contextmanager
def bare_backend(backend: Tokenizer, split_special_tokens: bool = False, post_process: bool = False) -> Iterator[None]:
    """A tokenizer that neither cuts nor pads, and whose offsets cover all characters, until the block ends.

    Post-processors may trim the offsets of white space. Without special tokens to add that is all they do.

    Args:
        split_special_tokens: encode the names of special tokens as their characters.
        post_process: keep the post-processor.
    """
    truncation, padding = backend.truncation, backend.padding
    split, post_processor = backend.encode_special_tokens, backend.post_processor
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = split_special_tokens  # a misnomer: True splits their names like any text
    if not post_process:
        backend.post_processor = None
    try:
        yield
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
        backend.encode_special_tokens = split
        backend.post_processor = post_processor


class RenamedTokens:
    """A copy of a tokenizer in which some added tokens have names that no text contains, so that no text becomes one.

    Attributes:
        names: {token: its other name}.
        backend: the tokenizer, without truncation, padding and post-processor.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tokens: Iterable[str]):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        self.names = {token: f"|{hashlib.sha256(token.encode()).hexdigest()}|" for token in tokens}
        for added in state["added_tokens"]:
            added["content"] = self.names.get(added["content"], added["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self.names.get(token, token): index for token, index in model["vocab"].items()}
        else:  # Unigram has scores
            model["vocab"] = [(self.names.get(token, token), score) for token, score in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self.names.get(model["unk_token"], model["unk_token"])
        state |= {"truncation": None, "padding": None, "post_processor": None}
        self.backend = Tokenizer.from_str(json.dumps(state))
        # Tokens that are not in the model's vocabulary are numbered anew.
        self._original = np.arange(max(*self.backend.get_vocab().values(), len(tokenizer)) + 1, dtype=np.int32)
        for index, added in tokenizer.added_tokens_decoder.items():
            new = self.backend.token_to_id(self.names.get(added.content, added.content))
            self._original[new] = index

    def original_ids(self, ids: np.ndarray) -> np.ndarray:
        """The tokenizer's own ids for those of the copy."""
        return self._original[ids]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256, in hexadecimal, of what determines the ids of a text; the framing around it is not part of that."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {part: backend[part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    names = _plain_control_tokens(tokenizer)
    if names:  # they are read as characters, and which ones they are depends on the chat template too
        state["control_tokens"] = sorted(names)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def bytes_per_token(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> float:
    """UTF-8 bytes of the texts divided by their tokens, without framing.

    Raises:
        UserError: there is no text.
    """
    size, tokens, texts = 0, 0, iter(texts)
    while batch := list(islice(texts, 1000)):
        size += sum(len(text.encode("utf-8")) for text in batch)
        tokens += sum(map(len, encode_batch(tokenizer, batch)))
    if not tokens:
        raise UserError("there is no text to count the tokens of; choose data that is not empty")
    return size / tokens
