"""Text to ids in bounded memory: short texts in batches, long ones in windows that give the ids of the whole text.

`tokenizers` needs about 150 bytes of memory for each byte of a text while it encodes it, and uses one thread per text.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from tokenizers import Encoding, Tokenizer

SPACE = "\u2581"  # SentencePiece's mark for a space
WINDOW = 200_000  # characters of a long text that are encoded by themselves
OVERLAP = 4_000  # characters that two windows share
MARGIN = 500  # characters at both ends of the overlap where a window may differ from the whole text
BATCH_CHARACTERS = 2_000_000  # encoded at a time
MEMORY_PER_CHARACTER = 150  # bytes of an encoding
ANNOUNCED_CHARACTERS = 5_000_000  # from this length on, a stretch that can only be encoded as a whole is announced


@dataclass(frozen=True)
class EncodedText:
    """A text as tokens.

    Attributes:
        ids: int32 (tokens,).
        offsets: int64 (tokens, 2), the characters (start, end) of each token, or None.
        word_starts: bool (tokens,), True for the first token of each word, or None.
    """

    ids: np.ndarray
    offsets: np.ndarray | None = None
    word_starts: np.ndarray | None = None


@contextmanager
def bare_backend(backend: Tokenizer, split_special_tokens: bool = False, post_process: bool = False) -> Iterator[None]:
    """Switch off truncation, padding and post-processing of a tokenizer until the block ends.

    Post-processors may trim the offsets of white space. Without special tokens to add, that is all they do.

    Args:
        backend: the tokenizer.
        split_special_tokens: encode the names of special tokens as their characters.
        post_process: keep the post-processor.
    """
    truncation = backend.truncation
    padding = backend.padding
    encode_special_tokens = backend.encode_special_tokens
    post_processor = backend.post_processor
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = split_special_tokens  # a misnomer: True splits the names of special tokens
    if not post_process:
        backend.post_processor = None
    try:
        yield
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
        backend.encode_special_tokens = encode_special_tokens
        backend.post_processor = post_processor


def encode_texts(
    backend: Tokenizer, texts: list[str], offsets: bool = False, word_starts: bool = False
) -> list[EncodedText]:
    """Encode texts as `backend.encode_batch(texts, add_special_tokens=False)` does, in bounded memory.

    A text of more than two windows is encoded in overlapping windows. Two windows are joined at the start of one of the
    tokenizer's words where white space or punctuation starts or ends, and around which both have the same tokens. Where
    there is no such place, the window grows, up to the whole text.

    Args:
        backend: the tokenizer.
        texts: the texts.
        offsets: also return the characters of each token.
        word_starts: also mark the first token of each word. Words are the tokenizer's own (`word_ids`). Where it does
            not split text into words, as Llama 2's, they start at SentencePiece's mark for a space.
    """
    encoded: list[EncodedText | None] = [None] * len(texts)
    convert = _Converter(backend, offsets, word_starts)
    needs_details = offsets or word_starts
    for numbers in _batch_short_texts(texts):
        # The fast variant keeps neither offsets nor words.
        encode = backend.encode_batch if needs_details else backend.encode_batch_fast
        encodings = encode([texts[number] for number in numbers], add_special_tokens=False)
        for number, encoding in zip(numbers, encodings, strict=True):
            encoded[number] = convert(encoding)
    for number, text in enumerate(texts):
        if encoded[number] is None:
            pieces = _LongText(backend, text, needs_details).encode()
            encoded[number] = _join([convert(piece.encoding, piece.first, piece.last, piece.start) for piece in pieces])
    return encoded


def keep_beginning(backend: Tokenizer, text: str, tokens: int) -> str:
    """The beginning of a text that contains its first `tokens` tokens, so that truncation needs less memory.

    The first `tokens` tokens of the result are those of the whole text. Short texts are returned whole.
    """
    if len(text) <= 2 * WINDOW:
        return text
    count = 0
    for piece in _LongText(backend, text, needs_details=False).encode():
        if piece.last is None:
            break
        count += piece.last - piece.first
        if count > tokens:
            return text[: piece.cut + MARGIN]
    return text


def _batch_short_texts(texts: list[str]) -> Iterator[list[int]]:
    """The numbers of the texts that need no windows, in batches."""
    numbers: list[int] = []
    size = 0
    for number, text in enumerate(texts):
        if len(text) > 2 * WINDOW:
            continue
        if numbers and size + len(text) > BATCH_CHARACTERS:
            yield numbers
            numbers = []
            size = 0
        numbers.append(number)
        size += len(text)
    if numbers:
        yield numbers


class _Converter:
    """Converts the tokens `first` to `last` of an encoding whose text starts at the character `start` to arrays."""

    def __init__(self, backend: Tokenizer, offsets: bool, word_starts: bool):
        self.offsets = offsets
        self.word_starts = word_starts
        self.marks_spaces = backend.token_to_id(SPACE) is not None

    def __call__(
        self, encoding: Encoding, first: int | None = None, last: int | None = None, start: int = 0
    ) -> EncodedText:
        ids = np.array(encoding.ids[first:last], dtype=np.int32)
        offsets = None
        if self.offsets:
            offsets = np.array(encoding.offsets[first:last], dtype=np.int64).reshape(-1, 2) + start
        word_starts = None
        if self.word_starts:
            word_starts = self._word_starts(encoding)[first:last]
        return EncodedText(ids, offsets, word_starts)

    def _word_starts(self, encoding: Encoding) -> np.ndarray:
        words = np.array(encoding.word_ids, dtype=np.float64)  # None becomes NaN, which differs from all others
        starts = np.ones(len(words), dtype=bool)
        starts[1:] = words[1:] != words[:-1]
        if self.marks_spaces:
            starts |= np.array([token.startswith(SPACE) for token in encoding.tokens], dtype=bool)
        return starts


def _join(parts: list[EncodedText]) -> EncodedText:
    def concatenate(arrays: list[np.ndarray | None]) -> np.ndarray | None:
        return None if arrays[0] is None else np.concatenate(arrays)

    return EncodedText(
        ids=np.concatenate([part.ids for part in parts]),
        offsets=concatenate([part.offsets for part in parts]),
        word_starts=concatenate([part.word_starts for part in parts]),
    )


@dataclass(frozen=True)
class _Piece:
    """The encoding of a window, and which of its tokens belong to no other piece.

    Attributes:
        encoding: of the window.
        first, last: numbers of the tokens [first, last) of the piece; None is the end.
        start: the character at which the window starts.
        cut: the character at which the token `last` starts.
    """

    encoding: Encoding
    first: int
    last: int | None
    start: int
    cut: int


class _LongText:
    """A text that is encoded in windows.

    Window i covers the characters from i to i + 1 times `WINDOW`, and half of `OVERLAP` more on both sides. The overlap
    of two windows, their border, is encoded by itself as well: its tokens tell where both windows agree.

    Args:
        backend: the tokenizer.
        text: the text.
        needs_details: keep offsets and words.
    """

    def __init__(self, backend: Tokenizer, text: str, needs_details: bool):
        self.backend = backend
        self.text = text
        self.count = len(text) // WINDOW  # the last window is longer
        if "FixedLength" in repr(backend.pre_tokenizer):  # it splits at multiples of a distance from the beginning
            self.count = 1
        self._encode_batch = backend.encode_batch if needs_details else backend.encode_batch_fast
        self._cache: dict[int, tuple[Encoding, _Border]] = {}

    def encode(self) -> Iterator[_Piece]:
        """The pieces of the text in order."""
        index = 0  # of the first window that the current encoding covers
        size = 1  # windows that it covers
        first = 0
        encoding, border = self._read_window(0)
        ids = encoding.ids
        while index + size < self.count:
            next_encoding, next_border = self._read_window(index + size)
            next_ids = next_encoding.ids
            cut = border.find_cut(ids, next_ids)
            if cut is not None:
                last = len(ids) - border.count + cut
                yield _Piece(encoding, first, last, self._bounds(index, size)[0], border.character_of(cut))
                index += size
                size = 1
                first = cut
                encoding, border, ids = next_encoding, next_border, next_ids
                continue
            self._cache[index + size] = next_encoding, next_border
            size *= 2
            del encoding, next_encoding
            encoding = self._encode_grown_window(index, size)
            ids = encoding.ids
            if index + size < self.count:
                border = self._read_window(index + size - 1)[1]
            for covered in [key for key in self._cache if key < index + size]:
                del self._cache[covered]
        yield _Piece(encoding, first, None, self._bounds(index, size)[0], len(self.text))

    def _bounds(self, index: int, size: int = 1) -> tuple[int, int]:
        """The characters (start, end) of `size` windows from `index` on."""
        start = max(index * WINDOW - OVERLAP // 2, 0)
        if index + size >= self.count:
            return start, len(self.text)
        return start, (index + size) * WINDOW + OVERLAP // 2

    def _read_window(self, index: int) -> tuple[Encoding, "_Border"]:
        """The encoding of a window, and the border at its end. A batch of windows is encoded at a time."""
        if index not in self._cache:
            indices = range(index, min(index + BATCH_CHARACTERS // WINDOW, self.count))
            borders = self._encode_borders(indices)
            windows = [self.text[slice(*self._bounds(i))] for i in indices]
            encodings = self._encode_batch(windows, add_special_tokens=False)
            for i, encoding, border in zip(indices, encodings, borders, strict=True):
                self._cache[i] = encoding, border
        return self._cache.pop(index)

    def _encode_borders(self, indices: range) -> list["_Border"]:
        centers = [(index + 1) * WINDOW for index in indices]
        starts = [center - OVERLAP // 2 for center in centers]
        texts = [self.text[start : center + OVERLAP // 2] for start, center in zip(starts, centers, strict=True)]
        encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        return [
            _Border(self.backend, encoding, text, start)
            for encoding, text, start in zip(encodings, texts, starts, strict=True)
        ]

    def _encode_grown_window(self, index: int, size: int) -> Encoding:
        start, end = self._bounds(index, size)
        if end - start > ANNOUNCED_CHARACTERS:
            gigabytes = (end - start) * MEMORY_PER_CHARACTER / 1e9
            print(
                f"  this tokenizer splits {end - start:,} characters of a text nowhere, which takes about "
                f"{gigabytes:.1f} GB of memory",
                flush=True,
            )
        [encoding] = self._encode_batch([self.text[start:end]], add_special_tokens=False)
        return encoding


class _Border:
    """The overlap of two windows: the end of the first one and the beginning of the second.

    Pre-tokenizers split from left to right: where they have split at the same character, they split alike from there
    on, until the end of a window comes into sight.

    Args:
        backend: the tokenizer.
        encoding: of the overlap.
        text: of the overlap.
        start: the character of the whole text at which it starts.
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
        """Tokens of the border."""
        return len(self.ids)

    def character_of(self, token: int) -> int:
        """The character of the whole text at which a token of the border starts."""
        return self.start + self.offsets[token][0]

    def find_cut(self, left: list[int], right: list[int]) -> int | None:
        """The number of a token of the border at which the second window may take over from the first, or None.

        From shortly after the start of the border on, the first window has to have the same tokens, up to the end that
        both share. Up to shortly before the end, the second window has to have them.

        Args:
            left: the ids of the first window.
            right: the ids of the second window.
        """
        limit = len(self.text) - MARGIN
        settled = next((number for number, (start, _) in enumerate(self.offsets) if start >= MARGIN), self.count)
        unsettled = next((number for number, (_, end) in enumerate(self.offsets) if end > limit), self.count)
        if settled >= unsettled or left[-(self.count - settled) :] != self.ids[settled:]:
            return None
        if right[:unsettled] != self.ids[:unsettled]:
            return None
        middle = (settled + unsettled) // 2
        candidates = sorted(range(settled + 1, unsettled), key=lambda number: abs(number - middle))
        return next((number for number in candidates if self._always_splits(number)), None)

    def _always_splits(self, number: int) -> bool:
        """Whether no token could reach across the start of this one, wherever the text has begun.

        Between two characters of one kind that cannot be known: digits, for example, are grouped from the first one.
        """
        position = self.offsets[number][0]
        if position < self.offsets[number - 1][1]:
            return False
        if _character_kind(self.text[position - 1]) == _character_kind(self.text[position]):
            return False
        if self.words[number] != self.words[number - 1]:
            return True
        return _never_merge(self.backend, self.ids[number - 1], self.ids[number])


def _character_kind(character: str) -> tuple[bool, bool]:
    return character.isspace(), character.isalnum()


def _never_merge(backend: Tokenizer, left_id: int, right_id: int) -> bool:
    """Whether no token of a BPE vocabulary contains the last character of one token before the first of the other."""
    if type(backend.model).__name__ != "BPE":
        return False
    pairs, unknown_id = _adjacent_characters(backend)
    last = backend.id_to_token(left_id)[-1:]
    first = backend.id_to_token(right_id)[:1]
    return bool(last and first) and unknown_id not in (left_id, right_id) and last + first not in pairs


@lru_cache(maxsize=4)
def _adjacent_characters(backend: Tokenizer) -> tuple[frozenset[str], int | None]:
    """All pairs of adjacent characters in the tokens of a vocabulary, and the id of the unknown token."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    unknown = getattr(backend.model, "unk_token", None)
    pairs = frozenset(token[index : index + 2] for token in vocabulary for index in range(len(token) - 1))
    return pairs, vocabulary.get(unknown) if unknown else None
