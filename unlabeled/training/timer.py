"""The training time of a run, counted across interruptions."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainerCallback


class TrainingTimer(TrainerCallback):
    """Measures the seconds that a run spends on training.

    Compilation and data loading count as training. Evaluation and saving do not: they run inside `paused`. A resumed
    run continues from the `train_seconds` that the checkpoint's history logged last.

    Attributes:
        paused_seconds: seconds spent in `paused` by this process, by reason.
    """

    def __init__(self) -> None:
        self.paused_seconds: dict[str, float] = {}
        self._counted_seconds = 0.0
        self._running_since: float | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        logged = (entry["train_seconds"] for entry in reversed(state.log_history) if "train_seconds" in entry)
        self._counted_seconds = next(logged, 0.0)
        self._running_since = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training so far, including those before the run was resumed."""
        if self._running_since is None:
            return self._counted_seconds
        return self._counted_seconds + time.perf_counter() - self._running_since

    @contextmanager
    def paused(self, reason: str) -> Iterator[None]:
        """Stop the timer, and count the seconds of the block under `reason` instead."""
        was_running = self._running_since is not None
        paused_at = time.perf_counter()
        self._counted_seconds = self.seconds
        self._running_since = None
        yield
        now = time.perf_counter()
        self.paused_seconds[reason] = self.paused_seconds.get(reason, 0.0) + now - paused_at
        if was_running:
            self._running_since = now
