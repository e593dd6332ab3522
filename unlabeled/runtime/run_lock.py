"""One run at a time in an `output_dir`: the lock that its first process holds until it ends."""

import atexit
import os
import signal
from datetime import datetime
from pathlib import Path

import psutil

from unlabeled.errors import UserError
from unlabeled.runtime.lock_holders import Holder
from unlabeled.runtime.locks import FileLock

LOCK_FILE = ".run.lock"  # hidden, so it is not pushed
SAVE_SECONDS = 30.0  # for an orphaned run that saves after SIGTERM
# For child processes of a killed run on this machine, such as its data-loader workers.
LOCAL_WAIT_SECONDS = 30.0
# A server of NFS frees the locks of a machine that has crashed after its lease, 90 s by default.
REMOTE_WAIT_SECONDS = 120.0

_locks: dict[str, FileLock] = {}  # by folder; a process takes a lock once and keeps it


def hold_output_dir(output_dir: str | Path) -> None:
    """Lock an existing folder for this process until it ends.

    A run in the folder whose launcher was killed is ended first; it has 30 s to save.

    Raises:
        UserError: Another run uses the folder.
        OSError: The lock cannot be written.
    """
    folder = os.path.realpath(output_dir)
    lock = _locks.get(folder)
    if lock is not None:
        if lock.is_held:
            return
        lock.release()  # the folder was deleted and created again
    lock = FileLock(os.path.join(folder, LOCK_FILE))
    if not lock.acquire() and not _wait_for_lock(lock, output_dir):
        raise UserError(_refusal(output_dir, Holder.read(lock.path)))
    Holder.current().write(lock.path)
    _locks[folder] = lock


@atexit.register
def release_output_dirs() -> None:
    """Release all locks of this process and delete their files."""
    while _locks:
        _, lock = _locks.popitem()
        lock.release()


def _wait_for_lock(lock: FileLock, output_dir: str | Path) -> bool:
    """Take a lock that another process holds, if that process ends or is orphaned."""
    holder = Holder.read(lock.path)
    if holder is not None and holder.process.is_running:
        return holder.is_orphan and _end_orphan(holder, lock, output_dir)
    print(f"waiting for {_describe(holder)}, which still holds output_dir {output_dir}", flush=True)
    is_remote = holder is not None and not holder.process.is_local
    return lock.acquire(timeout=REMOTE_WAIT_SECONDS if is_remote else LOCAL_WAIT_SECONDS)


def _end_orphan(holder: Holder, lock: FileLock, output_dir: str | Path) -> bool:
    """Let an orphaned run save and end, or kill it. Returns whether the lock was acquired."""
    pid = holder.process.pid
    print(
        f"ending process {pid}, which still trains in {output_dir} although its launcher (process "
        f"{holder.launcher.pid}) is gone; it may save for {SAVE_SECONDS:.0f} s",
        flush=True,
    )
    try:
        psutil.Process(pid).send_signal(signal.SIGTERM)
        if lock.acquire(timeout=SAVE_SECONDS):
            return True
        if os.getpgid(pid) == pid:  # with its data-loader workers
            os.killpg(pid, signal.SIGKILL)
        else:
            psutil.Process(pid).kill()
    except (psutil.NoSuchProcess, ProcessLookupError):  # it has ended by itself
        pass
    except (psutil.AccessDenied, PermissionError):  # it belongs to another user
        return False
    return lock.acquire(timeout=LOCAL_WAIT_SECONDS)


def _refusal(output_dir: str | Path, holder: Holder | None) -> str:
    return (
        f"output_dir {output_dir} is in use by {_describe(holder)}; wait for its end, stop it, or set output_dir to "
        "another folder"
    )


def _describe(holder: Holder | None) -> str:
    if holder is None:
        return "another process"
    process = holder.process
    since = datetime.fromtimestamp(process.started).astimezone().isoformat(sep=" ", timespec="seconds")
    command = f" ({process.command})" if process.command else ""
    return f"process {process.pid} on {process.host}, started {since}{command}"
