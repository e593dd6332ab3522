"""Folders in which torch and Triton keep what they compile: others than those that cannot be written to."""

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEEDED_BYTES = 16_000_000
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def use_writable() -> None:
    """Set the variables of caches that are on a full disk, or on one that can only be read, to a temporary folder.

    To be called before torch is imported, which makes its folder at once. Nothing that is trained is in a cache.
    """
    folders = {name: os.environ.get(name) for name in CACHES}
    if not folders["TRITON_CACHE_DIR"]:
        folders["TRITON_CACHE_DIR"] = os.path.join(os.path.expanduser("~"), ".triton", "cache")
    for name, folder in folders.items():
        if folder and (fault := find_fault(folder)):
            try:
                instead = os.path.join(tempfile.gettempdir(), f"{name.lower()}-{os.getuid()}")
            except OSError:  # no temporary folder either
                continue
            if os.environ.get(name):
                print(f"{name} {folder} {fault}: {instead} is used instead", file=sys.stderr, flush=True)
            os.environ[name] = instead


def find_fault(folder: str) -> str | None:
    """Why nothing can be written to a folder that may have to be made; None where it can be."""
    path = Path(folder).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        return "cannot be written to"
    if shutil.disk_usage(path).free < NEEDED_BYTES:
        return "is on a disk that is full"
    return None


@contextmanager
def disk_faults_as(kind: type[Exception]) -> Iterator[None]:
    """Raise `kind`, with one sentence, for an error that comes from a disk that is full or can only be read.

    What the project writes says so itself; this is for what libraries write, such as compiled code.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch raises the latter from the former
        fault = find_disk_fault(error)
        if fault is None:
            raise
        place = fault.filename or f"a file of a library, below {tempfile.gettempdir()} or in one of its caches"
        raise kind(f"cannot write {place} ({fault.strerror}); make room, then run the same command again") from error


def find_disk_fault(error: BaseException | None) -> OSError | None:
    """The error of a disk that an error comes from, or None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            return error
        error = error.__cause__ or error.__context__
    return None
