"""Errors for users, and exit statuses: 0 finished, 1 a bug, 2 bad input, 75 stopped, to be continued."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from unlabeled.runtime import caches, signals


class UserError(Exception):
    """Bad input. The message is one sentence that names the file or key at fault and the remedy."""


class Stopped(Exception):
    """A run that was cut short: the same command continues it. The message is one sentence."""

    STATUS = signals.STATUS


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a `UserError` or `Stopped` as one line, without a traceback, and leave with status 2 or 75.

    A stop signal (see `signals`) is one of the latter: what is half written is removed first. Anything else passes
    through, but for a collective that failed because another process is gone. With several processes the message comes
    from the first one of each machine, so that it is read once; another one waits for that, and speaks when it is still
    there.
    """
    status, distributed = 0, None
    signals.watch_launcher()
    try:
        with signals.interruptible(), caches.disk_faults_as(UserError):
            yield
        distributed = _process_group()
    except signals.Interruption as error:
        status = _say("stopped", error, Stopped.STATUS)  # the others may be in the middle of a collective
    except UserError as error:
        status = _say("error", error, 2)
    except Stopped as error:
        status, distributed = _say("stopped", error, Stopped.STATUS), _process_group()
    except Exception as error:
        distributed = _process_group()
        if not distributed or not _has_lost_peer(error):
            signals.limit_exit(1)
            if distributed and _is_launched():
                signals.skip_finalization(1)
            raise
        reason = f"process {distributed.get_rank()} has lost another one ({str(error).splitlines()[0][-150:]})"
        print(f"stopped: {reason}; the same command continues", file=sys.stderr, flush=True)
        os._exit(Stopped.STATUS)  # what is left of the process group may wait for the others
    if distributed:
        distributed.destroy_process_group()
        if _is_launched():
            signals.skip_finalization(status)
    if status and _is_launched():
        sys.stdout.flush()
        os._exit(status)  # while the interpreter shuts down it no longer handles signals, and the status would be lost
    if status:
        signals.limit_exit(status)
        raise SystemExit(status)


def _is_launched() -> bool:
    """Whether this process is one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _has_lost_peer(error: Exception) -> bool:
    from unlabeled.runtime.processes import is_lost_peer  # with a process group, torch is loaded already

    return isinstance(error, RuntimeError) and is_lost_peer(error)


def _say(what: str, error: BaseException, status: int) -> int:
    # The launcher ends all processes with the first one that ends; the status of each is to say why.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(status))
    if os.environ.get("LOCAL_RANK", "0") not in ("0", "-1"):
        time.sleep(5)
    print(f"{what}: {_sentence(error)}", file=sys.stderr, flush=True)
    return status


def _sentence(error: BaseException) -> str:
    """The message of an error. Of one from a data-loader worker, torch makes its whole traceback the message."""
    message = str(error)
    if message.startswith("Caught UserError in DataLoader worker"):
        message = message.rpartition(f"{UserError.__module__}.UserError: ")[2].strip()
    return message


def _process_group():
    """`torch.distributed` where it has been loaded and started."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed and distributed.is_available() and distributed.is_initialized() else None
