"""Rows of .jsonl, .ndjson and .json, with the types that JSON has: nothing is guessed from the values."""

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from unlabeled.data.files import open_file
from unlabeled.data.text import BOM, decode, repair
from unlabeled.errors import UserError

ARRAY_CHUNK = 1 << 20  # characters that are read at a time
JSON_SPACES = " \t\r\n"
WHITESPACE = re.compile(f"[{JSON_SPACES}]*")
# Only such an escape can bring half of a surrogate pair into a text.
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """An object of which no key stands for two values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {name!r} is there twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_row(
    text: str, place: str, columns: Sequence[str] | None = None, repaired: Counter | None = None
) -> dict[str, Any]:
    """The row in one line; arguments as of `readers.read_rows`.

    Raises:
        UserError: naming the place, for what is not one JSON object.
    """
    return _checked(_decode_json(text, place), text, place, columns, repaired)


def _decode_json(text: str, place: str) -> Any:
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not valid JSON ({error}); repair it or leave it out") from error


def _checked(row: Any, text: str, place: str, columns: Sequence[str] | None, repaired: Counter | None) -> dict:
    """A value that has to be an object, without halves of surrogate pairs in the columns that matter."""
    if not isinstance(row, dict):
        raise UserError(f"{place} holds {type(row).__name__}, not an object with columns; correct it or leave it out")
    if SURROGATE_ESCAPE.search(text):
        used = {key: value for key, value in row.items() if columns is None or key in columns}
        row = row | repair(used, repaired)
    return row


def jsonl_rows(file: str, columns: Sequence[str] | None = None, repaired: Counter | None = None) -> Iterator[dict]:
    """The rows of a file with an object in each line, or of one array. Blank lines are no rows.

    Raises:
        UserError: naming the line.
    """
    if _is_array(file):  # `datasets` reads arrays under this ending as well
        return _array_rows(file, columns, repaired)
    return _rows_of_lines(file, columns, repaired)


def json_rows(file: str, columns: Sequence[str] | None = None, repaired: Counter | None = None) -> Iterator[dict]:
    """The rows of a file that holds an array, an object in each line, or one object.

    Texts in an array are rows with the column `text`. One object is a row, unless its `data` is an array of objects:
    then these are the rows.

    Raises:
        UserError: naming row or line.
    """
    if _is_array(file):
        return _array_rows(file, columns, repaired)
    if _has_several_objects(file):
        return _rows_of_lines(file, columns, repaired)
    return _rows_of_object(file, columns, repaired)


def _is_array(file: str) -> bool:
    with open_file(file) as handle:
        begin = handle.read(4096).removeprefix(BOM).lstrip()
        while not begin:
            block = handle.read(4096)
            if not block:
                return False
            begin = block.lstrip()
    return begin.startswith(b"[")


def _has_several_objects(file: str) -> bool:
    """Whether the first line is an object of its own and there is another line."""
    with open_file(file) as handle:
        filled = (line for line in handle if line.removeprefix(BOM).strip())
        first, second = next(filled, b""), next(filled, None)
    try:
        json.loads(first.removeprefix(BOM))
    except ValueError:
        return False
    return second is not None


def _rows_of_lines(file: str, columns: Sequence[str] | None, repaired: Counter | None) -> Iterator[dict]:
    with open_file(file) as handle:
        for number, line in enumerate(handle, start=1):
            place = f"line {number} of {file}"
            text = decode(line, place, begins_file=number == 1).strip(JSON_SPACES)
            if text:
                yield parse_row(text, place, columns, repaired)


def _rows_of_object(file: str, columns: Sequence[str] | None, repaired: Counter | None) -> Iterator[dict]:
    with open_file(file) as handle:  # all of it is needed at a time
        text = decode(handle.read(), file).strip(JSON_SPACES)
    if not text:
        return
    value = _decode_json(text, file)
    rows = value.get("data") if isinstance(value, dict) else None
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        rows = [value]
    for number, item in enumerate(rows):
        yield _checked(item, text, f"row {number} of {file}", columns, repaired)


def _array_rows(file: str, columns: Sequence[str] | None, repaired: Counter | None) -> Iterator[dict]:
    with open_file(file) as handle, io.TextIOWrapper(handle, encoding="utf-8-sig", newline="") as stream:
        number = -1
        try:
            for number, (value, text) in enumerate(_elements(stream)):
                row = {"text": value} if isinstance(value, str) else value
                yield _checked(row, text, f"row {number} of {file}", columns, repaired)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file} is not UTF-8 text (after {number + 1} rows); convert it, for example with iconv"
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{file} is not valid JSON after {number + 1} rows ({error}); repair it or leave it out"
            ) from error


def _elements(stream: io.TextIOWrapper) -> Iterator[tuple[Any, str]]:
    """The elements of one array, each with its source text.

    Only one element, and what is read at a time, are in memory.

    Raises:
        ValueError: it is no array, or there is something after it.
    """
    buffer, position, size = "", 0, ARRAY_CHUNK
    expected = "["  # the character that has to come next; none before an element
    count = 0
    while True:
        position = WHITESPACE.match(buffer, position).end()
        if position == len(buffer):
            buffer, position = stream.read(ARRAY_CHUNK), 0
            if not buffer:
                raise ValueError("the array has no end")
            continue
        character = buffer[position]
        if expected == "[":
            position, expected = position + 1, ""
        elif character == "]" and (expected == "," or count == 0):
            break
        elif expected == ",":
            if character != ",":
                raise ValueError(f"{character!r} stands where a comma is expected")
            position, expected = position + 1, ""
        else:
            try:
                value, end = DECODER.raw_decode(buffer, position)
            except json.JSONDecodeError:
                more = stream.read(size)
                if not more:
                    raise
                buffer, position, size = buffer[position:] + more, 0, 2 * size
                continue
            yield value, buffer[position:end]
            position, expected, size = end, ",", ARRAY_CHUNK
            count += 1
    rest = buffer[position + 1 :]
    while rest:
        if rest.strip(JSON_SPACES):
            raise ValueError("there is something after the end of the array")
        rest = stream.read(ARRAY_CHUNK)
