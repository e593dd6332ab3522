"""Text to ids in bounded memory: short texts in batches, long ones in windows that give the ids of the whole.

`tokenizers` keeps some 150 bytes for each byte of a text while it encodes it, and uses one thread for each text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

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
    word of the tokenizer, around which both have the same tokens. Where there is no such place the window grows, up to
    the whole text.

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
            encoded[number] = _join([convert(*part) for part in _encode_windows(backend, text)])
    return encoded


def keep_beginning(backend: Tokenizer, text: str, tokens: int) -> str:
    """The beginning of a text that is to be cut to its first `tokens` tokens: all of it, but of a long text a window.

    The first `tokens` tokens are those of the whole text.
    """
    if len(text) <= 2 * WINDOW:
        return text
    counted = 0
    for encoding, first, last, start in _encode_windows(backend, text):
        if last is None:
            break
        counted += last - first
        if counted > tokens:
            return text[: start + encoding.token_to_chars(last)[0] + MARGIN]
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
class _Window:
    """The encoding of the characters `start` to `end` of a text."""

    encoding: Encoding
    start: int
    end: int

    def tokens(self, first: int, last: int) -> tuple[int, list[tuple]]:
        """The tokens between two characters: (number of the first one, [(id, start, end, begins a word or not)])."""
        position = first
        number = None
        while number is None and position < last:
            number = self.encoding.char_to_token(position - self.start)
            position += 1
        if number is None:
            return 0, []
        tokens = []
        ids = self.encoding.ids
        begin = number
        for index in range(number, len(ids)):
            start, end = (self.start + place for place in self.encoding.token_to_chars(index))
            if start < first:
                begin = index + 1
                continue
            if end > last:
                break
            begins_word = index == 0 or self.encoding.token_to_word(index) != self.encoding.token_to_word(index - 1)
            tokens.append((ids[index], start, end, begins_word))
        return begin, tokens


def _encode_windows(backend: Tokenizer, text: str) -> Iterator[tuple[Encoding, int, int | None, int]]:
    """The encodings of a text's windows, each with what of it counts: (encoding, first token, last token, start)."""
    count = len(text) // WINDOW  # the last one is longer
    boundaries = _Boundaries(backend)
    ahead: dict[int, _Window] = {}

    def bounds(index: int, size: int) -> tuple[int, int]:
        end = len(text) if index + size >= count else (index + size) * WINDOW + OVERLAP
        return index * WINDOW, end

    def encode(places: list[tuple[int, int]]) -> list[_Window]:
        encodings = backend.encode_batch([text[start:end] for start, end in places], add_special_tokens=False)
        return [_Window(encoding, *place) for encoding, place in zip(encodings, places, strict=True)]

    def window(index: int) -> _Window:
        if index not in ahead:
            indices = range(index, min(index + BATCH_CHARACTERS // WINDOW, count))
            ahead.update(zip(indices, encode([bounds(i, 1) for i in indices]), strict=True))
        return ahead.pop(index)

    index, size, first = 0, 1, 0
    current = window(0)
    while index + size < count:
        following = window(index + size)
        cut = boundaries.find_cut(current, following)
        if cut is None:
            ahead[index + size] = following
            size *= 2
            for passed in [key for key in ahead if key < index + size]:
                del ahead[passed]
            start, end = bounds(index, size)
            if end - start > ANNOUNCED_CHARACTERS:
                gigabytes = (end - start) * MEMORY_PER_CHARACTER / 1e9
                print(
                    f"  this tokenizer splits {end - start:,} characters of a text nowhere, which takes about "
                    f"{gigabytes:.1f} GB of memory",
                    flush=True,
                )
            [current] = encode([(start, end)])
            continue
        yield current.encoding, first, cut[0], current.start
        first = cut[1]
        current, index, size = following, index + size, 1
    yield current.encoding, first, None, current.start


class _Boundaries:
    """Finds where the windows of a text can be joined."""

    def __init__(self, backend: Tokenizer):
        self.backend = backend

    def find_cut(self, left: _Window, right: _Window) -> tuple[int, int] | None:
        """The number of a token in both windows at which one may give way to the other, or None.

        Pre-tokenizers split from left to right: where they have split at the same character, they split alike from
        there on, until the end of a window comes into sight.
        """
        region = (right.start + MARGIN, min(left.end, right.end) - MARGIN)
        left_first, left_tokens = left.tokens(*region)
        right_first, right_tokens = right.tokens(*region)
        if not left_tokens or left_tokens != right_tokens:
            return None
        middle = len(left_tokens) // 2
        for number in sorted(range(1, len(left_tokens)), key=lambda number: abs(number - middle)):
            before, token = left_tokens[number - 1], left_tokens[number]
            if token[1] >= before[2] and (token[3] or self._never_merge(before[0], token[0])):
                return left_first + number, right_first + number
        return None

    def _never_merge(self, before: int, after: int) -> bool:
        """Whether no token of a BPE vocabulary has the last character of one token and the first of the next in it."""
        if type(self.backend.model).__name__ != "BPE" or self._unknown_id in (before, after):
            return False
        last, first = self.backend.id_to_token(before)[-1:], self.backend.id_to_token(after)[:1]
        return bool(last and first) and last + first not in self._pairs

    @cached_property
    def _unknown_id(self) -> int | None:
        unknown = getattr(self.backend.model, "unk_token", None)
        return self.backend.token_to_id(unknown) if unknown else None

    @cached_property
    def _pairs(self) -> set[str]:
        """All pairs of characters that stand beside each other in a token."""
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        return {token[index : index + 2] for token in vocabulary for index in range(len(token) - 1)}
