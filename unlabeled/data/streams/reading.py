"""Files here or on the Hub, divided into segments, read from any position on and read again where a source fails."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, TypeVar

import fsspec
import httpx
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from unlabeled.data.files import file_compression, file_format, local_files
from unlabeled.data.json_rows import JSON_SPACES, parse_row
from unlabeled.data.parquet_rows import BATCH_ROWS, batch_rows, needed_columns
from unlabeled.data.readers import text_of
from unlabeled.data.sources import Source
from unlabeled.data.text import decode, error_summary
from unlabeled.errors import UserError

STREAMED_FORMATS = ("parquet", "jsonl", "text")
SEGMENTS_PER_SHARD = 8  # at least; with many segments each, the shards end an epoch at about the same time
CHUNK_CHARACTERS = 32_000  # tokenized together; a resumed run reads the beginning of its chunk again
ATTEMPTS = 7  # to continue where a source fails, with waits of 1, 2, 4, ... seconds between them: about a minute
REQUEST_THREADS = 16


@dataclass(frozen=True)
class FileSegment:
    """The `index`-th of `count` equal segments of a file: rows of .parquet, lines of .jsonl, all of a .txt."""

    file: str
    index: int
    count: int


class Chunk(NamedTuple):
    """Consecutive texts of a segment.

    Attributes:
        end: the position after the chunk: a row of .parquet, a byte of .jsonl.
        progress: how much of the file lies before that, from 0 to 1.
        texts: the texts.
    """

    end: int
    progress: float
    texts: list[str]


class PositionedRow(NamedTuple):
    """A row, its name for messages, and the position after it."""

    end: int
    name: str
    row: dict[str, Any]


def stream_files(source: Source) -> dict[str, int]:
    """The files of a source that are not empty, here or on the Hub, and their sizes in bytes.

    Raises:
        UserError: there are none, or one of a format that cannot be read from the middle.
    """
    files = local_files(source) or _hub_files(source)
    for file in files:
        if file_format(file) not in STREAMED_FORMATS or file_compression(file):
            raise UserError(
                f"{file} cannot be read from the middle, so it cannot be streamed; convert it to .parquet or .jsonl, "
                "or remove stream"
            )
    with ThreadPoolExecutor(REQUEST_THREADS) as pool:
        sizes = pool.map(_file_size, files)
        filled = {file: size for file, size in zip(files, sizes, strict=True) if size}
    if not filled:
        raise UserError(f"{source.path} is empty; remove it or put text into it")
    return filled


def _hub_files(source: Source) -> list[str]:
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(source.path, name=source.name, revision=source.revision)
        return list(builder.config.data_files[source.split])
    except Exception as error:
        raise UserError(
            f"{source.path} is neither a local file nor a data set that the Hub lets you stream "
            f"({type(error).__name__}); check the name, its split, the network and HF_TOKEN"
        ) from error


def _file_size(file: str) -> int:
    filesystem, path = fsspec.core.url_to_fs(file)
    return filesystem.size(path)


def split_files(files: list[str], shards: int) -> list[FileSegment]:
    """Divide files into segments of equal length, about `SEGMENTS_PER_SHARD` for each shard or more.

    Files of plain text are one segment each.
    """
    count = -(-SEGMENTS_PER_SHARD * shards // len(files))
    segments = []
    for file in files:
        file_count = 1 if file_format(file) == "text" else count
        segments += [FileSegment(file, index, file_count) for index in range(file_count)]
    return segments


def read_chunks(
    segment: FileSegment, column: str, position: int | None = None, repaired: Counter | None = None
) -> Iterator[Chunk]:
    """The texts of a segment from a position on, a chunk at a time.

    The texts are those that `readers.read_documents` finds in the file.

    Args:
        segment: what to read.
        column: the column that holds the text.
        position: a row of .parquet, a byte of .jsonl where a line starts; None is the start of the segment.
        repaired: counts the rows that were changed, by reason.

    Raises:
        UserError: the file is damaged.
    """
    try:
        yield from _read_chunks(segment, column, position, repaired)
    except (OSError, pa.ArrowException) as error:
        # Arrow raises either for a damaged .parquet. Other errors of a disk or network are up to `read_with_retries`.
        is_damaged = not isinstance(error, OSError) or (error.errno is None and "://" not in segment.file)
        if not is_damaged:
            raise
        summary = error_summary(error)
        raise UserError(f"{segment.file} cannot be read as parquet ({summary}); repair it or leave it out") from error


def _read_chunks(segment: FileSegment, column: str, position: int | None, repaired: Counter | None) -> Iterator[Chunk]:
    file = segment.file
    with fsspec.open(file, "rb") as handle:
        if file_format(file) == "text":
            if not position:
                yield Chunk(1, 1.0, [decode(handle.read(), file)])
            return
        parquet = pq.ParquetFile(handle) if file_format(file) == "parquet" else None
        length = parquet.metadata.num_rows if parquet else handle.seek(0, os.SEEK_END)
        start = length * segment.index // segment.count
        end = length * (segment.index + 1) // segment.count
        if parquet:
            rows = _parquet_rows(parquet, column, file, start if position is None else position, end)
        else:
            rows = _jsonl_rows(handle, column, file, start, end, position, repaired)
        texts: list[str] = []
        characters = 0
        row_end = start
        for row_end, name, row in rows:
            texts.append(text_of(row, column, name))
            characters += len(texts[-1])
            if characters >= CHUNK_CHARACTERS:
                yield Chunk(row_end, row_end / length, texts)
                texts = []
                characters = 0
        if texts:
            yield Chunk(row_end, row_end / length, texts)


def _parquet_rows(parquet: pq.ParquetFile, column: str, file: str, row: int, end: int) -> Iterator[PositionedRow]:
    """The rows in [row, end)."""
    columns = needed_columns(parquet.schema_arrow, [column])
    group_start = 0
    for group in range(parquet.num_row_groups):
        group_rows = parquet.metadata.row_group(group).num_rows
        if row < group_start + group_rows and group_start < end:
            batch_start = group_start
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                wanted = batch.slice(max(row - batch_start, 0), max(end - max(row, batch_start), 0))
                for values in batch_rows(wanted, row, file):
                    row += 1
                    yield PositionedRow(row, f"row {row - 1} of {file}", values)
                batch_start += len(batch)
        group_start += group_rows


def _jsonl_rows(
    handle: BinaryIO, column: str, file: str, start: int, end: int, position: int | None, repaired: Counter | None
) -> Iterator[PositionedRow]:
    """The rows in the lines that start in the bytes [start, end), from `position` on."""
    if position is None:
        position = _next_line_start(handle, start)
    handle.seek(position)
    while position < end:
        line = handle.readline()
        name = f"the line at byte {position} of {file}"
        text = decode(line, name, begins_file=position == 0).strip(JSON_SPACES)
        position += len(line)
        if text:
            yield PositionedRow(position, name, parse_row(text, name, [column], repaired))


def _next_line_start(handle: BinaryIO, byte: int) -> int:
    """The first byte at or after `byte` where a line starts."""
    if byte == 0:
        return 0
    handle.seek(byte - 1)
    return byte - 1 + len(handle.readline())


Item = TypeVar("Item", bound=tuple)


def read_with_retries(read: Callable[[int | None], Iterator[Item]], position: int | None, name: str) -> Iterator[Item]:
    """Yield what `read(position)` yields; where it fails, wait and continue from the last position.

    Args:
        read: yields tuples of which the first member is the position after them.
        position: where to start.
        name: what is read, for messages.

    Raises:
        UserError: it failed `ATTEMPTS` times in a row.
    """
    failures = 0
    while True:
        try:
            for item in read(position):
                yield item
                position = item[0]
                failures = 0
            return
        except (OSError, httpx.TransportError) as error:
            failures += 1
            if failures == ATTEMPTS:
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise UserError(
                    f"{name} cannot be read ({reason}), tried {ATTEMPTS} times; check the disk, the network and "
                    "HF_TOKEN, then run the same command again"
                ) from error
            wait = 2 ** (failures - 1)
            tqdm.write(f"{name} failed ({type(error).__name__}); reading on in {wait} s")
            time.sleep(wait)
