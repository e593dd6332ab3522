"""Text in: .txt, .jsonl, .csv and .parquet files, or a data set on the Hub, as a stream of documents or a mixture."""

import glob
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from itertools import pairwise

from unlabeled import UserError
from unlabeled.checkpoints import file_sha256

# How `datasets` calls the format behind each file ending.
FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# In a .csv the texts "NA" and "null" are text. A row group of a .parquet may be as large as the file, or have no rows.
READERS: dict[str, dict] = {"json": {}, "csv": {"keep_default_na": False}, "parquet": {"batch_size": 1000}}
BATCH_BYTES = 4_000_000  # text handed to the tokenizer's threads at a time
BATCH_DOCUMENTS = 10_000
# What stands before each part of a rearranged text, by the names that it has in the tokenizer of Qwen2.5.
FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


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
        for member in fields(self):
            value = getattr(self, member.name)
            if not isinstance(value, int | float if member.type is float else member.type):
                raise UserError(f"{member.name} of the source {self.path!r} is {value!r}; correct it")
        if not self.weight > 0:
            raise UserError(f"the weight of {self.path} is {self.weight}; give each source a positive weight")


@dataclass
class FIMArguments:
    """Text rearranged so that a causal model learns to fill in the middle as well (Bavarian et al. 2022)."""

    fim_rate: float = field(
        default=0.0, metadata={"help": "share of the training documents to rearrange for infilling"}
    )

    def __post_init__(self):
        if not 0 <= self.fim_rate <= 1:
            raise UserError(f"fim_rate is {self.fim_rate}; set it to a share between 0 and 1")

    def prepare_tokenizer(self, tokenizer) -> str | None:
        """Give the tokenizer those of `FIM_TOKENS` that it lacks and needs; a sentence for the log where it grew."""
        new = [token for token in FIM_TOKENS if self.fim_rate and token not in tokenizer.get_vocab()]
        if new:
            tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
        return f"new tokens to fill in the middle: {', '.join(new)}" if new else None


def parse_sources(value: str | dict | list, key: str, text_column: str = "text") -> list[Source]:
    """The sources that a YAML key names: one path, a mapping with `path`, or a list of either.

    Raises:
        UserError: naming `key`, for an unknown or missing field.
    """
    known = [member.name for member in fields(Source)]
    sources = []
    for item in value if isinstance(value, list) else [value]:
        item = {"path": item} if isinstance(item, str) else item
        if not isinstance(item, dict) or "path" not in item:
            raise UserError(f"{key}: {item!r} is neither a path nor a mapping with a path")
        for name in item:
            if name not in known:
                nearest = get_close_matches(name, known, 1, 0) or known
                raise UserError(f"{key}: a source has no field {name!r}; did you mean {nearest[0]!r}?")
        try:
            sources.append(Source(**{"text_column": text_column, **item}))
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
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
    """What determines the text of a source: sha256 of each local file, or the revision on the Hub."""
    files = local_files(source)
    if files:
        hashes, folder = {}, os.path.commonpath([os.path.dirname(file) for file in files])
        for file in files:
            try:
                hashes[os.path.relpath(file, folder)] = file_sha256(file)
            except OSError as error:
                raise UserError(f"cannot read {file} ({error.strerror}); make it readable or leave it out") from error
        return {"path": source.path, "text_column": source.text_column, "weight": source.weight, "files": hashes}
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
    for where, rows in _parts(source):
        if rows is None:
            yield _read_text(where)
        else:
            for number, row in enumerate(rows):
                yield text_of(row, source.text_column, f"row {number} of {where}")


def read_examples(source: Source) -> Iterator[tuple[str, dict]]:
    """The rows of a source with all their columns, in order: (the file or Hub name it comes from, row).

    Raises:
        UserError: as `read_documents`, and for .txt files.
    """
    for where, rows in _parts(source):
        if rows is None:
            raise UserError(f"{where} is plain text; examples are rows of .jsonl, .parquet or .csv")
        for row in rows:
            yield where, row


def _parts(source: Source) -> Iterator[tuple[str, Iterator[dict] | None]]:
    """Each file of a source, or its data set on the Hub, with its rows; None for the rows of a .txt file."""
    files = local_files(source)
    if not files:
        yield source.path, _rows(source, source.path, source.path, name=source.name, revision=source.revision)
    for file in files:
        if os.path.getsize(file) == 0:
            raise UserError(f"{file} is empty; remove it or put text into it")
        form = FORMATS[os.path.splitext(file)[1]]
        options = {"data_files": file, "split": "train", "streaming": True}
        yield file, None if form == "text" else _rows(source, file, form, **options, **READERS[form])


def _read_text(file: str) -> str:
    with open(file, "rb") as handle:  # `identity` has read it already
        return decoded(handle.read(), file)


