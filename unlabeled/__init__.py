"""What the recipes share: a flat package of small modules, each with one purpose; and how all of them complain."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__version__ = "0.1.0"


class UserError(Exception):
    """Bad input. The message is one sentence that names the file or key at fault and the remedy."""


class Stopped(Exception):
    """A run that was cut short: the same command continues it. The message is one sentence.

    `everywhere`: every process says it, since the first one may be the one that is gone.
    """

    STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


@contextmanager
def explained() -> Iterator[None]:
    """Print a `UserError` or `Stopped` as one line, without a traceback, and leave with status 2 or 75.

    Anything else passes through. With several processes the message comes from the first one of each machine, so that
    it is read once.
    """
    status = 0
    try:
        yield
    except (UserError, Stopped) as error:
        status = getattr(error, "STATUS", 2)
        if os.environ.get("LOCAL_RANK", "0") in ("0", "-1") or getattr(error, "everywhere", False):
            print(f"{'error' if status == 2 else 'stopped'}: {error}", file=sys.stderr, flush=True)
    distributed = sys.modules.get("torch.distributed")
    if status != 2 and distributed and distributed.is_available() and distributed.is_initialized():
        # Its threads may outlive what they use when the process ends, which aborted a finished run once.
        distributed.destroy_process_group()
    if status:
        raise SystemExit(status)
