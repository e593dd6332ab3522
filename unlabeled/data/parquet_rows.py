"""Rows of .parquet files: only the columns that are needed, a batch at a time."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from unlabeled.data.files import file_compression, open_file
from unlabeled.errors import UserError

BATCH_ROWS = 1000  # a row group may be as large as the file
# Pages are read as they are needed, not a whole column of a row group.
BUFFERED: dict = {"buffer_size": 1 << 20, "pre_buffer": False}


@contextmanager
def open_parquet(file: str) -> Iterator[pq.ParquetFile]:
    """Open a file. One that is compressed as a whole is unpacked into a temporary file, since its end is read first."""
    with open_file(file) as handle:
        if not file_compression(file):
            yield pq.ParquetFile(handle, **BUFFERED)
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(handle, unpacked, 1 << 20)
            yield pq.ParquetFile(unpacked, **BUFFERED)


def needed_columns(schema: pa.Schema, columns: Sequence[str] | None) -> list[str] | None:
    """The columns to read. None, which is all of them, if one is missing: the error message then names the others."""
    if columns is None or any(name not in schema.names for name in columns):
        return None
    return list(columns)


def parquet_rows(file: str, columns: Sequence[str] | None = None) -> Iterator[dict]:
    """The rows of a file, with nested and dictionary types as lists, dicts and values.

    Args:
        file: the path.
        columns: the columns that are needed, or None for all.

    Raises:
        UserError: a text is not UTF-8.
    """
    with open_parquet(file) as parquet:
        first = 0
        for batch in parquet.iter_batches(BATCH_ROWS, columns=needed_columns(parquet.schema_arrow, columns)):
            yield from batch_rows(batch, first, file)
            first += len(batch)


def batch_rows(batch: pa.RecordBatch, first: int, file: str) -> list[dict]:
    """The rows of a record batch.

    Args:
        batch: the rows.
        first: the number of its first row in the file.
        file: the path, for messages.
    """
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # strings are not checked when they are written or read
        for index in range(len(batch)):
            try:
                batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"row {first + index} of {file} is not UTF-8 text (byte {error.start}); convert it"
                ) from error
        raise
