"""Rendering of chat templates within limits: a template is a program, and comes with the model of somebody else."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unlabeled.errors import UserError

SECONDS = 10.0  # of processor time, and beyond that for each conversation, which takes about a millisecond
SECONDS_PER_CONVERSATION = 0.1
BYTES = 2 << 30  # of memory beyond what the process has


class _TooLong(BaseException):
    """Raised into a template that runs for too long; nobody who handles `Exception` may take it for a refusal."""


_limits = threading.local()  # whether they are in force in a thread


@contextmanager
def rendering_limits(where: str, conversations: int = 1) -> Iterator[None]:
    """Stop what a template does when it has taken too much time, or asks for more than `BYTES`.

    Time is measured in the main thread, memory on systems that have /proc. Inside of another one nothing is added: a
    block around many conversations saves a tenth of a millisecond for each.

    Args:
        where: names the template in the message.
        conversations: that are rendered in the block.

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
        some = "one conversation" if conversations == 1 else f"{conversations} conversations"
        raise UserError(f"the chat template of {where} {reason} on {some}; correct it, or set another") from None
    finally:
        _limits.in_force = False


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Processor time, so that a process that was suspended has not used it up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


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
        yield  # there is a stricter one
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
