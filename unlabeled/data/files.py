"""The files behind the path of a source: those that are read, and those that are not, with the reason."""

import bz2
import glob
import gzip
import io
import lzma
import os
from dataclasses import dataclass, field

import pyarrow as pa

from unlabeled.data.sources import Source
from unlabeled.errors import UserError
from unlabeled.runtime.files import file_kind

# Formats by file ending, in upper or lower case.
FORMATS = {
    ".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet",
}  # fmt: skip
# Each ending may be followed by one of these.
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
ENDINGS = ", ".join(FORMATS)

SHOWN_PATHS = 5  # of the files that are skipped for the same reason

# Why a file is skipped.
HIDDEN = "hidden"
OTHER_ENDING = "ending that is not read"
README = "README.md, which describes a folder (name it in a path or a pattern to read it)"
EMPTY = "empty"
BROKEN_LINK = "link to nothing"
SEEN_FOLDER = "link to a folder that is read already"
NOT_FILES = ("pipe", "socket", "device", "special file")
FOLDER = "folder (name it, or end the pattern in /**)"


@dataclass
class FileList:
    """The files of a source.

    Attributes:
        paths: of the files that are read, in order.
        skipped: {reason: paths} of what is in the folder, or matches the pattern, and is not read. A folder stands for
            everything in it.
    """

    paths: list[str] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def add(self, path: str) -> None:
        """Add a file to those that are read or to those that are skipped.

        Raises:
            UserError: a link to a file that would be read is broken.
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
    """The format of a file by its ending, disregarding compression; None if such files are not read."""
    name = os.path.basename(path).lower()
    stem, ending = os.path.splitext(name)
    if ending in COMPRESSIONS:
        ending = os.path.splitext(stem)[1]
    return FORMATS.get(ending)


def file_compression(path: str) -> str | None:
    """How a file is compressed, by its ending; None if it is not."""
    return COMPRESSIONS.get(os.path.splitext(path.lower())[1])


def _is_empty(path: str) -> bool:
    if os.path.getsize(path):
        return False
    try:
        with open(path, "rb") as handle:  # files such as those in /proc have a size of 0 as well
            return not handle.read(1)
    except OSError:
        return False  # reading it will raise


def open_file(path: str) -> io.BufferedIOBase:
    """Open a file and decompress it while it is read. Only uncompressed files can be read from the middle."""
    compression = file_compression(path)
    if compression == "gzip":
        return gzip.open(path, "rb")
    if compression == "bz2":
        return bz2.open(path, "rb")
    if compression == "xz":
        return lzma.open(path, "rb")
    if compression == "zstd":  # the standard library reads it from Python 3.14 on
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(path), "zstd"))
    return open(path, "rb")


def find_files(source: Source) -> FileList:
    """The files of a local source, sorted by path; none if the path names a data set on the Hub.

    A path that exists is taken literally; otherwise it is a pattern. Folders are read recursively, also behind links.
    Hidden files and folders are skipped.

    Raises:
        UserError: there is no such file, or none that can be read.
    """
    path = os.path.expanduser(source.path)
    if os.path.isdir(path):
        files = _walk(path)
        if not files.paths:
            if files.skipped.get(EMPTY):
                raise UserError(f"{path} is empty, but for files without content; put text into it")
            not_read = f" (not read: {describe_skipped(files.skipped)})" if files.skipped else ""
            raise UserError(f"no {ENDINGS} file in the folder {path}{not_read}")
        return files
    if os.path.lexists(path):
        files = FileList()
        files.add(path)
    else:
        files = _match(path)
    looks_local = (
        os.path.splitext(path)[1] or glob.has_magic(path) or path.startswith((".", "/")) or path.count("/") > 1
    )
    if not files.paths and not files.skipped and looks_local:
        raise UserError(f"no file matches {path}; check the path, or fetch the demo text with `make demo-data`")
    if not files.paths and files.skipped:
        reason, paths = next(iter(files.skipped.items()))
        if reason == EMPTY:
            raise UserError(f"{paths[0]} is empty; remove it or put text into it")
        if reason == OTHER_ENDING:
            raise UserError(f"{paths[0]} ends in none of {ENDINGS}; convert it to one of them")
        if reason in NOT_FILES:
            raise UserError(f"{paths[0]} is a {reason}, and text is read more than once; write it to a file first")
        raise UserError(f"{paths[0]} is a {reason}; correct the path {path}")
    return files


def local_files(source: Source) -> list[str]:
    """The paths of `find_files`."""
    return find_files(source).paths


def skipped_files(sources: list[Source]) -> dict[str, list[str]]:
    """{reason: paths} of the files of all sources that are not read."""
    skipped: dict[str, list[str]] = {}
    for source in sources:
        for reason, paths in find_files(source).skipped.items():
            known_paths = skipped.setdefault(reason, [])
            known_paths.extend(path for path in paths if path not in known_paths)
    return skipped


def describe_skipped(skipped: dict[str, list[str]]) -> str:
    """Skipped files in one line: how many for each reason, and the first of them."""
    parts = []
    for reason, paths in skipped.items():
        shown = ", ".join(paths[:SHOWN_PATHS])
        if len(paths) > SHOWN_PATHS:
            shown += ", ..."
        noun = "path" if len(paths) == 1 else "paths"
        parts.append(f"{len(paths):,} {noun}, {reason}: {shown}")
    return "; ".join(parts)


def _walk(root: str) -> FileList:
    """All files below a folder. A folder that is reached by several paths is read once."""
    files = FileList()
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
                files.skip(path, HIDDEN)
            elif os.path.realpath(path) in seen:
                files.skip(path, SEEN_FOLDER)
            else:
                seen.add(os.path.realpath(path))
                entered.append(name)
        folders[:] = entered
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.startswith("."):
                files.skip(path, HIDDEN)
            elif name.lower() == "readme.md":
                files.skip(path, README)
            else:
                files.add(path)
    files.paths.sort()
    return files


def _match(pattern: str) -> FileList:
    """All files that match a pattern. Its leading folders that exist are taken literally."""
    parts = pattern.split(os.sep)
    literal = 0
    while literal < len(parts) - 1 and os.path.isdir(os.sep.join(parts[: literal + 1]) or os.sep):
        literal += 1
    folder = os.sep.join(parts[:literal])
    pattern = os.sep.join([glob.escape(folder), *parts[literal:]]) if literal else pattern
    files = FileList()
    folders = []
    for path in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isdir(path):
            folders.append(path)
        else:
            files.add(path)
    for path in folders:
        inside = path.rstrip(os.sep) + os.sep
        if not any(file.startswith(inside) for file in files.paths):
            files.skip(path, FOLDER)
    return files
