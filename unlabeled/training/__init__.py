"""What Trainer lacks for exact pretraining: evaluation in sums, whole checkpoints, counts in tokens, guards."""

from unlabeled.training.preference import PreferenceMixin
from unlabeled.training.results import finish
from unlabeled.training.trainer import ExactTrainer, ExactTrainerMixin

__all__ = ["ExactTrainer", "ExactTrainerMixin", "PreferenceMixin", "finish"]
