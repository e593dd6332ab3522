"""What the recipes share: a flat package of small modules, each with one purpose; and how all of them complain."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__version__ = "0.1.0"


class UserError(Exception):
    """Bad input. The message is one sentence that names the file or key at fault and the remedy."""


@contextmanager
def explained() -> Iterator[None]:
    """Print a `UserError` as one line and leave with status 2, without a traceback; anything else passes through.

    With several processes the message comes from the first one of each machine, so that it is read once.
    """
    try:
        yield
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_available() and distributed.is_initialized():
            # Its threads may outlive what they use when the process ends, which aborted a finished run once.
            distributed.destroy_process_group()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
