"""Waiting for other processes without a time limit, and recognizing that one of them has ended."""

import os
import re
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from unlabeled.errors import UserError

T = TypeVar("T")

# Messages of gloo, NCCL and torch's store when another process has ended or no longer answers.
LOST_PEER = re.compile(
    r"Connection closed by (remote )?peer|Connection reset by peer|Remote peer closed the connection"
    r"|pair\.cc.*Broken pipe|failed : Broken pipe|Application timeout caused pair closure"
    r"|Connection was likely closed\. Did the remote server shutdown or crash"
    r"|Timed out waiting \d+ ?ms for (recv|send) operation|wait timeout after \d+ ?ms"
    r"|remote process exited or there was a network error|ncclRemoteError"
    r"|collective operation timeout|NCCL communicator was aborted"
)
# Messages that name a cause which a restart does not remove, whatever else they contain.
OWN_FAULT = re.compile(
    r"invalid (usage|argument)|ncclInvalid|[Uu]nhandled cuda error|ncclUnhandledCudaError|out of memory"
    r"|Duplicate GPU|CUDA error|invalid device"
)

LONGEST_PAUSE_SECONDS = 5.0  # between two answers
FIRST_PAUSE_SECONDS = 0.05

_waiting_group: dist.ProcessGroup | None = None
_pause_seconds = LONGEST_PAUSE_SECONDS
_answering: tuple[threading.Thread, threading.Event] | None = None  # the thread that answers, and the event to end it


def start_waiting_group(timeout: float) -> None:
    """Create the group that `wait_for_all` uses. Every process must call this, once.

    Args:
        timeout: Seconds after which a process that does not answer counts as ended.
    """
    global _waiting_group, _pause_seconds
    if dist.is_initialized() and _waiting_group is None:
        _waiting_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        _pause_seconds = min(LONGEST_PAUSE_SECONDS, timeout / 4)


def start_answering() -> None:
    """Answer waiting processes from a thread that this one is still at work, until it waits itself.

    A process can then write to a disk for longer than a collective may take, while one that has ended is noticed.
    """
    global _answering
    if _waiting_group is not None and _answering is None:
        stop = threading.Event()
        thread = threading.Thread(target=_answer, args=(stop,), name="answers", daemon=True)
        _answering = (thread, stop)
        thread.start()


def stop_answering() -> threading.Thread | None:
    """Ask the thread of `start_answering` to end. Returns the thread, which may still be answering."""
    global _answering
    if _answering is None:
        return None
    thread, stop = _answering
    _answering = None
    stop.set()
    return thread


def wait_for_all() -> None:
    """Wait until all processes have called this; there is no time limit for processes that answer.

    Raises:
        RuntimeError: A process has ended, or has not answered in time.
    """
    if _waiting_group is None:
        return
    thread = stop_answering()
    if thread is not None:
        thread.join()
    all_arrived = False
    while not all_arrived:
        all_arrived = _all_have_arrived(True)


def share_failure(message: str | None) -> str | None:
    """Tell all processes that one of them has failed. Every process must call this, after `wait_for_all`.

    Args:
        message: Why this process has failed, or None.

    Returns:
        The message of the first process that has failed, or None.
    """
    if _waiting_group is None:
        return message
    messages: list[str | None] = [None] * dist.get_world_size(_waiting_group)
    dist.all_gather_object(messages, message, group=_waiting_group)
    return next((text for text in messages if text is not None), None)


def compute_once(compute: Callable[[], T]) -> T:
    """Call `compute` on the first process and return its result on all; the others wait as long as it takes.

    Raises:
        UserError: On all processes, if `compute` raises one.
    """
    if _waiting_group is None:
        return compute()
    message: list = [None, None]  # result and error
    if dist.get_rank() == 0:
        start_answering()
        try:
            message = [compute(), None]
        except UserError as error:
            message = [None, error]
        except BaseException:
            stop_answering()  # so that the other processes do not wait for one that has failed
            raise
    wait_for_all()
    dist.broadcast_object_list(message, src=0, group=_waiting_group)
    result, shared_error = message
    if shared_error is not None:
        raise shared_error
    return result


def _answer(stop: threading.Event) -> None:
    pause = FIRST_PAUSE_SECONDS
    while not stop.wait(pause):
        try:
            _all_have_arrived(False)
        except RuntimeError:  # the next collective of this process reports it
            return
        pause = min(2 * pause, _pause_seconds)


def _all_have_arrived(has_arrived: bool) -> bool:
    """One round of answers: whether every process waits in `wait_for_all`."""
    answers = torch.tensor([int(has_arrived)])
    dist.all_reduce(answers, dist.ReduceOp.MIN, group=_waiting_group)
    return bool(answers)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process has ended, so that the same command may succeed."""
    return bool(LOST_PEER.search(str(error))) and not OWN_FAULT.search(str(error))


def print_on_main(sentence: str | None) -> None:
    """Print in the first process only; None is not printed."""
    if sentence is not None and os.environ.get("RANK", "0") == "0":
        print(sentence)
