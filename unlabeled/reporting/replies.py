"""Earlier home of `models.generation.reply` and `reporting.samples`, until the recipes use the new ones."""

from unlabeled.models.generation import reply  # noqa: F401
from unlabeled.reporting.samples import compare_replies, first_prompts  # noqa: F401