def decoded(data: bytes, where: str) -> str:
    """Text of UTF-8, and nothing else."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 text (byte {error.start}); convert it, for example with iconv"
        ) from error
    if "\0" in text:
        raise UserError(f"{where} is binary, not text (a NUL at character {text.index(chr(0))}); leave it out")
    return text


def _rows(source: Source, where: str, loader: str, **options) -> Iterator[dict]:
    """The rows of what `datasets.load_dataset(loader, **options)` gives."""
    from datasets import load_dataset

    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # they log what they raise
    options = {"split": source.split, "streaming": source.streaming} | options
    rows = 0
    try:
        if loader == "csv":
            _check_first_row(where)
        for row in load_dataset(loader, **options):
            yield row
            rows += 1
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # the readers below `datasets` raise a dozen kinds
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            raise UserError(
                f"{where} is not UTF-8 text (after {rows} rows); convert it, for example with iconv"
            ) from error
        reason = (str(cause).strip().splitlines() or [type(error).__name__])[0].strip(" .:")[:200]
        local = "data_files" in options
        remedy = "repair it or leave it out" if local else "check its name, its split, the network and HF_TOKEN"
        raise UserError(f"{where} cannot be read as {loader} after {rows} rows ({reason}); {remedy}") from error
    if rows == 0:
        raise UserError(f"{where} has no rows; remove it or put text into it")


def text_of(row: dict, column: str, where: str) -> str:
    """The text of a row, empty where it is null."""
    if not isinstance(row, dict) or column not in row:
        has = ", ".join(row) if isinstance(row, dict) else "none"
        raise UserError(f"{where} has no column {column!r}; set text_column to one of: {has}")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"column {column!r} in {where} holds {type(text).__name__}, not text; set text_column to a column of text"
        )
    return text or ""


def _check_first_row(file: str) -> None:
    """Refuse a .csv of which pandas would silently lose text: the fields of a first row that the header lacks."""
    import pandas

    if not isinstance(pandas.read_csv(file, nrows=1).index, pandas.RangeIndex):
        raise UserError(f"{file} has more fields in its first row than in its header; quote texts that contain commas")


def batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """The texts in lists that keep the tokenizer's threads busy and fit in memory."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def mix(sources: list[Source], open_source: Callable, max_tokens: int | None) -> Iterator[tuple[int, object]]:
    """Documents of several sources in proportion to their weights in tokens: (index of the source, document).

    `open_source(source)` begins to read a source; what it yields has `ids`.

    The next document comes from the source that is furthest behind its share. A source that ends begins again, until
    each has been read once, or `max_tokens` are reached; so with one source this is simply that source.
    """
    streams = [open_source(source) for source in sources]
    tokens, rounds = [0] * len(sources), [0] * len(sources)
    while sources and (max_tokens is None or sum(tokens) < max_tokens):
        index = min(range(len(sources)), key=lambda i: tokens[i] / sources[i].weight)
        document = next(streams[index], None)
        if document is None:
            rounds[index] += 1
            if not tokens[index]:
                raise UserError(f"{sources[index].path} has no text; leave it out")
            if all(rounds):
                return
            streams[index] = open_source(sources[index])
            continue
        tokens[index] += len(document.ids)
        yield index, document


def unit_hash(raw: bytes) -> float:
    """A number in [0, 1) from the content alone; what lies below `eval_fraction` is held out, wherever it stands."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") / 2**64


def cut_in_three(text: str) -> tuple[str, str, str]:
    """(prefix, middle, suffix): cut at two characters, each place equally likely; which ones is up to the text."""
    raw = text.encode("utf-8")
    first, second = sorted(int(unit_hash(name + raw) * (len(text) + 1)) for name in (b"one", b"two"))
    return text[:first], text[first:second], text[second:]


def rearrange(texts: list[str], tokenizer, encode: Callable, frame, max_length: int) -> dict[str, tuple[list, int]]:
    """Texts as pieces of at most `max_length` tokens to learn to fill in the middle from: {text: (pieces, rearranged)}.

    Bavarian et al. 2022: prefix, suffix, middle (PSM) or suffix, prefix, middle (SPM), as often, each behind its sign
    and tokenised by itself. A piece that grows too long for that stays as it is.
    """
    import numpy as np

    prefix, suffix, middle = ([index] for index in tokenizer.convert_tokens_to_ids(list(FIM_TOKENS)))
    room = max_length - 9  # bos, eos, three signs, and 4 tokens of growth by cuts inside of tokens: 98 % need no more
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    offsets = tokenizer(texts, return_offsets_mapping=True, **options)["offset_mapping"]
    cuts = [[0, *(start for start, _ in of[room::room]), len(text)] for of, text in zip(offsets, texts, strict=True)]
    pieces = [[text[a:b] for a, b in pairwise(at) if a < b] for at, text in zip(cuts, texts, strict=True)]
    parts = iter(encode(tokenizer, [part for of in pieces for piece in of for part in cut_in_three(piece)]))
    found: dict[str, tuple[list, int]] = {}
    for text, of in zip(texts, pieces, strict=True):
        framed, rearranged = [], 0
        for piece in of:
            before, between, after = next(parts), next(parts), next(parts)
            psm = unit_hash(b"order" + piece.encode("utf-8")) < 0.5
            order = [prefix, before, suffix, after, middle] if psm else [prefix, suffix, after, middle, before]
            ids = [*order, between, [frame.suffix_id]]
            if 1 + sum(map(len, ids)) <= max_length:
                rearranged += 1
            else:  # the end of the text is where it was
                ids = [*encode(tokenizer, [piece]), [frame.suffix_id] * (piece is of[-1])]
            framed.append(np.concatenate([[frame.prefix_id], *ids]).astype(np.int32))
        found[text] = framed, rearranged
    return found
