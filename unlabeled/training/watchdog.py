"""A process that makes no progress is ended, with a traceback of all its threads."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers import TrainerCallback

from unlabeled.errors import Stopped


class Watchdog(TrainerCallback):
    """Ends a process that makes no progress for 1.25 times `ddp_timeout` seconds.

    Collectives have a timeout of `ddp_timeout` of their own, which comes first; this one is mostly for data loading,
    which has none. Progress is a micro-batch, a forward pass of an evaluation, rows that were read, or bytes of a
    checkpoint that were written. Time in which the watchdog itself did not run, as on a suspended machine, does not
    count.
    """

    def __init__(self):
        self.step = 0
        self.over = threading.Event()
        self._idle = 0.0  # seconds without progress
        self._is_paused = False
        self._folder: str | None = None  # that is being written to
        self._written = 0  # bytes in the folder at the last check

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)
        self.over.clear()
        threading.Thread(target=self._watch, args=(1.25 * args.ddp_timeout,), name="watchdog", daemon=True).start()

    def on_step_end(self, args, state, control, **kwargs):
        self.step = state.global_step
        self.beat()

    on_substep_end = on_evaluate = on_save = on_step_end

    def beat(self) -> None:
        """Report progress, from any thread."""
        self._idle = 0.0

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """Count each forward pass of the model as progress."""
        # The modules inside as well: sentence-transformers calls `forward` itself, which no hook notices.
        handles = [part.register_forward_hook(lambda *_: self.beat()) for part in (model, *model.children())]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def watching_files(self, folder: str) -> Iterator[None]:
        """Count bytes that are written to a folder as progress."""
        self._folder = folder
        try:
            yield
        finally:
            self._folder = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch: another process notices a standstill, and its end ends this one as well."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False
            self.beat()

    def stop(self) -> None:
        """Stop watching, when training is over or has failed: the process may go on with something else."""
        self.over.set()

    def _watch(self, limit: float) -> None:
        interval = min(limit / 4, 10)
        before = time.monotonic()
        while not self.over.wait(interval):
            now = time.monotonic()
            self._idle += min(now - before, 2 * interval)
            before = now
            if self._is_paused or self._has_written():
                self.beat()
            if self._idle > limit:
                faulthandler.dump_traceback(all_threads=True)
                print(
                    f"stopped: no progress for {limit:.0f} s (ddp_timeout) after step {self.step:,}; the traceback of "
                    "each thread is above; the same command continues",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(Stopped.STATUS)

    def _has_written(self) -> bool:
        """Whether the size of the folder that is being written to has changed since the last call."""
        if self._folder is None:
            return False
        previous = self._written
        self._written = folder_bytes(self._folder)
        return self._written != previous


def folder_bytes(folder: str) -> int:
    """Bytes of all files below a folder, while others write and delete there."""
    total = 0
    for path in Path(folder).rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
