"""Errors for users, and the exit status of each."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from unlabeled.runtime import caches, signals
from unlabeled.runtime.exit_status import BAD_INPUT, FAILED, STOPPED
from unlabeled.runtime.process_exit import skip_finalization

FIRST_MESSAGE_SECONDS = 5.0  # the head start of the first process of a machine in printing a message
LONGEST_REASON = 150  # characters of the message of a failed collective


class UserError(Exception):
    """Bad input. The message is one sentence that names the file or key at fault and the remedy."""

    STATUS = BAD_INPUT


class Stopped(Exception):
    """A run that was cut short: the same command continues it. The message is one sentence."""

    STATUS = STOPPED


class RunFinished(SystemExit):
    """A run that is finished already, so that there is nothing to do. A script that does not catch it ends with 0."""

    def __init__(self, message: str):
        super().__init__(0)
        self.message = message

    def __str__(self) -> str:
        return self.message


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a `UserError` or `Stopped` as one line, without a traceback, and exit with status 2 or 75.

    From here to the end of the process stop signals are handled (see `signals`). A stop signal, and a collective that
    failed because another process has ended, count as `Stopped`. Any other exception passes through.

    With several processes the message comes from the first one of each machine, so that it is printed once. Other
    processes wait for it, and print the message only if they still run afterwards. However a process of a launched run
    ends, its exit functions run and its status survives; see `process_exit`.
    """
    status = 0
    distributed = None  # the process group, if all processes leave it together
    signals.start()
    try:
        with signals.interruptible(), caches.raise_for_full_disk(UserError):
            yield
        distributed = _process_group()
    except signals.Interruption as error:  # the other processes may be in the middle of a collective
        status = STOPPED
        _print_first("stopped", error, status)
    except RunFinished:
        distributed = _process_group()
    except UserError as error:
        status = UserError.STATUS
        _print_first("error", error, status)
    except Stopped as error:
        distributed = _process_group()
        status = Stopped.STATUS
        _print_first("stopped", error, status)
    except Exception as error:
        group = _process_group()
        if group is None or not _has_lost_peer(error):
            signals.limit_exit(FAILED)
            if group is not None and _is_launched():
                skip_finalization(FAILED)
            raise
        reason = str(error).splitlines()[0][-LONGEST_REASON:]
        print(
            f"stopped: process {group.get_rank()} has lost another one ({reason}); the same command continues",
            file=sys.stderr,
            flush=True,
        )
        status = STOPPED
    if distributed is not None:
        distributed.destroy_process_group()
    if _is_launched() and (status or distributed is not None):
        skip_finalization(status)
    if status:
        signals.limit_exit(status)
        raise SystemExit(status)


def _is_launched() -> bool:
    """Whether a launcher has started several processes, of which this is one."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _has_lost_peer(error: Exception) -> bool:
    from unlabeled.runtime.processes import is_lost_peer  # imports torch, which a process group has loaded already

    return isinstance(error, RuntimeError) and is_lost_peer(error)


def _print_first(kind: str, error: BaseException, status: int) -> None:
    """Print a message, on a machine with several processes from the first one.

    The launcher ends all processes with SIGTERM when the first one ends; each then keeps its own status.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(status))
    if os.environ.get("LOCAL_RANK", "0") not in ("0", "-1"):
        time.sleep(FIRST_MESSAGE_SECONDS)
    print(f"{kind}: {_message(error)}", file=sys.stderr, flush=True)


def _message(error: BaseException) -> str:
    """The message of an error. For one from a data-loader worker, torch makes its whole traceback the message."""
    message = str(error)
    if message.startswith("Caught UserError in DataLoader worker"):
        message = message.rpartition(f"{UserError.__module__}.UserError: ")[2].strip()
    return message


def _process_group() -> ModuleType | None:
    """`torch.distributed` if it has been imported and initialized."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed
