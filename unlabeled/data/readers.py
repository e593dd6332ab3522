"""Rows and documents of a source, as they were written, in memory that does not grow with the files.

No reader guesses types: JSON values keep the types of JSON, a .csv or .tsv holds nothing but text, and .parquet has
types of its own. What a row holds therefore never depends on the other rows.
"""

import logging
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa

from unlabeled.data.csv_rows import csv_rows
from unlabeled.data.files import file_compression, file_format, local_files, open_file
from unlabeled.data.json_rows import json_rows, jsonl_rows
from unlabeled.data.parquet_rows import open_parquet, parquet_rows
from unlabeled.data.sources import Source
from unlabeled.data.text import decode, error_summary
from unlabeled.errors import UserError

DELIMITERS = {"csv": ",", "tsv": "\t"}
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)  # that a damaged file raises


def read_rows(
    source: Source, columns: Sequence[str] | None = None, repaired: Counter | None = None
) -> Iterator[tuple[str, dict]]:
    """The rows of a source in order, each with its name for messages, such as `row 3 of data/train.jsonl`.

    Values are str, int, float, bool, None, list and dict (in .parquet also bytes, dates and others); those of .csv and
    .tsv are all str. Half of a surrogate pair, which UTF-8 cannot express, becomes U+FFFD.

    Args:
        source: of rows.
        columns: the columns that are needed, or None for all. A row may have more columns, and lacks those that its
            file lacks.
        repaired: counts the rows that were changed, by reason.

    Yields:
        (name of the row, row).

    Raises:
        UserError: a row cannot be read, or a file is plain text, which has no rows.
    """
    files = local_files(source)
    if not files:
        for number, row in enumerate(_hub_rows(source, columns)):
            yield f"row {number} of {source.path}", row
    for file in files:
        if file_format(file) == "text":
            raise UserError(f"{file} is plain text; examples are rows of .jsonl, .parquet or .csv")
        for number, row in enumerate(read_file(file, columns, repaired)):
            yield f"row {number} of {file}", row


def read_documents(source: Source, repaired: Counter | None = None) -> Iterator[str]:
    """The documents of a source in order. A null is an empty text.

    Raises:
        UserError: a missing, empty, binary or badly encoded file, a missing column, a value that is not text.
    """
    files = local_files(source)
    column = source.text_column
    if not files:
        for number, row in enumerate(_hub_rows(source, [column])):
            yield text_of(row, column, f"row {number} of {source.path}")
    for file in files:
        if file_format(file) == "text":
            yield read_text(file)
            continue
        for number, row in enumerate(read_file(file, [column], repaired)):
            yield text_of(row, column, f"row {number} of {file}")


def text_of(row: dict, column: str, row_name: str) -> str:
    """The text in a column of a row; empty if it is null.

    Args:
        row: the row.
        column: the column that holds the text.
        row_name: the row, for messages.

    Raises:
        UserError: the row has no such column, or something else than text in it.
    """
    if column not in row:
        raise UserError(f"{row_name} has no column {column!r}; set text_column to one of: {', '.join(row) or 'none'}")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"column {column!r} in {row_name} holds {type(text).__name__}, not text; set text_column to "
            "a column of text"
        )
    return text or ""


def class_names(source: Source, column: str) -> list[str] | None:
    """The names of the classes in a column, in order; None if the data do not name them.

    They come from a `ClassLabel` of `datasets`, in the schema of .parquet files that it wrote or on the Hub. The column
    may hold classes or lists of classes.

    Raises:
        UserError: the files of the source name them differently.
    """
    from datasets import Features

    files = local_files(source)
    if not files:
        return _names_in(_load_hub(source).features or {}, column)
    names: dict[str, list[str] | None] = dict.fromkeys(files)
    for file in files:
        if file_format(file) == "parquet":
            with open_parquet(file) as parquet:
                names[file] = _names_in(Features.from_arrow_schema(parquet.schema_arrow), column)
    for file in files:
        if names[file] != names[files[0]]:
            raise UserError(
                f"{files[0]} and {file} name the classes of {column} differently; write both with the same features"
            )
    return names[files[0]]


def _names_in(features: dict, column: str) -> list[str] | None:
    feature = features.get(column)
    if isinstance(feature, list):
        feature = feature[0]
    names = getattr(getattr(feature, "feature", feature), "names", None)  # `feature` of a list is that of its items
    return list(names) if names else None


def is_untyped(source: Source) -> bool:
    """Whether all values of the source are text because its files have no types (.csv, .tsv)."""
    formats = {file_format(file) for file in local_files(source)}
    return bool(formats) and formats <= set(DELIMITERS)


# --- Files ------------------------------------------------------------------------------------------------------------


def read_file(file: str, columns: Sequence[str] | None = None, repaired: Counter | None = None) -> Iterator[dict]:
    """The rows of one file in order; arguments as in `read_rows`.

    Raises:
        UserError: a row cannot be read, or there are none.
    """
    file_type = file_format(file)
    rows = 0
    try:
        if file_type == "parquet":
            file_rows = parquet_rows(file, columns)
        elif file_type == "json":
            file_rows = json_rows(file, columns, repaired)
        elif file_type == "jsonl":
            file_rows = jsonl_rows(file, columns, repaired)
        else:
            file_rows = csv_rows(file, DELIMITERS[file_type])
        for row in file_rows:
            yield row
            rows += 1
    except READ_ERRORS as error:
        raise UserError(
            f"{file} cannot be read as {file_compression(file) or file_type} after {rows} rows "
            f"({error_summary(error)}); repair it or leave it out"
        ) from error
    if rows == 0:
        raise UserError(f"{file} has no rows; remove it or put text into it")


def read_text(file: str) -> str:
    """The text of a .txt or .md file, without a byte order mark."""
    try:
        with open_file(file) as handle:
            data = handle.read()
    except READ_ERRORS as error:
        raise UserError(f"{file} cannot be read ({error_summary(error)}); repair it or leave it out") from error
    return decode(data, file)


# --- The Hub ----------------------------------------------------------------------------------------------------------


def _load_hub(source: Source):
    """The data set on the Hub, streamed or downloaded."""
    from datasets import load_dataset

    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # it logs what it raises
    options = {"split": source.split, "streaming": source.streaming, "revision": source.revision}
    try:
        return load_dataset(source.path, name=source.name, **options)
    except Exception as error:  # many types
        raise _hub_error(source, error, 0) from error


def _hub_rows(source: Source, columns: Sequence[str] | None) -> Iterator[dict]:
    dataset = _load_hub(source)
    rows = 0
    if columns is not None and dataset.features and all(name in dataset.features for name in columns):
        dataset = dataset.select_columns(list(columns))
    try:
        for row in dataset:
            yield row
            rows += 1
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # the readers below `datasets` raise many types
        raise _hub_error(source, error, rows) from error
    if rows == 0:
        raise UserError(f"{source.path} has no rows; choose another split or data set")


def _hub_error(source: Source, error: Exception, rows: int) -> UserError:
    summary = error_summary(error.__cause__ or error)
    return UserError(
        f"{source.path} cannot be read after {rows} rows ({summary}); check its name, its split, the network and "
        "HF_TOKEN"
    )
