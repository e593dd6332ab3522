"""Trainers with exact evaluation and resume, checkpoints that are whole or absent, and guards."""

from unlabeled.training.results import Samples
from unlabeled.training.trainer import ExactTrainer, ExactTrainerMixin

__all__ = ["ExactTrainer", "ExactTrainerMixin", "Samples"]
