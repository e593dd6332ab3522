"""Folders that are complete or absent: filled beside their target by one process at a time, flushed, renamed."""

import glob
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from unlabeled.runtime.locks import FileLock


@contextmanager
def staged_folder(target: str | Path, is_finished: Callable[[], bool] | None = None) -> Iterator[Path | None]:
    """Fill a new folder, which becomes `target` when the block ends without an error.

    Another process that wants the same folder, also in another container with the same mount, prints one line, waits,
    and then finds it finished. Leftovers of a killed process are removed by the next one.

    Args:
        target: The folder to create; an empty folder may exist.
        is_finished: Whether `target` is finished, by default whether it exists. It is called again after waiting.

    Yields:
        The folder to fill, or None if `target` is finished.

    Raises:
        OSError: The folder, or the lock `.NAME.lock` beside it, cannot be written.
    """
    target = Path(os.path.abspath(target))
    is_finished = is_finished or target.exists
    if is_finished():
        yield None
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(target) as lock:
        if lock.is_supported:  # without locks, another process may be filling its folder
            remove_leftovers(target)
        if is_finished():
            yield None
            return
        # Not the process id, which is 1 in every container.
        staged = Path(f"{target}.incomplete-{uuid.uuid4().hex[:12]}")
        staged.mkdir()
        try:
            yield staged
            commit_folder(staged, target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[FileLock]:
    """Hold the lock `.NAME.lock` beside a folder. Prints one line if it has to wait, which it does without a limit.

    Raises:
        OSError: The lock cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    if not lock.acquire():
        print(f"waiting for another process that writes {folder}", flush=True)
        lock.acquire(timeout=math.inf)
    try:
        yield lock
    finally:
        lock.release()


def remove_leftovers(target: str | Path) -> None:
    """Delete what killed processes have left beside `target`; the caller holds its lock."""
    for leftover in glob.glob(f"{glob.escape(str(target))}.incomplete-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def commit_folder(staged: Path, target: Path) -> None:
    """Flush a folder and its content to disk, and rename it to `target`."""
    flush_folder(staged)
    os.rename(staged, target)
    flush_path(target.parent)


def flush_folder(folder: Path) -> None:
    """Flush a folder and its content to disk."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    with ThreadPoolExecutor() as pool:  # flushing waits for the disk and releases the interpreter lock
        list(pool.map(flush_path, [path for path in paths if path.is_file()]))
    for path in paths:
        if path.is_dir():
            flush_path(path)
    flush_path(folder)


def flush_path(path: str | Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
