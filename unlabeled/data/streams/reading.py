"""Files here or on the Hub, dealt in shares, read from any place on and read again where a source fails."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

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

STREAMED = ("parquet", "jsonl", "text")  # formats
SHARES = 8  # of the files for each lane, or more where there are more files: lanes then end an epoch together
CHUNK = 32_000  # characters that are tokenised together; what is behind in a chunk is read again on resuming
TRIES = 7  # to read on where a source fails, with waits of 1, 2, 4, ... seconds between them: about a minute


@dataclass(frozen=True)
class StreamShard:
    """The `index`-th of `count` stretches of a file: rows of .parquet, lines of .jsonl, all of a .txt."""

    file: str
    index: int
    count: int


def files_of(source: Source) -> dict[str, int]:
    """The files of a source that are not empty, here or on the Hub, and their sizes in bytes.

    Raises:
        UserError: there are none, or of a format that cannot be read from the middle.
    """
    files = local_files(source)
    if not files:
        from datasets import load_dataset_builder

        try:
            builder = load_dataset_builder(source.path, name=source.name, revision=source.revision)
            files = list(builder.config.data_files[source.split])
        except Exception as error:
            raise UserError(
                f"{source.path} is neither a local file nor a data set that the Hub lets you stream "
                f"({type(error).__name__}); check the name, its split, the network and HF_TOKEN"
            ) from error
    for file in files:
        if file_format(file) not in STREAMED or file_compression(file):
            raise UserError(
                f"{file} cannot be read from the middle, so it cannot be streamed; convert it to .parquet or .jsonl, "
                "or remove stream"
            )
    with ThreadPoolExecutor(16) as pool:  # each is a request where they are on the Hub
        sizes = pool.map(lambda file: fsspec.core.url_to_fs(file)[0].size(file), files)
        found = {file: size for file, size in zip(files, sizes, strict=True) if size}
    if not found:
        raise UserError(f"{source.path} is empty; remove it or put text into it")
    return found


def shares_of(files: list[str], lanes: int) -> list[StreamShard]:
    """Equal shares of the files, about `SHARES` for each lane or more."""
    count = -(-SHARES * lanes // len(files))
    pieces = {file: 1 if file_format(file) == "text" else count for file in files}
    return [StreamShard(file, index, pieces[file]) for file in files for index in range(pieces[file])]


def chunks(
    share: StreamShard, column: str, place: int | None = None, repaired: Counter | None = None
) -> Iterator[tuple[int, float, list[str]]]:
    """The texts of a share from a place on, a chunk at a time: (place after it, how much of the file that is, texts).

    A place is a row of .parquet and a byte of .jsonl where a line begins. The texts are those that `read_documents`
    finds in the file; `repaired` is as there.
    """
    try:
        yield from _chunks(share, column, place, repaired)
    except (OSError, pa.ArrowException) as error:
        # Arrow raises either for a damaged .parquet. Other errors of a disk or network are up to `read_with_retries`.
        damaged = not isinstance(error, OSError) or (error.errno is None and "://" not in share.file)
        if not damaged:
            raise
        summary = error_summary(error)
        raise UserError(f"{share.file} cannot be read as parquet ({summary}); repair it or leave it out") from error


def _chunks(
    share: StreamShard, column: str, place: int | None, repaired: Counter | None
) -> Iterator[tuple[int, float, list[str]]]:
    file = share.file
    with fsspec.open(file, "rb") as handle:
        if file_format(file) == "text":
            if not place:
                yield 1, 1.0, [decode(handle.read(), file)]
            return
        parquet = pq.ParquetFile(handle) if file_format(file) == "parquet" else None
        whole = parquet.metadata.num_rows if parquet else handle.seek(0, os.SEEK_END)
        low = whole * share.index // share.count
        high = whole * (share.index + 1) // share.count
        if parquet:
            rows = _rows(parquet, column, file, low if place is None else place, high)
        else:
            rows = _lines(handle, column, file, low, high, place, repaired)
        texts, size, after = [], 0, None
        for after, name, row in rows:
            texts.append(text_of(row, column, name))
            size += len(texts[-1])
            if size >= CHUNK:
                yield after, after / whole, texts
                texts, size = [], 0
        if texts:
            yield after, after / whole, texts


def _rows(parquet: pq.ParquetFile, column: str, file: str, row: int, high: int) -> Iterator[tuple[int, str, dict]]:
    """The rows in [row, high): (the row after it, its name for messages, row)."""
    columns = needed_columns(parquet.schema_arrow, [column])
    start = 0
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if row < start + rows and start < high:
            at = start
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                wanted = batch.slice(max(row - at, 0), max(high - max(row, at), 0))
                for values in batch_rows(wanted, row, file):
                    row += 1
                    yield row, f"row {row - 1} of {file}", values
                at += len(batch)
        start += rows


def _lines(
    handle: BinaryIO, column: str, file: str, low: int, high: int, place: int | None, repaired: Counter | None
) -> Iterator[tuple[int, str, dict]]:
    """The rows in the lines that begin in [low, high): (the byte after it, its name for messages, row)."""
    if place is None:
        handle.seek(max(low - 1, 0))
        place = handle.tell() + len(handle.readline()) if low else 0
    handle.seek(place)
    while place < high:
        line, name = handle.readline(), f"the line at byte {place} of {file}"
        text = decode(line, name, begins_file=place == 0).strip(JSON_SPACES)
        place += len(line)
        if text:
            yield place, name, parse_row(text, name, [column], repaired)


def read_with_retries(read: Callable, place: int | None, name: str) -> Iterator:
    """What `read(place)` yields, whose first item is the place after it; where it fails it is read on from there."""
    failures = 0
    while True:
        try:
            for found in read(place):
                yield found
                place, failures = found[0], 0
            return
        except (OSError, httpx.TransportError) as error:
            failures += 1
            if failures == TRIES:
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise UserError(
                    f"{name} cannot be read ({reason}), tried {TRIES} times; check the disk, the network and HF_TOKEN, "
                    "then run the same command again"
                ) from error
            tqdm.write(f"{name} failed ({type(error).__name__}); reading on in {2 ** (failures - 1)} s")
            time.sleep(2 ** (failures - 1))
