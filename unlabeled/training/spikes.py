"""Loss spikes and bad gradients: such a step is skipped, or ends the run before it is saved."""

import math
import statistics
from itertools import islice
from typing import NoReturn

from transformers import TrainerCallback

from unlabeled.errors import UserError
from unlabeled.runtime.checkpoints import find_newest_checkpoint

SKIPS = 10  # steps that may be skipped among the last WINDOW
WINDOW = 1000
REMEDY = "lower learning_rate or max_grad_norm and set another output_dir"


def recent_median(history: list[dict], key: str, last: int) -> float:
    """The median of the last finite values of a key in the log history; infinite where there are fewer than five.

    Args:
        last: how many values.
    """
    values = (entry[key] for entry in reversed(history) if math.isfinite(entry.get(key, math.nan)))
    recent = list(islice(values, last))  # called at every step, so the time must not grow with the history
    return statistics.median(recent) if len(recent) >= 5 else math.inf


def stop_with_checkpoint(args, reason: str, remedy: str = REMEDY) -> NoReturn:
    """Stop a run whose weights are not worth saving.

    Raises:
        UserError: always; it names the last good checkpoint.
    """
    last = find_newest_checkpoint(args.output_dir, report=lambda line: None)
    raise UserError(f"{reason}; the last good checkpoint is {last or 'none'}: {remedy}")


class SpikeGuard(TrainerCallback):
    """Stops a run before it is saved: the loss or the weights are NaN, or the loss rose by `loss_spike_threshold`."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        # The loss is that of the weights before the step, so it may be finite where the new weights are not.
        is_last_step = state.global_step >= state.max_steps
        if control.should_save or is_last_step:
            is_finite = all(bool(parameter.isfinite().all()) for parameter in model.parameters())
            if not is_finite:
                stop_with_checkpoint(args, f"the weights are no longer finite at step {state.global_step}")
        last = state.log_history[-1] if state.log_history else {}
        was_skipped = "skipped_steps" in last and last["step"] == state.global_step - 1
        if was_skipped and not control.should_training_stop:
            control.should_save = False  # weights with such gradients may be bad
        if control.should_save:
            control.should_log = True  # `on_log` stops the run before a loss of NaN is saved

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not math.isfinite(metrics.get("eval_loss", 0.0)):
            stop_with_checkpoint(args, f"the held-out loss is {metrics['eval_loss']} after step {state.global_step}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        loss = logs["loss"]
        before = recent_median(state.log_history[:-1], "loss", last=9)
        if not math.isfinite(loss):
            stop_with_checkpoint(args, f"the loss is {loss} at step {state.global_step}")
        if args.loss_spike_threshold and loss > before + args.loss_spike_threshold:
            reason = f"the loss rose from {before:.3f} to {loss:.3f} at step {state.global_step}"
            stop_with_checkpoint(args, reason, f"{REMEDY}, or raise loss_spike_threshold")


def is_finite_step(norm: float, args, state) -> bool:
    """Whether gradients of this norm are used: it is finite, and at most `grad_norm_skip_ratio` times the median norm.

    The median is that of the last logged norms, which every checkpoint holds: a resumed run decides as an uninterrupted
    one would.
    """
    limit = recent_median(state.log_history, "grad_norm", last=50) * (args.grad_norm_skip_ratio or math.inf)
    return math.isfinite(norm) and norm <= limit


def count_skipped(norm: float, args, state) -> int:
    """Print that a step is skipped for the norm of its gradients, and return the number of skipped steps so far.

    Raises:
        UserError: there were too many, or three in a row: the weights are the reason, and not the text.
    """
    now = state.global_step
    skipped = [entry["step"] for entry in state.log_history if "skipped_steps" in entry]
    recent = sum(step >= now - WINDOW for step in skipped) + 1
    if recent > SKIPS or skipped[-2:] == [now - 2, now - 1]:
        which = "the last 3 steps" if recent <= SKIPS else f"{recent} of the last {WINDOW} steps"
        stop_with_checkpoint(
            args, f"the gradients of {which} were not usable, their norm is {norm:.3g} at step {now + 1}"
        )
    if state.is_world_process_zero:
        print(f"step {now + 1:>6,} skipped: the norm of its gradients is {norm:.3g}", flush=True)
    return len(skipped) + 1
