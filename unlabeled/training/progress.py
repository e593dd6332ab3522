"""A progress bar with loss, tokens per second, MFU and the time left."""

import sys

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from unlabeled.planning import format_count, format_duration
from unlabeled.reporting.metrics import METRICS, headline_metrics
from unlabeled.reporting.stages import stage_of_objective
from unlabeled.training.timer import TrainingTimer

WARMUP_STEPS = 20  # not timed: kernels are tuned and compiled in them
TIMED_STEPS = 20  # timed for the expected duration of the run


class TokenProgressCallback(TrainerCallback):
    """Shows a progress bar, or prints a line for each log entry where standard error is no terminal.

    Args:
        timer: the timer of the trainer.
        plan: of `make_run_plan`, for the FLOPs of a token and the peak of the device.
        stage: the name of the stage, whose metrics are shown; see `STAGE_KINDS`.

    Attributes:
        expected_seconds: the training time of the whole run as estimated after the first steps, None until then.
    """

    def __init__(self, timer: TrainingTimer, plan: dict, stage: str):
        self.timer = timer
        self.plan = plan
        self.stage = stage
        self.bar: tqdm | None = None
        self.is_shown = True
        self.expected_seconds: float | None = None
        self._timing_start: tuple[int, float] | None = None  # step and seconds of training
        self._last_logged = (0, 0.0)  # step and seconds of training

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._first_step = state.global_step
        self._last_logged = (state.global_step, self.timer.seconds)
        self.is_shown = state.is_local_process_zero if args.log_on_each_node else state.is_world_process_zero
        if self.is_shown and sys.stderr.isatty() and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.bar:
            self.bar.update(1)
        if self.expected_seconds is None:
            self._time_first_steps(state)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            speed = self._tokens_per_second(args, state, logs)
            figures = self._describe_training(args, logs, speed)
            if self.bar:
                self.bar.set_postfix_str(", ".join(figures))
                return
            remaining_tokens = (state.max_steps - state.global_step) * args.batch_tokens
            figures.append(f"{format_duration(remaining_tokens / speed)} left")
        elif "eval_loss" in logs:
            figures = self._describe_evaluation(logs)
        else:
            return
        position = [f"step {state.global_step:>6,}/{state.max_steps:,}", f"{format_count(logs['tokens']):>6} tokens"]
        self._print("  ".join(position + figures))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.bar:
            self.bar.close()

    def _time_first_steps(self, state) -> None:
        if self._timing_start is None:
            if state.global_step >= self._first_step + WARMUP_STEPS:
                self._timing_start = (state.global_step, self.timer.seconds)
            return
        start_step, start_seconds = self._timing_start
        if state.global_step == start_step + TIMED_STEPS:
            now = self.timer.seconds
            seconds_per_step = (now - start_seconds) / TIMED_STEPS
            self.expected_seconds = now + seconds_per_step * (state.max_steps - state.global_step)
            self._print(f"expected: {format_duration(self.expected_seconds)} of training for {state.max_steps:,} steps")

    def _tokens_per_second(self, args, state, logs: dict) -> float:
        last_step, last_seconds = self._last_logged
        self._last_logged = (state.global_step, logs["train_seconds"])
        seconds = max(logs["train_seconds"] - last_seconds, 1e-9)
        return (state.global_step - last_step) * args.batch_tokens / seconds

    def _describe_training(self, args, logs: dict, speed: float) -> list[str]:
        figures = [f"loss {logs['loss']:.4f}", f"{speed:,.0f} tokens/s"]
        if self.plan["peak_flops"]:
            flops_per_second = speed * self.plan["flops_per_token"]
            figures.append(f"MFU {flops_per_second / self.plan['peak_flops'] / args.world_size:.1%}")
        return figures

    def _describe_evaluation(self, logs: dict) -> list[str]:
        """The held-out loss, and the metrics that summarize the stage."""
        others = {
            key: value for key, value in logs.items() if key in METRICS and key not in ("eval_loss", "perplexity")
        }
        headlines = headline_metrics(self.stage, others)
        return [f"held-out loss {logs['eval_loss']:.4f}", *(headline.phrase for headline in headlines)]

    def _print(self, line: str) -> None:
        if self.is_shown:
            tqdm.write(line)
            sys.stdout.flush()


def add_token_progress(trainer: Trainer, plan: dict) -> TokenProgressCallback:
    """Replace the progress callbacks of `Trainer` by a `TokenProgressCallback`.

    Args:
        trainer: a trainer with a `timer` and an `objective`.
        plan: of `make_run_plan`.

    Returns:
        The callback, which knows the expected duration once the first steps have been timed.
    """
    disable_progress_bar()  # of saving and loading, which take less time than it takes to read them
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    progress = TokenProgressCallback(trainer.timer, plan, stage_of_objective(trainer.objective))
    trainer.add_callback(progress)
    return progress
