"""Decoding bytes as UTF-8, and repairing what UTF-8 cannot express."""

import io
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

from unlabeled.errors import UserError

BOM = b"\xef\xbb\xbf"  # the byte order mark of UTF-8, which some editors write before the text
BLOCK_BYTES = 1 << 20  # decoded at a time
SURROGATE = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\ufffd"
HALF_PAIR = "half a surrogate pair"  # the reason under which repaired rows are counted


def decode(data: bytes, name: str, begins_file: bool = True) -> str:
    """Decode UTF-8.

    Args:
        data: the bytes.
        name: where they come from, for messages.
        begins_file: remove a byte order mark.

    Raises:
        UserError: the bytes are not UTF-8, or binary.
    """
    try:
        text = (data.removeprefix(BOM) if begins_file else data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start}); convert it, for example with iconv") from error
    if "\0" in text:
        raise UserError(f"{name} is binary, not text (a NUL at character {text.index(chr(0))}); leave it out")
    return text


def decode_lines(handle: io.BufferedIOBase, file: str) -> Iterator[str]:
    """The lines of a file, with their ends: \\n, \\r\\n or \\r.

    Raises:
        UserError: a line is not UTF-8, or binary.
    """
    return chain.from_iterable(io.StringIO(block, newline="") for block in _decode_blocks(handle, file))


def _decode_blocks(handle: io.BufferedIOBase, file: str) -> Iterator[str]:
    """The text of a file in blocks of whole lines. Decoding each line by itself would take twice as long."""
    lines = 0
    while block := handle.read(BLOCK_BYTES):
        block += handle.readline()
        try:
            yield decode(block, file, begins_file=lines == 0)
        except UserError:  # raise it for the line
            for number, line in enumerate(block.splitlines(keepends=True), start=lines + 1):
                decode(line, f"line {number} of {file}", begins_file=number == 1)
            raise
        lines += block.count(b"\n")


def repair(value: Any, repaired: Counter | None) -> Any:
    """Replace halves of surrogate pairs, which UTF-8 cannot express, by U+FFFD.

    Args:
        value: any value that JSON can express; keys are left alone.
        repaired: counts the value once if it is changed.
    """
    result = _replace_surrogates(value)
    if repaired is not None and result != value:
        repaired[HALF_PAIR] += 1
    return result


def _replace_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return SURROGATE.sub(REPLACEMENT, value)
    if isinstance(value, list):
        return [_replace_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {key: _replace_surrogates(item) for key, item in value.items()}
    return value


def error_summary(error: BaseException) -> str:
    """The first line of an error message, at most 200 characters, or the type of the error if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip(" .:")[:200]
