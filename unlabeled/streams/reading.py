"""Files here or on the Hub, dealt in shares, read from any place on and read again where a source fails."""

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import fsspec
import httpx
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from unlabeled import UserError
from unlabeled.data.files import local_files
from unlabeled.data.readers import text_of
from unlabeled.data.sources import Source
from unlabeled.data.text import decode

SHARES = 8  # of the files for each lane, or more where there are more files: lanes then end an epoch together
CHUNK = 32_000  # characters that are tokenised together; what is behind in a chunk is read again on resuming
TRIES = 7  # to read on where a source fails, with waits of 1, 2, 4, ... seconds between them: about a minute


@dataclass(frozen=True)
class Share:
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
        if os.path.splitext(file)[1] not in (".parquet", ".jsonl", ".txt"):
            raise UserError(f"{file} cannot be streamed; convert it to .parquet or .jsonl, or remove stream")
    with ThreadPoolExecutor(16) as pool:  # each is a request where they are on the Hub
        sizes = pool.map(lambda file: fsspec.core.url_to_fs(file)[0].size(file), files)
        found = {file: size for file, size in zip(files, sizes, strict=True) if size}
    if not found:
        raise UserError(f"{source.path} is empty; remove it or put text into it")
    return found


def shares_of(files: list[str], lanes: int) -> list[Share]:
    """Equal shares of the files, about `SHARES` for each lane or more."""
    count = -(-SHARES * lanes // len(files))
    return [
        Share(file, index, pieces)
        for file in files
        for pieces in (1 if file.endswith(".txt") else count,)
        for index in range(pieces)
    ]


def chunks(share: Share, column: str, place: int | None = None) -> Iterator[tuple[int, float, list[str]]]:
    """The texts of a share from a place on, a chunk at a time: (place after it, how much of the file that is, texts).

    A place is a row of .parquet and a byte of .jsonl where a line begins.
    """
    file = share.file
    with fsspec.open(file, "rb") as handle:
        if file.endswith(".txt"):
            if not place:
                yield 1, 1.0, [decode(handle.read(), file)]
            return
        parquet = pq.ParquetFile(handle) if file.endswith(".parquet") else None
        whole = parquet.metadata.num_rows if parquet else handle.seek(0, os.SEEK_END)
        low, high = (whole * end // share.count for end in (share.index, share.index + 1))
        if parquet:
            rows = _rows(parquet, column, file, low if place is None else place, high)
        else:
            rows = _lines(handle, file, low, high, place)
        texts, size, after = [], 0, None
        for after, where, row in rows:
            texts.append(text_of(row, column, where))
            size += len(texts[-1])
            if size >= CHUNK:
                yield after, after / whole, texts
                texts, size = [], 0
        if texts:
            yield after, after / whole, texts


def _rows(parquet, column: str, file: str, row: int, high: int) -> Iterator[tuple[int, str, dict]]:
    """The rows in [row, high)."""
    columns = [column] if column in parquet.schema_arrow.names else None  # all of them, for `text_of` to name
    start = 0
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if row < start + rows and start < high:
            at = start
            for batch in parquet.iter_batches(1000, row_groups=[group], columns=columns):
                for values in batch.slice(max(row - at, 0), max(high - max(row, at), 0)).to_pylist():
                    row += 1
                    yield row, f"row {row - 1} of {file}", values
                at += len(batch)
        start += rows


def _lines(handle, file: str, low: int, high: int, place: int | None) -> Iterator[tuple[int, str, dict]]:
    """The lines that begin in [low, high)."""
    if place is None:
        handle.seek(max(low - 1, 0))
        place = handle.tell() + len(handle.readline()) if low else 0
    handle.seek(place)
    while place < high:
        line, where = handle.readline(), f"the line at byte {place} of {file}"
        place += len(line)
        if text := decode(line, where).strip():
            try:
                yield place, where, json.loads(text)
            except json.JSONDecodeError as error:
                raise UserError(f"{where} is no JSON ({error}); repair it or leave it out") from error


def patiently(read: Callable, place: int | None, name: str) -> Iterator:
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
