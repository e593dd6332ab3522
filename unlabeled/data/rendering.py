"""Limits on time and memory for chat templates: a template is a program that comes with somebody else's model."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unlabeled.errors import UserError

SECONDS = 10.0  # of processor time for a block
SECONDS_PER_CONVERSATION = 0.1  # in addition; rendering a conversation takes about a millisecond
BYTES = 2 << 30  # of memory in addition to what the process has


class _TooLong(BaseException):
    """Raised in a template that runs for too long. Not an `Exception`, which would be taken for a refusal."""


_limits = threading.local()  # whether limits are in force in this thread


@contextmanager
def rendering_limits(where: str, conversations: int = 1) -> Iterator[None]:
    """Stop a chat template that takes too much time or asks for too much memory.

    Time is limited in the main thread, memory on systems with /proc. A block inside of another one adds nothing: one
    block around many conversations saves a tenth of a millisecond for each.

    Args:
        where: the name of the template, for messages.
        conversations: the number of conversations that are rendered in the block.

    Raises:
        UserError: the template has reached a limit.
    """
    if getattr(_limits, "in_force", False):
        yield
        return
    seconds = SECONDS + SECONDS_PER_CONVERSATION * (conversations - 1)
    _limits.in_force = True
    try:
        with _memory_limit(), _time_limit(seconds):
            yield
    except (_TooLong, MemoryError) as error:
        if isinstance(error, _TooLong):
            reason = f"runs for more than {seconds:g} s"
        else:
            reason = f"takes more than {BYTES / 1e9:.1f} GB of memory"
        subject = "one conversation" if conversations == 1 else f"{conversations} conversations"
        raise UserError(f"the chat template of {where} {reason} on {subject}; correct it, or set another") from None
    finally:
        _limits.in_force = False


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Limit processor time, of which a suspended process uses none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame) -> None:
        raise _TooLong

    old_handler = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old_handler)


@contextmanager
def _memory_limit() -> Iterator[None]:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + BYTES
    if any(bound != resource.RLIM_INFINITY and bound < limit for bound in (soft, hard)):
        yield  # a stricter limit is in force
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
