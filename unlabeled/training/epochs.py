"""`eval_strategy`, `save_strategy` and `logging_strategy: epoch`: at each end of an epoch of the text."""

from transformers import TrainerCallback


class EpochEnds(TrainerCallback):
    """Acts in the step that takes the last row of an epoch, and in the last step of the run.

    For Trainer the whole run is one epoch, since its data set has the rows of all epochs in order.

    Args:
        rows_per_epoch: rows (pairs, examples) of the training text.
        rows_per_step: of them in a step, over all processes.
    """

    def __init__(self, rows_per_epoch: int, rows_per_step: int):
        self.rows_per_epoch = rows_per_epoch
        self.rows_per_step = rows_per_step

    def finished_epochs(self, step: int) -> int:
        """Epochs whose rows have all been taken after a number of steps."""
        return step * self.rows_per_step // self.rows_per_epoch

    def on_step_end(self, args, state, control, **kwargs):
        finished = self.finished_epochs(state.global_step)
        is_last = state.global_step >= state.max_steps
        if finished == self.finished_epochs(state.global_step - 1) and not is_last:
            return
        if args.logging_strategy == "epoch":
            control.should_log = True
        if args.eval_strategy == "epoch" and args.eval_delay <= state.global_step * self.rows_per_step / (
            self.rows_per_epoch
        ):
            control.should_evaluate = True
        if args.save_strategy == "epoch":
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        # What Trainer wants at the end of its only epoch was done in the last step; a run that was stopped is saved by
        # what has stopped it.
        if args.logging_strategy == "epoch":
            control.should_log = False
        if args.eval_strategy == "epoch":
            control.should_evaluate = False
        if args.save_strategy == "epoch":
            control.should_save = False
