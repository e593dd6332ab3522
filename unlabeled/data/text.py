"""Bytes to text: UTF-8 and nothing else."""

import io
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any, BinaryIO

from unlabeled.errors import UserError

BOM = b"\xef\xbb\xbf"  # the byte order mark of UTF-8, which some editors write before the text
BLOCK_BYTES = 1 << 20  # that are decoded at a time
SURROGATE = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\ufffd"
HALF_PAIR = "half a surrogate pair"  # the reason under which repaired rows are counted


def decode(data: bytes, place: str, begins_file: bool = True) -> str:
    """Text of UTF-8, without the byte order mark at the beginning of its file.

    Raises:
        UserError: naming the place, for another encoding and for what is no text.
    """
    try:
        text = (data.removeprefix(BOM) if begins_file else data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place} is not UTF-8 text (byte {error.start}); convert it, for example with iconv"
        ) from error
    if "\0" in text:
        raise UserError(f"{place} is binary, not text (a NUL at character {text.index(chr(0))}); leave it out")
    return text


def decode_lines(handle: BinaryIO, file: str) -> Iterator[str]:
    """The lines of a file as text, with their ends: \\n, \\r\\n or \\r.

    Raises:
        UserError: naming the line, as `decode`.
    """
    return chain.from_iterable(io.StringIO(block, newline="") for block in _decode_blocks(handle, file))


def _decode_blocks(handle: BinaryIO, file: str) -> Iterator[str]:
    """The text of a file in pieces that end with a line; to decode each line by itself would take twice as long."""
    lines = 0
    while block := handle.read(BLOCK_BYTES):
        block += handle.readline()
        try:
            yield decode(block, file, begins_file=lines == 0)
        except UserError:  # find the line
            for number, line in enumerate(block.splitlines(keepends=True), start=lines + 1):
                decode(line, f"line {number} of {file}", begins_file=number == 1)
            raise
        lines += block.count(b"\n")


def repair(value: Any, repaired: Counter | None) -> Any:
    """A value without halves of surrogate pairs, which UTF-8 cannot express: each becomes U+FFFD.

    Args:
        value: what JSON can express; keys are left alone.
        repaired: where a changed value is counted, once.
    """
    found = _without_halves(value)
    if repaired is not None and found != value:
        repaired[HALF_PAIR] += 1
    return found


def _without_halves(value: Any) -> Any:
    if isinstance(value, str):
        return SURROGATE.sub(REPLACEMENT, value)
    if isinstance(value, list):
        return [_without_halves(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_halves(item) for key, item in value.items()}
    return value


def error_summary(error: BaseException) -> str:
    """The first line of what a library says, at most 200 characters; the name of the error where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip(" .:")[:200]
