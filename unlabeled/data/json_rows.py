"""Rows of .jsonl, .ndjson and .json files, with the types of JSON: nothing is guessed from the values."""

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, TextIO, cast

from unlabeled.data.files import open_file
from unlabeled.data.text import BOM, decode, repair
from unlabeled.errors import UserError

CHUNK_CHARACTERS = 1 << 20  # of an array that are read at a time
JSON_SPACES = " \t\r\n"
WHITESPACE = re.compile(f"[{JSON_SPACES}]*")
# Only such an escape can produce half of a surrogate pair.
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        duplicate = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {duplicate!r} occurs twice")
    return result


DECODER = json.JSONDecoder(object_pairs_hook=_object_without_duplicates)


def parse_row(
    text: str, row_name: str, columns: Sequence[str] | None = None, repaired: Counter | None = None
) -> dict[str, Any]:
    """The row in one line.

    Args:
        text: the line.
        row_name: the row, for messages.
        columns: the columns that are needed, or None for all.
        repaired: counts the rows that were changed, by reason.

    Raises:
        UserError: the line is not one JSON object.
    """
    return _check_row(_decode_json(text, row_name), text, row_name, columns, repaired)


def _decode_json(text: str, row_name: str) -> Any:
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{row_name} is not valid JSON ({error}); repair it or leave it out") from error


def _check_row(row: Any, text: str, row_name: str, columns: Sequence[str] | None, repaired: Counter | None) -> dict:
    """The value if it is an object, without halves of surrogate pairs in the columns that are needed."""
    if not isinstance(row, dict):
        raise UserError(
            f"{row_name} holds {type(row).__name__}, not an object with columns; correct it or leave it out"
        )
    if SURROGATE_ESCAPE.search(text):
        needed = {key: value for key, value in row.items() if columns is None or key in columns}
        row = row | repair(needed, repaired)
    return row


def jsonl_rows(file: str, columns: Sequence[str] | None = None, repaired: Counter | None = None) -> Iterator[dict]:
    """The rows of a file with one object in each line, or with one array. Blank lines are skipped.

    Raises:
        UserError: a line is not valid.
    """
    if _is_array(file):  # `datasets` reads arrays under this ending as well
        return _array_rows(file, columns, repaired)
    return _rows_of_lines(file, columns, repaired)


def json_rows(file: str, columns: Sequence[str] | None = None, repaired: Counter | None = None) -> Iterator[dict]:
    """The rows of a file with an array, with one object in each line, or with one object.

    Texts in an array are rows with the column `text`. A single object is a row, unless its `data` is an array of
    objects: then these are the rows.

    Raises:
        UserError: a row or line is not valid.
    """
    if _is_array(file):
        return _array_rows(file, columns, repaired)
    if _has_several_objects(file):
        return _rows_of_lines(file, columns, repaired)
    return _rows_of_object(file, columns, repaired)


def _is_array(file: str) -> bool:
    with open_file(file) as handle:
        beginning = handle.read(4096).removeprefix(BOM).lstrip()
        while not beginning:
            block = handle.read(4096)
            if not block:
                return False
            beginning = block.lstrip()
    return beginning.startswith(b"[")


def _has_several_objects(file: str) -> bool:
    """Whether the first line is valid by itself and there is another line."""
    with open_file(file) as handle:
        filled_lines = (line for line in handle if line.removeprefix(BOM).strip())
        first = next(filled_lines, b"")
        second = next(filled_lines, None)
    try:
        json.loads(first.removeprefix(BOM))
    except ValueError:
        return False
    return second is not None


def _rows_of_lines(file: str, columns: Sequence[str] | None, repaired: Counter | None) -> Iterator[dict]:
    with open_file(file) as handle:
        for number, line in enumerate(handle, start=1):
            row_name = f"line {number} of {file}"
            text = decode(line, row_name, begins_file=number == 1).strip(JSON_SPACES)
            if text:
                yield parse_row(text, row_name, columns, repaired)


def _rows_of_object(file: str, columns: Sequence[str] | None, repaired: Counter | None) -> Iterator[dict]:
    with open_file(file) as handle:  # the whole file has to be in memory
        text = decode(handle.read(), file).strip(JSON_SPACES)
    if not text:
        return
    value = _decode_json(text, file)
    rows = value.get("data") if isinstance(value, dict) else None
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        rows = [value]
    for number, item in enumerate(rows):
        yield _check_row(item, text, f"row {number} of {file}", columns, repaired)


def _array_rows(file: str, columns: Sequence[str] | None, repaired: Counter | None) -> Iterator[dict]:
    with (
        open_file(file) as handle,
        io.TextIOWrapper(cast(BinaryIO, handle), encoding="utf-8-sig", newline="") as stream,
    ):
        number = -1
        try:
            for number, (value, text) in enumerate(_elements(stream)):
                row = {"text": value} if isinstance(value, str) else value
                yield _check_row(row, text, f"row {number} of {file}", columns, repaired)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file} is not UTF-8 text (after {number + 1} rows); convert it, for example with iconv"
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{file} is not valid JSON after {number + 1} rows ({error}); repair it or leave it out"
            ) from error


def _elements(stream: TextIO) -> Iterator[tuple[Any, str]]:
    """The elements of one array, each with its source text. Only one element and one chunk are in memory.

    Raises:
        ValueError: the text is not an array, or there is something after it.
    """
    buffer = ""
    position = 0
    size = CHUNK_CHARACTERS  # doubled until an element is complete
    expected = "["  # the character that has to come next; empty before an element
    count = 0
    while True:
        position = WHITESPACE.match(buffer, position).end()
        if position == len(buffer):
            buffer = stream.read(CHUNK_CHARACTERS)
            position = 0
            if not buffer:
                raise ValueError("the array has no end")
            continue
        character = buffer[position]
        if expected == "[":
            position += 1
            expected = ""
        elif character == "]" and (expected == "," or count == 0):
            break
        elif expected == ",":
            if character != ",":
                raise ValueError(f"{character!r} stands where a comma is expected")
            position += 1
            expected = ""
        else:
            try:
                value, end = DECODER.raw_decode(buffer, position)
            except json.JSONDecodeError:
                more = stream.read(size)
                if not more:
                    raise
                buffer = buffer[position:] + more
                position = 0
                size *= 2
                continue
            yield value, buffer[position:end]
            position = end
            expected = ","
            size = CHUNK_CHARACTERS
            count += 1
    rest = buffer[position + 1 :]
    while rest:
        if rest.strip(JSON_SPACES):
            raise ValueError("there is something after the end of the array")
        rest = stream.read(CHUNK_CHARACTERS)
