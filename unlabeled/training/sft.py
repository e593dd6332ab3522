"""`SFTTrainer` with exact evaluation and resume."""

from trl import SFTTrainer

from unlabeled.training.trainer import ExactTrainerMixin


class ExactSFTTrainer(ExactTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer` with exact evaluation and resume.

    Its loss is the mean over the target tokens of the whole batch, over all processes.
    """
