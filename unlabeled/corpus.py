"""Text in: files, folders and globs of .txt, .jsonl, .csv and .parquet, or a data set on the Hub, as a stream of documents."""

import glob
import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches

from unlabeled.errors import UserError

# How `datasets` calls the format behind each file ending.
FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Source:
    """One source of documents.

    Attributes:
        path: a file, a folder, a glob, or the name of a data set on the Hub. A .txt file is one document; in the other
            formats a row is one.
        weight: share of the tokens among several sources (any positive scale).
        text_column: the column that holds the text.
        name, split, revision, streaming: for the Hub, as in `datasets.load_dataset`; `streaming` reads without
            downloading the whole set first.
    """

    path: str
    weight: float = 1.0
    text_column: str = "text"
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False

    def __post_init__(self):
        if not self.weight > 0:
            raise UserError(f"the weight of {self.path} is {self.weight}; give each source a positive weight")


def parse_sources(value: str | dict | list, key: str, text_column: str = "text") -> list[Source]:
    """The sources that a YAML key names: one path, a mapping with `path`, or a list of either.

    Raises:
        UserError: naming `key`, for an unknown or missing field.
    """
    known = [field.name for field in fields(Source)]
    sources = []
    for item in value if isinstance(value, list) else [value]:
        item = {"path": item} if isinstance(item, str) else item
        if not isinstance(item, dict) or "path" not in item:
            raise UserError(f"{key}: {item!r} is neither a path nor a mapping with a path")
        for name in item:
            if name not in known:
                nearest = get_close_matches(name, known, 1, 0) or known
                raise UserError(f"{key}: a source has no field {name!r}; did you mean {nearest[0]!r}?")
        sources.append(Source(**{"text_column": text_column, **item}))
    return sources


def local_files(source: Source) -> list[str]:
    """The files of a local source, sorted; an empty list when the path names a data set on the Hub."""
    path = os.path.expanduser(source.path)
    if os.path.isdir(path):
        files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
        files = sorted(file for file in files if os.path.splitext(file)[1] in FORMATS)
        if not files:
            raise UserError(f"no {', '.join(FORMATS)} file in the folder {path}")
        return files
    files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    looks_local = (
        os.path.splitext(path)[1] or glob.has_magic(path) or path.startswith((".", "/")) or path.count("/") > 1
    )
    if not files and looks_local:
        raise UserError(f"no file matches {path}; check the path, or fetch the demo text with `make demo-data`")
    for file in files:
        if os.path.splitext(file)[1] not in FORMATS:
            raise UserError(f"{file} ends in none of {', '.join(FORMATS)}; convert it to one of them")
    return files


def identity(source: Source) -> dict:
    """What determines the text of a source, for fingerprints and lineage: sha256 of each local file, or the Hub revision."""
    files = local_files(source)
    if files:
        return {"path": source.path, "text_column": source.text_column, "weight": source.weight} | {
            "files": {os.path.basename(file): file_sha256(file) for file in files}
        }
    from huggingface_hub import HfApi

    try:
        revision = HfApi().dataset_info(source.path, revision=source.revision).sha
    except Exception as error:
        raise UserError(
            f"{source.path} is neither a local file nor a data set that the Hub lets you read "
            f"({type(error).__name__}); check the name, the network and HF_TOKEN"
        ) from error
    return asdict(source) | {"revision": revision}


def read_documents(source: Source) -> Iterator[str]:
    """The documents of a source, in order.

    Raises:
        UserError: a missing, empty, binary or badly encoded file, a missing column, a value that is not text.
    """
    files = local_files(source)
    if not files:
        yield from _read_rows(source, source.path, source.path, name=source.name, revision=source.revision)
        return
    for file in files:
        if os.path.getsize(file) == 0:
            raise UserError(f"{file} is empty; remove it or put text into it")
        form = FORMATS[os.path.splitext(file)[1]]
        if form == "text":
            yield _read_text(file)
        else:
            yield from _read_rows(source, file, form, data_files=file, split="train", streaming=True)


def _read_text(file: str) -> str:
    with open(file, "rb") as handle:
        data = handle.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}); convert it, for example with iconv") from error
    if "\0" in text:
        raise UserError(f"{file} is binary, not text (a NUL at character {text.index(chr(0))}); leave it out")
    return text


def _read_rows(source: Source, where: str, loader: str, **options) -> Iterator[str]:
    """The text column of what `datasets.load_dataset(loader, **options)` gives."""
    from datasets import load_dataset

    options = {"split": source.split, "streaming": source.streaming} | options
    rows = 0
    try:
        for row in load_dataset(loader, **options):
            rows += 1
            if source.text_column not in row:
                names = ", ".join(row)
                raise UserError(f"{where} has no column {source.text_column!r}; set text_column to one of: {names}")
            text = row[source.text_column]
            if text is None:
                text = ""
            if not isinstance(text, str):
                raise UserError(
                    f"column {source.text_column!r} of {where} holds {type(text).__name__}, not text, in row {rows - 1}"
                )
            yield text
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # the readers below `datasets` raise a dozen kinds
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{where} cannot be read as {loader} after {rows} rows: {reason[0][:200]}") from error
    if rows == 0:
        raise UserError(f"{where} has no rows; remove it or put text into it")


def file_sha256(path: str) -> str:
    """sha256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
