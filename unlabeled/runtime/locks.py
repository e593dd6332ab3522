"""Locks on files between processes, containers and machines."""

import errno
import fcntl
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

# Errors of `flock` on a file system without locks, such as Lustre without its mount option.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
POLL_SECONDS = 0.1

_held_locks: set["FileLock"] = set()
_missing_locks_reported = False


class FileLock:
    """An exclusive lock on a file (`flock`), which the kernel releases however the process ends.

    It works between containers that share a mount and, if the file system supports it, between machines. The file is
    deleted when the lock is released; a process that is killed leaves it, which is harmless.

    On a file system without locks, `acquire` prints a warning once and succeeds, and `is_supported` becomes False.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.is_supported = True
        self._descriptor: int | None = None

    @property
    def descriptor(self) -> int:
        """The open file; a child process that inherits it keeps the lock."""
        assert self._descriptor is not None, "the lock is not held"
        return self._descriptor

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock and the locked file is still the one at `path`."""
        return self._descriptor is not None and _is_same_file(self._descriptor, self.path)

    def acquire(self, timeout: float = 0.0) -> bool:
        """Try to take the lock for `timeout` seconds.

        Returns:
            Whether this object holds the lock now.

        Raises:
            OSError: The file cannot be opened or written.
        """
        deadline = time.monotonic() + timeout
        while not self._try_to_acquire():
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def release(self) -> None:
        """Release the lock if it is held."""
        if self.is_held:
            # Deleted while locked: another process that has opened the file notices that it is no longer at `path`.
            with suppress(OSError):
                os.unlink(self.path)
        self._close()

    def _close(self) -> None:
        _held_locks.discard(self)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _try_to_acquire(self) -> bool:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if not self._lock(descriptor):
                os.close(descriptor)
                return False
            if _is_same_file(descriptor, self.path):
                self._descriptor = descriptor
                _held_locks.add(self)
                return True
            os.close(descriptor)  # its last holder has deleted it meanwhile, so a lock on it is worth nothing

    def _lock(self, descriptor: int) -> bool:
        """Lock an open file. Returns False if another process holds it, True if the file system has no locks."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            self.is_supported = False
            _report_missing_locks(self.path)
        return True


def _is_same_file(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _report_missing_locks(path: str) -> None:
    global _missing_locks_reported
    if not _missing_locks_reported:
        _missing_locks_reported = True
        print(
            f"warning: the file system of {path} has no locks; make sure that no other process writes there",
            file=sys.stderr,
            flush=True,
        )


def _close_in_child() -> None:
    for lock in list(_held_locks):
        lock._close()


# Workers of a data loader are forks and outlive a killed parent for seconds; they must not keep its locks.
os.register_at_fork(after_in_child=_close_in_child)
