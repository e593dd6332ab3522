"""What the recipes share: a flat package of small modules, each with one purpose; and how all of them complain."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from unlabeled import caches

__version__ = "0.1.0"

# What the libraries report home unless they are told not to: TRL the model's architecture, the number of processes and
# the GPU, whenever a trainer is made. Set before huggingface_hub is imported, which reads it once.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
caches.use_writable()


class UserError(Exception):
    """Bad input. The message is one sentence that names the file or key at fault and the remedy."""


class Stopped(Exception):
    """A run that was cut short: the same command continues it. The message is one sentence."""

    STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again


@contextmanager
def explained() -> Iterator[None]:
    """Print a `UserError` or `Stopped` as one line, without a traceback, and leave with status 2 or 75.

    Anything else passes through, but for a collective that failed because another process is gone. With several
    processes the message comes from the first one of each machine, so that it is read once; another one waits for that,
    and speaks when it is still there.
    """
    status, distributed = 0, None
    try:
        with caches.disk_faults_as(UserError):
            yield
        distributed = _process_group()
    except UserError as error:
        status = _say("error", error, 2)
    except Stopped as error:
        status, distributed = _say("stopped", error, Stopped.STATUS), _process_group()
    except RuntimeError as error:
        distributed = _process_group()
        if not distributed:
            raise
        from unlabeled.processes import is_lost_peer  # here torch is loaded already

        if not is_lost_peer(error):
            raise
        reason = f"process {distributed.get_rank()} has lost another one ({str(error).splitlines()[0][-150:]})"
        print(f"stopped: {reason}; the same command continues", file=sys.stderr, flush=True)
        os._exit(Stopped.STATUS)  # what is left of the process group may wait for the others
    if distributed:
        # Its threads may outlive what they use when the process ends, which aborted a finished run once.
        distributed.destroy_process_group()
    if status and os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        os._exit(status)  # while the interpreter shuts down it no longer handles signals, and the status would be lost
    if status:
        raise SystemExit(status)


def _say(what: str, error: Exception, status: int) -> int:
    # The launcher ends all processes with the first one that ends; the status of each is to say why.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(status))
    if os.environ.get("LOCAL_RANK", "0") not in ("0", "-1"):
        time.sleep(5)
    print(f"{what}: {error}", file=sys.stderr, flush=True)
    return status


def _process_group():
    """`torch.distributed` where it has been loaded and started."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed and distributed.is_available() and distributed.is_initialized() else None
