"""Reading and writing small files: JSON, text and hashes.

Only regular files of a limited size are read, as opening a pipe would wait for ever.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unlabeled.errors import UserError

LIMIT_BYTES = 500_000_000  # the tokenizer.json of 250,000 tokens has about 20 MB
HASH_BLOCK_BYTES = 1 << 20
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def file_kind(path: str | Path) -> str | None:
    """Name the kind of a path that is not a regular file, such as "a pipe"; None for a regular file.

    Raises:
        OSError: The path does not exist or may not be accessed.
    """
    mode = os.stat(path).st_mode
    return None if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "a special file")


def read_small_file(path: str | Path) -> str:
    """Read the text of a file.

    Raises:
        OSError: It cannot be read, is not a regular file, or has more than `LIMIT_BYTES`; `strerror` says which.
        UnicodeDecodeError: It is not UTF-8.
    """
    kind = file_kind(path)
    if kind == "a folder":
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if kind:
        raise OSError(errno.EINVAL, f"it is {kind}, and only a regular file is read", str(path))
    if os.path.getsize(path) > LIMIT_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {LIMIT_BYTES:,} bytes", str(path))
    return Path(path).read_text(encoding="utf-8")


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: The text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | Path) -> Any:
    """Read the value in a JSON file.

    Raises:
        OSError, ValueError: As `read_small_file` and `parse_json` do.
    """
    return parse_json(read_small_file(path))


def read_json_object(path: str | Path, remedy: str) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        UserError: The file cannot be read, or does not hold an object; `remedy` ends the sentence.
    """
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"not valid JSON: {' '.join(str(error).split())[:200]}"
        raise UserError(f"cannot read {path} ({reason}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not an object with keys; {remedy}")
    return value


def read_optional_json(path: str | Path) -> dict[str, Any]:
    """Read the object in a JSON file; empty if the file is missing or damaged, or holds something else."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file at once: a reader sees the old content or the new one, never a part of it."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=1)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def file_sha256(path: str | Path, progress: Callable[[], None] = lambda: None) -> str:
    """The SHA-256 of a file in hexadecimal digits; `progress` is called for each block of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(HASH_BLOCK_BYTES):
            digest.update(block)
            progress()
    return digest.hexdigest()
