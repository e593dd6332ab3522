"""The learning rate over a run: the schedules of transformers, with a warm-up that begins above zero."""

from collections.abc import Callable

import torch
from transformers import get_scheduler


def learning_rate_factor(args, steps: int) -> Callable[[int], float]:
    """The learning rate of step 0, 1, ... as a share of `learning_rate`.

    Most schedules of transformers warm up from zero, so that the first step changes nothing. Here step k of a warm-up
    of W steps has the rate that is there at step k + 1, (k + 1) / W where the warm-up is linear; from step W on nothing
    is changed. Schedules that begin above zero are left as they are.

    Args:
        args: for `lr_scheduler_type`, `lr_scheduler_kwargs`, `learning_rate` and the warm-up.
        steps: of the whole run.

    Raises:
        TypeError, ValueError: `lr_scheduler_kwargs` do not go with the schedule.
    """
    warmup = args.get_warmup_steps(steps)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, args.lr_scheduler_kwargs)
    (factor,) = scheduler.lr_lambdas
    if warmup == 0 or factor(0) > 0:
        return factor

    def factor_from_above_zero(step: int) -> float:
        return factor(step + 1) if step < warmup else factor(step)

    return factor_from_above_zero
