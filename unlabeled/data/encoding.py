"""Text to ids in bounded memory: short texts in batches, long ones in windows that give the ids of the whole.

`tokenizers` keeps some 150 bytes for each byte of a text while it encodes it, and uses one thread for each text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from tokenizers import Encoding, Tokenizer

SPACE = "\u2581"  # SentencePiece's mark for a space
WINDOW = 200_000  # characters of a long text that are encoded by themselves
OVERLAP = 4_000  # characters that two windows share
MARGIN = 500  # characters at both ends of the overlap, where a window may differ from the whole
BATCH_CHARACTERS = 2_000_000  # encoded at a time
MEMORY_PER_CHARACTER = 150  # bytes, of an encoding
ANNOUNCED_CHARACTERS = 5_000_000  # a stretch that can only be encoded as one is announced from this length on


@dataclass(frozen=True)
class EncodedText:
    """A text as tokens.

    Attributes:
        ids: int32 (tokens,).
        offsets: int64 (tokens, 2), the characters (start, end) of each token, or None.
        word_starts: bool (tokens,), the first token of each word, or None.
    """

    ids: np.ndarray
    offsets: np.ndarray | None = None
    word_starts: np.ndarray | None = None


def encode_texts(
    backend: Tokenizer, texts: list[str], offsets: bool = False, word_starts: bool = False
) -> list[EncodedText]:
    """What `backend.encode_batch(texts, add_special_tokens=False)` gives, in bounded memory.

    A text of more than two windows is encoded in windows that overlap. Two windows are joined at the beginning of a
    word of the tokenizer where white space or punctuation begins or ends, and around which both have the same tokens.
    Where there is no such place the window grows, up to the whole text.

    Args:
        offsets, word_starts: also give these. Words are the tokenizer's own (`word_ids`); where it does not split text
            into words, as Llama 2's, they start at SentencePiece's mark for a space.
    """
    encoded: list[EncodedText | None] = [None] * len(texts)
    convert = _Converter(backend, offsets, word_starts)
    for numbers in _batches(texts):
        # The fast one keeps neither offsets nor words.
        encode = backend.encode_batch if offsets or word_starts else backend.encode_batch_fast
        encodings = encode([texts[number] for number in numbers], add_special_tokens=False)
        for number, encoding in zip(numbers, encodings, strict=True):
            encoded[number] = convert(encoding)
    for number, text in enumerate(texts):
        if encoded[number] is None:
            pieces = _encode_windows(backend, text, whole=offsets or word_starts)
            encoded[number] = _join([convert(piece.encoding, piece.first, piece.last, piece.start) for piece in pieces])
    return encoded


def keep_beginning(backend: Tokenizer, text: str, tokens: int) -> str:
    """The beginning of a text that is to be cut to its first `tokens` tokens: all of it, but of a long text a window.

    The first `tokens` tokens are those of the whole text.
    """
    if len(text) <= 2 * WINDOW:
        return text
    counted = 0
    for piece in _encode_windows(backend, text, whole=False):
        if piece.last is None:
            break
        counted += piece.last - piece.first
        if counted > tokens:
            return text[: piece.cut + MARGIN]
    return text


def _batches(texts: list[str]) -> Iterator[list[int]]:
    """The numbers of the texts that are not long, in batches."""
    numbers, size = [], 0
    for number, text in enumerate(texts):
        if len(text) > 2 * WINDOW:
            continue
        if numbers and size + len(text) > BATCH_CHARACTERS:
            yield numbers
            numbers, size = [], 0
        numbers.append(number)
        size += len(text)
    if numbers:
        yield numbers


class _Converter:
    """Makes arrays of the tokens `first` to `last` of an encoding whose text begins at the character `start`."""

    def __init__(self, backend: Tokenizer, offsets: bool, word_starts: bool):
        self.offsets, self.word_starts = offsets, word_starts
        self.marked = backend.token_to_id(SPACE) is not None

    def __call__(
        self, encoding: Encoding, first: int | None = None, last: int | None = None, start: int = 0
    ) -> EncodedText:
        ids = np.array(encoding.ids[first:last], dtype=np.int32)
        offsets = words = None
        if self.offsets:
            offsets = np.array(encoding.offsets[first:last], dtype=np.int64).reshape(-1, 2) + start
        if self.word_starts:
            words = self._word_starts(encoding)[first:last]
        return EncodedText(ids, offsets, words)

    def _word_starts(self, encoding: Encoding) -> np.ndarray:
        words = np.array(encoding.word_ids, dtype=np.float64)  # None becomes NaN, which differs from all others
        starts = np.ones(len(words), dtype=bool)
        starts[1:] = words[1:] != words[:-1]
        if self.marked:
            starts |= np.array([token.startswith(SPACE) for token in encoding.tokens], dtype=bool)
        return starts


def _join(parts: list[EncodedText]) -> EncodedText:
    def concatenate(name: str) -> np.ndarray | None:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    return EncodedText(concatenate("ids"), concatenate("offsets"), concatenate("word_starts"))


@dataclass(frozen=True)
class _Piece:
    """The encoding of a window of a text, and what of it is not in another one.

    Attributes:
        first, last: numbers of tokens, of which the second does not belong to the piece; None is the end.
        start, end: the characters of the window.
        cut: the character at which the token `last` begins.
    """

    encoding: Encoding
    first: int
    last: int | None
    start: int
    end: int
    cut: int


def _encode_windows(backend: Tokenizer, text: str, whole: bool) -> Iterator[_Piece]:
    """A long text in pieces. Their windows end and begin in what is around a border, which is encoded by itself, too.

    Args:
        whole: with offsets and words.
    """
    count = len(text) // WINDOW  # the last one is longer
    if "FixedLength" in repr(backend.pre_tokenizer):  # where it splits depends on how far away the beginning is
        count = 1
    encode_batch = backend.encode_batch if whole else backend.encode_batch_fast
    ahead: dict[int, tuple[Encoding, _Border | None]] = {}

    def bounds(index: int, size: int) -> tuple[int, int]:
        start = max(index * WINDOW - OVERLAP // 2, 0)
        return start, len(text) if index + size >= count else (index + size) * WINDOW + OVERLAP // 2

    def encode(places: list[tuple[int, int]]) -> list[Encoding]:
        return encode_batch([text[start:end] for start, end in places], add_special_tokens=False)

    def window(index: int) -> tuple[Encoding, "_Border | None"]:
        """A window, and the border at its end."""
        if index not in ahead:
            indices = range(index, min(index + BATCH_CHARACTERS // WINDOW, count))
            places = [(i * WINDOW + WINDOW - OVERLAP // 2, i * WINDOW + WINDOW + OVERLAP // 2) for i in indices]
            around = backend.encode_batch([text[start:end] for start, end in places], add_special_tokens=False)
            borders = [
                _Border(backend, encoding, text[start:end], start)
                for encoding, (start, end) in zip(around, places, strict=True)
            ]
            encodings = encode([bounds(i, 1) for i in indices])
            ahead.update(zip(indices, zip(encodings, borders, strict=True), strict=True))
        return ahead.pop(index)

    index, size, first = 0, 1, 0
    current, border = window(0)
    ids = current.ids
    while index + size < count:
        following, border_after = window(index + size)
        ids_after = following.ids
        cut = border.find_cut(ids, ids_after)
        start, end = bounds(index, size)
        if cut is not None:
            yield _Piece(
                current, first, len(ids) - border.count + cut, start, end, border.start + border.offsets[cut][0]
            )
            index, size, first = index + size, 1, cut
            current, border, ids = following, border_after, ids_after
            continue
        ahead[index + size] = following, border_after
        size *= 2
        end = bounds(index, size)[1]
        if end - start > ANNOUNCED_CHARACTERS:
            gigabytes = (end - start) * MEMORY_PER_CHARACTER / 1e9
            print(
                f"  this tokenizer splits {end - start:,} characters of a text nowhere, which takes about "
                f"{gigabytes:.1f} GB of memory",
                flush=True,
            )
        del current, following
        [current] = encode([(start, end)])
        ids = current.ids
        if index + size < count:
            border = window(index + size - 1)[1]
        for passed in [key for key in ahead if key < index + size]:
            del ahead[passed]
    yield _Piece(current, first, None, *bounds(index, size), len(text))


class _Border:
    """What is around the border of two windows: the end of the first one and the beginning of the second.

    Pre-tokenizers split from left to right: where they have split at the same character, they split alike from there
    on, until the end of a window comes into sight.
    """

    def __init__(self, backend: Tokenizer, encoding: Encoding, text: str, start: int):
        self.backend = backend
        self.text = text
        self.start = start
        self.ids = encoding.ids
        self.words = encoding.word_ids
        self.offsets = encoding.offsets

    @property
    def count(self) -> int:
        return len(self.ids)

    def find_cut(self, left: list[int], right: list[int]) -> int | None:
        """The number of a token of the border at which the second window may take over from the first, or None.

        From shortly after the beginning of the border on, the first window has the same tokens, up to the end that
        both share; and up to shortly before the end the second window has them.

        Args:
            left, right: the ids of the windows.
        """
        limit = len(self.text) - MARGIN
        settled = next((number for number, (start, _) in enumerate(self.offsets) if start >= MARGIN), self.count)
        ahead = next((number for number, (_, end) in enumerate(self.offsets) if end > limit), self.count)
        if settled >= ahead or left[-(self.count - settled) :] != self.ids[settled:]:
            return None
        if right[:ahead] != self.ids[:ahead]:
            return None
        middle = (settled + ahead) // 2
        return next(filter(self._splits, sorted(range(settled + 1, ahead), key=lambda n: abs(n - middle))), None)

    def _splits(self, number: int) -> bool:
        """Whether no token could reach across the beginning of this one, wherever the text has begun.

        Where the kind of the characters does not change, that may be otherwise: digits go in threes from the first one.
        """
        place = self.offsets[number][0]
        if place < self.offsets[number - 1][1] or _kind(self.text[place - 1]) == _kind(self.text[place]):
            return False
        return self.words[number] != self.words[number - 1] or _never_merge(
            self.backend, self.ids[number - 1], self.ids[number]
        )


def _kind(character: str) -> tuple[bool, bool]:
    return character.isspace(), character.isalnum()


def _never_merge(backend: Tokenizer, before: int, after: int) -> bool:
    """Whether no token of a BPE vocabulary has the last character of one token and the first of the next in it."""
    if type(backend.model).__name__ != "BPE":
        return False
    pairs, unknown = _pairs_in_vocabulary(backend)
    last, first = backend.id_to_token(before)[-1:], backend.id_to_token(after)[:1]
    return bool(last and first) and unknown not in (before, after) and last + first not in pairs


@lru_cache(maxsize=4)
def _pairs_in_vocabulary(backend: Tokenizer) -> tuple[frozenset[str], int | None]:
    """All pairs of characters that stand beside each other in a token, and the id of the unknown token."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    unknown = getattr(backend.model, "unk_token", None)
    pairs = frozenset(token[index : index + 2] for token in vocabulary for index in range(len(token) - 1))
    return pairs, vocabulary.get(unknown) if unknown else None
