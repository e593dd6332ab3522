"""From the path of a source to the files that are read, and those that are not, each with the reason."""

import bz2
import glob
import gzip
import io
import lzma
import os
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import pyarrow as pa

from unlabeled.data.sources import Source
from unlabeled.errors import UserError
from unlabeled.runtime.files import file_kind

# The format behind each file ending, in upper or lower case.
FORMATS = {
    ".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet",
}  # fmt: skip
# Any of them may be followed by one of these.
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
ENDINGS = ", ".join(FORMATS)

SHOWN_PATHS = 5  # of the files that are skipped for one reason
HIDDEN = "hidden"
OTHER_ENDING = "ending that is not read"
README = "README.md, which describes a folder (name it in a path or a pattern to read it)"
EMPTY = "empty"
BROKEN_LINK = "link to nothing"
SEEN_FOLDER = "link to a folder that is read already"
NOT_FILES = ("pipe", "socket", "device", "special file")
FOLDER = "folder (name it, or end the pattern in /**)"


@dataclass
class FoundFiles:
    """The files of a source.

    Attributes:
        paths: what is read, in order.
        skipped: {reason: paths} of what lies in the folder, or matches the pattern, and is not read. A folder stands
            for all that is in it.
    """

    paths: list[str] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def add(self, path: str) -> None:
        """Sort a file in: to be read, or to be skipped.

        Raises:
            UserError: a file with an ending that is read is a link to nothing.
        """
        if not os.path.exists(path):
            if file_format(path):
                raise UserError(f"{path} is a link to a file that is not there; restore the file or remove the link")
            self.skip(path, BROKEN_LINK)
        elif not os.path.isfile(path):
            self.skip(path, str(file_kind(path)).removeprefix("a "))
        elif not file_format(path):
            self.skip(path, OTHER_ENDING)
        elif _is_empty(path):
            self.skip(path, EMPTY)
        else:
            self.paths.append(path)

    def skip(self, path: str, reason: str) -> None:
        self.skipped.setdefault(reason, []).append(path)


def file_format(path: str) -> str | None:
    """The format that the ending of a file stands for, without its compression; None for one that is not read."""
    name = os.path.basename(path).lower()
    stem, ending = os.path.splitext(name)
    if ending in COMPRESSIONS:
        ending = os.path.splitext(stem)[1]
    return FORMATS.get(ending)


def file_compression(path: str) -> str | None:
    """How a file is compressed, by its ending; None for one that is not."""
    return COMPRESSIONS.get(os.path.splitext(path.lower())[1])


def _is_empty(path: str) -> bool:
    if os.path.getsize(path):
        return False
    try:
        with open(path, "rb") as handle:  # files that are made while they are read have a size of 0 as well
            return not handle.read(1)
    except OSError:
        return False  # whoever reads it will say what is wrong


def open_file(path: str) -> BinaryIO:
    """The bytes of a file, decompressed as they are read. Only what is not compressed can be read from the middle."""
    compression = file_compression(path)
    if compression == "gzip":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if compression == "bz2":
        return cast(BinaryIO, bz2.open(path, "rb"))
    if compression == "xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if compression == "zstd":  # Python's own library reads it from 3.14 on
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(path), "zstd"))
    return open(path, "rb")


def find_files(source: Source) -> FoundFiles:
    """The files of a local source, sorted by path; none when the path names a data set on the Hub.

    A path that exists is taken literally; otherwise it is a pattern. Folders are read with all that is below them, also
    behind links; hidden files and folders are left out.

    Raises:
        UserError: there is no such file, or none that can be read.
    """
    path = os.path.expanduser(source.path)
    if os.path.isdir(path):
        found = _walk(path)
        if not found.paths:
            if found.skipped.get(EMPTY):
                raise UserError(f"{path} is empty, but for files without content; put text into it")
            not_read = f" (not read: {describe_skipped(found.skipped)})" if found.skipped else ""
            raise UserError(f"no {ENDINGS} file in the folder {path}{not_read}")
        return found
    if os.path.lexists(path):
        found = FoundFiles()
        found.add(path)
    else:
        found = _match(path)
    looks_local = (
        os.path.splitext(path)[1] or glob.has_magic(path) or path.startswith((".", "/")) or path.count("/") > 1
    )
    if not found.paths and not found.skipped and looks_local:
        raise UserError(f"no file matches {path}; check the path, or fetch the demo text with `make demo-data`")
    if not found.paths and found.skipped:
        reason, files = next(iter(found.skipped.items()))
        if reason == EMPTY:
            raise UserError(f"{files[0]} is empty; remove it or put text into it")
        if reason == OTHER_ENDING:
            raise UserError(f"{files[0]} ends in none of {ENDINGS}; convert it to one of them")
        if reason in NOT_FILES:
            raise UserError(f"{files[0]} is a {reason}, and text is read more than once; write it to a file first")
        raise UserError(f"{files[0]} is a {reason}; correct the path {path}")
    return found


def local_files(source: Source) -> list[str]:
    """The paths of `find_files`."""
    return find_files(source).paths


def skipped_files(sources: list[Source]) -> dict[str, list[str]]:
    """{reason: paths} of the files that lie where the sources are, and are not read."""
    skipped: dict[str, list[str]] = {}
    for source in sources:
        for reason, paths in find_files(source).skipped.items():
            known = skipped.setdefault(reason, [])
            known.extend(path for path in paths if path not in known)
    return skipped


def describe_skipped(skipped: dict[str, list[str]]) -> str:
    """What is not read, in one line: how many paths for each reason, and the first of them."""
    parts = []
    for reason, paths in skipped.items():
        shown = ", ".join(paths[:SHOWN_PATHS]) + (", ..." if len(paths) > SHOWN_PATHS else "")
        parts.append(f"{len(paths):,} {'path' if len(paths) == 1 else 'paths'}, {reason}: {shown}")
    return "; ".join(parts)


def _walk(root: str) -> FoundFiles:
    """All files below a folder. A folder that can be reached in several ways is read once."""
    found = FoundFiles()
    seen = {os.path.realpath(root)}

    def refuse(error: OSError) -> None:
        raise UserError(
            f"cannot read the folder {error.filename} ({error.strerror}); make it readable or leave it out"
        ) from error

    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        entered = []
        for name in sorted(folders):
            path = os.path.join(folder, name)
            if name.startswith("."):
                found.skip(path, HIDDEN)
            elif os.path.realpath(path) in seen:
                found.skip(path, SEEN_FOLDER)
            else:
                seen.add(os.path.realpath(path))
                entered.append(name)
        folders[:] = entered
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.startswith("."):
                found.skip(path, HIDDEN)
            elif name.lower() == "readme.md":
                found.skip(path, README)
            else:
                found.add(path)
    found.paths.sort()
    return found


def _match(pattern: str) -> FoundFiles:
    """All files that match a pattern, of which leading folders that exist are taken literally."""
    parts = pattern.split(os.sep)
    literal = 0
    while literal < len(parts) - 1 and os.path.isdir(os.sep.join(parts[: literal + 1]) or os.sep):
        literal += 1
    folder = os.sep.join(parts[:literal])
    pattern = os.sep.join([glob.escape(folder), *parts[literal:]]) if literal else pattern
    found = FoundFiles()
    folders = []
    for path in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isdir(path):
            folders.append(path)
        else:
            found.add(path)
    for path in folders:
        inside = path.rstrip(os.sep) + os.sep
        if not any(file.startswith(inside) for file in found.paths):
            found.skip(path, FOLDER)
    return found
