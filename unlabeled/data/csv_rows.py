"""Rows of .csv and .tsv files: all fields are text, and broken quoting is refused."""

import csv
from collections import Counter
from collections.abc import Iterator

from unlabeled.data.files import open_file
from unlabeled.data.text import decode_lines
from unlabeled.errors import UserError

MAX_FIELD_CHARACTERS = (1 << 31) - 1  # the default of the csv module refuses texts of more than 131,072


def csv_rows(file: str, delimiter: str) -> Iterator[dict]:
    """The rows of a file with a header. Quotes may enclose delimiters, line breaks and, doubled, quotes (RFC 4180).

    Blank lines are skipped. Columns without a name, such as the index that pandas writes, are not read.

    Args:
        file: the path.
        delimiter: between fields.

    Raises:
        UserError: a row has another number of fields than the header, or its quotes are broken.
    """
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    with open_file(file) as handle:
        reader = csv.reader(decode_lines(handle, file), delimiter=delimiter, strict=True)
        try:
            filled = (fields for fields in reader if fields)
            header = next(filled, [])
            _check_header(header, file)
            for number, fields in enumerate(filled):
                if len(fields) != len(header):
                    raise UserError(
                        f"row {number} of {file} (line {reader.line_num}) has {len(fields)} fields and the header "
                        f"{len(header)}; quote texts that contain delimiters, quotes or line breaks"
                    )
                row = dict(zip(header, fields, strict=True))
                row.pop("", None)
                yield row
        except csv.Error as error:
            raise UserError(
                f"line {reader.line_num} of {file} is not valid .csv ({error}); enclose texts that contain quotes in "
                "quotes, and double those inside"
            ) from error


def _check_header(header: list[str], file: str) -> None:
    for name, count in Counter(header).items():
        if name and count > 1:
            raise UserError(f"{file} has {count} columns with the name {name!r}; rename all but one of them")
