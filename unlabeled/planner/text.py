"""The size of a text, in bytes and tokens."""

import csv
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from unlabeled.data.files import file_compression, file_format, find_files, open_file
from unlabeled.data.parquet_rows import open_parquet
from unlabeled.data.readers import DELIMITERS, read_file, text_of
from unlabeled.data.sources import Source
from unlabeled.errors import UserError

BYTES_PER_TOKEN = 4.0  # assumed without a tokenizer: English text in vocabularies of 32,000 to 50,000 tokens
SAMPLE_BYTES = 1_000_000  # of text that are tokenized to measure the bytes per token


@dataclass(frozen=True)
class TextSize:
    """The size of a text.

    Attributes:
        path: The file, folder or glob.
        bytes: UTF-8 bytes of text. In formats other than plain text and JSON, extrapolated from the beginning of each
            file.
        bytes_per_token: Measured on a sample, or `BYTES_PER_TOKEN`.
        tokens: `bytes / bytes_per_token`.
        measured: Whether a tokenizer was used.
        vocab_size: The largest token id plus 1; None without a tokenizer.
    """

    path: str
    bytes: int
    bytes_per_token: float
    tokens: float
    measured: bool
    vocab_size: int | None = None


def measure_text(path: str, tokenizer: str | None, column: str = "text") -> TextSize:
    """Measure the size of a file, folder or glob of text.

    Args:
        path: As in `train_data` of a recipe.
        tokenizer: The folder of a tokenizer, or None to assume `BYTES_PER_TOKEN`.
        column: The column that holds the text.

    Raises:
        UserError: There is no such file, the files have no such column, or the folder holds no tokenizer.
    """
    try:
        files = find_files(Source(path)).paths
    except UserError as error:
        raise UserError(f"--data: {error}") from error
    total_bytes = 0
    sample = b""
    for file in files:
        try:
            beginning, file_bytes = _measure_file(file, column)
        except (KeyError, ValueError, csv.Error) as error:
            raise UserError(f"--data {file} has no column {column!r}; convert it, or give --tokens") from error
        sample += beginning[: max(SAMPLE_BYTES - len(sample), 0)]
        total_bytes += file_bytes
    if not total_bytes:
        raise UserError(f"--data {path} holds no text; give a file, folder or glob of text, or --tokens")
    if tokenizer is None:
        tokens = total_bytes / BYTES_PER_TOKEN
        return TextSize(path, total_bytes, BYTES_PER_TOKEN, tokens, measured=False)
    bytes_per_token, vocab_size = _measure_tokenizer(tokenizer, sample)
    return TextSize(path, total_bytes, bytes_per_token, total_bytes / bytes_per_token, True, vocab_size)


def _measure_tokenizer(folder: str, sample: bytes) -> tuple[float, int]:
    """Return the bytes per token of a sample, and the size of the vocabulary."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(f"--tokenizer {folder} has no tokenizer.json that can be read; train one") from error
    encoding = tokenizer.encode(sample.decode("utf-8", errors="ignore"), add_special_tokens=False)
    return len(sample) / len(encoding.ids), max(tokenizer.get_vocab().values()) + 1


def _measure_file(file: str, column: str) -> tuple[bytes, int]:
    """Return the first text of a file, and the bytes of text in the whole file.

    Raises:
        KeyError, ValueError, csv.Error, UserError: There is no such column, or the file cannot be read.
    """
    form = file_format(file)
    if form == "json":
        return _measure_json(file, column)
    if form == "parquet":
        return _measure_parquet(file, column)
    raw, file_bytes = _read_beginning(file)
    if form == "text":
        return raw, file_bytes
    lines = raw.decode("utf-8-sig", errors="ignore").split("\n")
    rows: Iterable[dict]
    if form in DELIMITERS:
        rows = csv.DictReader((f"{line}\n" for line in lines), delimiter=DELIMITERS[form])
    else:
        rows = map(json.loads, filter(str.strip, lines))
    text = b"\n".join((row[column] or "").encode() for row in rows)
    return text, round(file_bytes * len(text) / max(len(raw), 1))


def _measure_json(file: str, column: str) -> tuple[bytes, int]:
    texts = [text_of(row, column, file).encode() for row in read_file(file, [column])]
    return b"\n".join(texts), sum(map(len, texts))


def _measure_parquet(file: str, column: str) -> tuple[bytes, int]:
    with open_parquet(file) as parquet:
        batch = next(parquet.iter_batches(batch_size=1000, columns=[column]))
        texts = [str(value).encode() for value in batch.column(column).to_pylist() if value is not None]
        return b"\n".join(texts), sum(map(len, texts)) * parquet.metadata.num_rows // batch.num_rows


def _read_beginning(file: str) -> tuple[bytes, int]:
    """Return the first lines of a file, and the size of the whole file, decompressed."""
    with open_file(file) as handle:
        beginning = handle.read(SAMPLE_BYTES)
        beginning += handle.readline()
        if not file_compression(file):
            return beginning, os.path.getsize(file)
        size = len(beginning)
        while block := handle.read(SAMPLE_BYTES):
            size += len(block)
    return beginning, size
