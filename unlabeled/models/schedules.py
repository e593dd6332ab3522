"""The learning rate of a run: the schedules of transformers, with a warm-up that starts above zero."""

from collections.abc import Callable

import torch
from transformers import TrainingArguments, get_scheduler


def learning_rate_factor(args: TrainingArguments, steps: int) -> Callable[[int], float]:
    """The learning rate of each step as a share of `learning_rate`, for `torch.optim.lr_scheduler.LambdaLR`.

    Most schedules of transformers warm up from zero, so that the first step changes nothing. Here step k of a warm-up
    of W steps has the rate that transformers gives step k + 1, which is (k + 1) / W if the warm-up is linear. From step
    W on, and in schedules that start above zero, rates are those of transformers.

    Args:
        args: for `lr_scheduler_type`, `lr_scheduler_kwargs`, `learning_rate` and the warm-up.
        steps: optimizer steps of the whole run.

    Returns:
        A function of the step, which counts from 0.

    Raises:
        TypeError, ValueError: `lr_scheduler_kwargs` do not fit the schedule.
    """
    warmup_steps = args.get_warmup_steps(steps)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps, steps, args.lr_scheduler_kwargs)
    (factor,) = scheduler.lr_lambdas
    if warmup_steps == 0 or factor(0) > 0:
        return factor

    def factor_from_above_zero(step: int) -> float:
        return factor(step + 1) if step < warmup_steps else factor(step)

    return factor_from_above_zero
