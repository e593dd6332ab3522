"""Waiting for other processes as long as their work takes, and errors that mean that one of them is gone."""

import re
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from unlabeled.errors import UserError

T = TypeVar("T")

# What gloo, NCCL and torch's store say when another process has gone away or no longer answers.
LOST_PEER = re.compile(
    r"Connection closed by (remote )?peer|Connection reset by peer|Remote peer closed the connection"
    r"|pair\.cc.*Broken pipe|failed : Broken pipe|Application timeout caused pair closure"
    r"|Connection was likely closed\. Did the remote server shutdown or crash"
    r"|Timed out waiting \d+ ?ms for (recv|send) operation|wait timeout after \d+ ?ms"
    r"|remote process exited or there was a network error|ncclRemoteError"
    r"|collective operation timeout|NCCL communicator was aborted"
)
# What names a cause that is there again after a restart, whatever else the message says.
OWN_FAULT = re.compile(
    r"invalid (usage|argument)|ncclInvalid|[Uu]nhandled cuda error|ncclUnhandledCudaError|out of memory"
    r"|Duplicate GPU|CUDA error|invalid device"
)

LONGEST_PAUSE = 5.0  # seconds between two answers

_waiting_group = None
_pause = LONGEST_PAUSE
_answering: tuple[threading.Thread, threading.Event] | None = None


def start_waiting_group(timeout: float) -> None:
    """Make the group that `wait_for_all` uses; all processes have to come here together, once.

    Args:
        timeout: seconds after which a process that does not answer is given up.
    """
    global _waiting_group, _pause
    if dist.is_initialized() and _waiting_group is None:
        _waiting_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        _pause = min(LONGEST_PAUSE, timeout / 4)


def start_answering() -> None:
    """Answer those that wait, from a thread, that this process is still at work, until it waits itself.

    So one process may work on a disk for longer than a collective may take, while one that is gone is noticed.
    """
    global _answering
    if _waiting_group is not None and _answering is None:
        is_done = threading.Event()
        thread = threading.Thread(target=_answer, args=(is_done,), name="answers", daemon=True)
        _answering = thread, is_done
        thread.start()


def wait_for_all() -> None:
    """A barrier that is passed when all processes are here, and has no limit for those that answer meanwhile.

    Raises:
        RuntimeError: a process is gone, or has not answered in time.
    """
    if _waiting_group is None:
        return
    if thread := stop_answering():
        thread.join()
    while not _all_are_done(True):
        pass


def share_failure(message: str | None) -> str | None:
    """Tell all processes that one of them has failed; all have to come here together, after `wait_for_all`.

    Args:
        message: why this process has failed, or None.

    Returns:
        The message of the first process that has failed, or None.
    """
    if _waiting_group is None:
        return message
    messages: list[str | None] = [None] * dist.get_world_size(_waiting_group)
    dist.all_gather_object(messages, message, group=_waiting_group)
    return next((text for text in messages if text is not None), None)


def computed_once(compute: Callable[[], T]) -> T:
    """What `compute()` returns on the first process, for all; the others wait for it as long as it takes.

    Raises:
        UserError: on all processes, where `compute` raises one.
    """
    if _waiting_group is None:
        return compute()
    answer = [None, None]  # result, error
    if dist.get_rank() == 0:
        start_answering()
        try:
            answer = [compute(), None]
        except UserError as error:
            answer = [None, error]
        except BaseException:
            stop_answering()  # the others are not kept waiting by a process that has failed
            raise
    wait_for_all()
    dist.broadcast_object_list(answer, src=0, group=_waiting_group)
    result, error = answer
    if error is not None:
        raise error
    return result


def stop_answering() -> threading.Thread | None:
    """Let the thread of `start_answering` end, and return it; it may be in the middle of an answer."""
    global _answering
    if _answering is None:
        return None
    thread, is_done = _answering
    _answering = None
    is_done.set()
    return thread


def _answer(is_done: threading.Event) -> None:
    pause = 0.05
    while not is_done.wait(pause):
        try:
            _all_are_done(False)
        except RuntimeError:  # the next collective of this process will say why
            return
        pause = min(2 * pause, _pause)


def _all_are_done(is_done: bool) -> bool:
    answers = torch.tensor([int(is_done)])
    dist.all_reduce(answers, dist.ReduceOp.MIN, group=_waiting_group)
    return bool(answers)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone, so that the same command may succeed."""
    return bool(LOST_PEER.search(str(error))) and not OWN_FAULT.search(str(error))
