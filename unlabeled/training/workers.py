"""Data-loader workers: they end with their parent and not before, and a killed one is reported in a sentence."""

import atexit
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch.utils.data import DataLoader

from unlabeled.errors import Stopped
from unlabeled.runtime import signals
from unlabeled.runtime.checkpoints import find_newest_checkpoint

# The error that torch raises in the parent of a worker that somebody else has ended.
KILLED_WORKER = re.compile(r"DataLoader worker \(pid \d+\) is killed by signal: (Killed|Terminated)")


def start_worker(initialize: Callable[[int], None] | None, worker: int) -> None:
    """A `worker_init_fn` for workers that end with their parent, and not before.

    A stop signal to the process group reaches them as well, but the step that is being finished needs them, so they
    ignore it. They do not outlive the parent, whatever they are doing.

    Args:
        initialize: the `worker_init_fn` of the data loader, called last.
        worker: number of the worker.
    """
    for number in signals.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signals.end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not exist in a fork, which would hang
    if initialize is not None:
        initialize(worker)


def protect_workers(loader: DataLoader) -> None:
    """Make the workers of a data loader ignore stop signals, and end with this process."""
    loader.worker_init_fn = partial(start_worker, loader.worker_init_fn)
    # Registered once, and after multiprocessing's own exit function, so that it is called before that.
    atexit.unregister(kill_children)
    atexit.register(kill_children)


def kill_children() -> None:
    """Kill the daemonic children of this process: multiprocessing would send SIGTERM, which they ignore, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


@contextmanager
def user_error_on_dead_worker(output_dir: str) -> Iterator[None]:
    """Turn the error of a killed data-loader worker into `Stopped`, which names the last checkpoint."""
    try:
        yield
    except Exception as error:
        match = KILLED_WORKER.search(str(_late_error(error)))
        if not match:
            raise
        last = find_newest_checkpoint(output_dir, report=lambda line: None)
        raise Stopped(
            f"a data-loader worker was ended from outside ({match[1]}), as the system does when memory runs out; the "
            f"last complete checkpoint is {last or 'none'}, the same command continues, and fewer "
            "dataloader_num_workers need less memory"
        ) from error


def _late_error(error: Exception) -> Exception:
    """The error that torch raises when a worker ends, where its connection breaks before."""
    try:
        if isinstance(error, EOFError | ConnectionError):
            time.sleep(1)  # until SIGCHLD, in whose handler torch raises
    except RuntimeError as late:
        return late
    return error
