"""The caches of compiled code of torch and Triton, on disks that are full or read-only."""

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEEDED_BYTES = 16_000_000
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def use_writable_caches() -> None:
    """Replace cache folders that cannot be written to by temporary ones, in the environment variables that name them.

    Call it before torch is imported, which creates its folder at once. Caches hold nothing that is trained.
    """
    folders = {name: os.environ.get(name) for name in CACHES}
    if not folders["TRITON_CACHE_DIR"]:
        folders["TRITON_CACHE_DIR"] = os.path.join(os.path.expanduser("~"), ".triton", "cache")
    for name, folder in folders.items():
        problem = find_write_problem(folder) if folder else None
        if problem is None:
            continue
        try:
            replacement = os.path.join(tempfile.gettempdir(), f"{name.lower()}-{os.getuid()}")
        except OSError:  # there is no temporary folder either
            continue
        if os.environ.get(name):
            print(f"{name} {folder} {problem}: {replacement} is used instead", file=sys.stderr, flush=True)
        os.environ[name] = replacement


def find_write_problem(folder: str) -> str | None:
    """Why a folder, which may not exist yet, cannot be written to; None if it can."""
    path = Path(folder).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        return "cannot be written to"
    if shutil.disk_usage(path).free < NEEDED_BYTES:
        return "is on a disk that is full"
    return None


@contextmanager
def raise_for_full_disk(error_class: type[Exception]) -> Iterator[None]:
    """Raise an error with one sentence in place of an error that comes from a full or read-only disk.

    This is for files that libraries write, such as compiled code. The project's own functions name the file themselves.

    Args:
        error_class: The class of the error to raise.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch raises the latter from the former
        disk_error = find_disk_error(error)
        if disk_error is None:
            raise
        path = disk_error.filename or f"a file of a library, below {tempfile.gettempdir()} or in one of its caches"
        raise error_class(
            f"cannot write {path} ({disk_error.strerror}); make room, then run the same command again"
        ) from error


def find_disk_error(error: BaseException | None) -> OSError | None:
    """The error of a full or read-only disk that caused an error, or None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error
        error = error.__cause__ or error.__context__
    return None
