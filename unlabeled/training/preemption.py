"""Stop signals, `max_hours` and a launcher that is gone: the step is finished and saved before the run stops."""

import math
import os
import signal
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from unlabeled.errors import Stopped
from unlabeled.runtime import signals

# Reasons that are no signals, as numbers that no signal has.
TIME_IS_UP = 255
LAUNCHER_IS_GONE = 254
STARTED = time.monotonic()


class Preemption(TrainerCallback):
    """Finishes the step, saves and stops after a signal, after `max_hours`, or when the launcher has ended.

    All processes stop at the same step. A second signal, seconds later, ends the process at once.

    Args:
        max_hours: since the process started; None for no limit.

    Attributes:
        reason: why the run stops, once the processes agree; None while it goes on.
    """

    def __init__(self, max_hours: float | None):
        self.seconds = max_hours * 3600 if max_hours else math.inf
        self.reason: str | None = None
        self.noticed = 0  # number of the signal, or one of the reasons above
        self.since = 0.0  # when the signal arrived
        self.handlers: dict = {}
        self.group = None

    def on_train_begin(self, args, state, control, **kwargs):
        signals.set_outcome("the same command continues")
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._notice) for number in signals.STOP_SIGNALS}
        if dist.is_initialized() and dist.get_backend() != "gloo":
            self.group = dist.new_group(backend="gloo")  # agreeing must not wait for the accelerators

    def on_train_end(self, args, state, control, **kwargs):
        is_saved = Path(args.output_dir, f"checkpoint-{state.global_step}").is_dir()
        for number, handler in self.handlers.items():
            if self.reason:  # everything is saved, and a launcher may end the slower processes soon
                signal.signal(number, lambda number, frame: os._exit(Stopped.STATUS))
            elif is_saved:
                signal.signal(number, handler)
                signals.set_outcome("the same command repeats what follows the last step")
            else:
                signal.signal(number, self._postpone)

    def on_step_end(self, args, state, control, **kwargs):
        self._agree(control)

    def on_evaluate(self, args, state, control, **kwargs):
        self._agree(control)

    def _notice(self, number: int, frame) -> None:
        if self.noticed and time.monotonic() - self.since > signals.REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.noticed = self.noticed or number
        self.since = time.monotonic()

    def _postpone(self, number: int, frame) -> None:
        """After the last step, where `save_strategy` has left no checkpoint of it: let the run save its model."""
        if not self.noticed:
            name = signals.describe_signal(number)
            # Not print: the signal may have arrived in the middle of one.
            os.write(2, f"{name}: the last step is in no checkpoint, so the run saves its model first\n".encode())
        self._notice(number, frame)

    def _agree(self, control) -> None:
        if not self.noticed and time.monotonic() - STARTED > self.seconds:
            self.noticed = TIME_IS_UP
        noticed = LAUNCHER_IS_GONE if signals.launcher_is_gone() else self.noticed
        if dist.is_initialized():
            highest = torch.tensor([noticed])
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
            noticed = int(highest)
        if noticed:
            names = {TIME_IS_UP: "max_hours", LAUNCHER_IS_GONE: "the end of the launcher"}
            self.reason = names.get(noticed) or signal.Signals(noticed).name
            control.should_save = True
            control.should_training_stop = True

    def check(self, args, state) -> None:
        """Raise `Stopped` if the run was cut short. Called after training."""
        if self.reason and state.global_step < state.max_steps:
            raise Stopped(
                f"{self.reason} ended the run after step {state.global_step:,} of {state.max_steps:,}; it is saved, "
                "and the same command continues"
            )
