"""Evaluation in sums, counts in tokens, and a training loop that is looked after."""

import os
from functools import partial

from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from unlabeled.console import Progress, Stopwatch
from unlabeled.training.evaluation import TokenSums, figures, token_sums
from unlabeled.training.guards import (
    Preemption,
    SpikeGuard,
    Watchdog,
    count_skipped,
    explained_memory,
    leave_signals_to_the_parent,
    usable,
)
from unlabeled.training.saving import SavingMixin


def batch_sizes(args) -> dict[str, float]:
    """What a step trains on: tokens where they were counted, and pairs or examples where the budget is in them."""
    return {unit: size for unit in dict.fromkeys(("tokens", args.unit)) if (size := getattr(args, f"batch_{unit}"))}


def mean_loss(history: list[dict], default: float) -> float:
    """The mean training loss of all logged steps; Trainer's own leaves out those before the run was resumed."""
    logged = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if not logged:
        return default
    before = [0] + [step for step, _ in logged]
    total = sum(loss * (step - last) for (step, loss), last in zip(logged, before, strict=False))
    return total / logged[-1][0]


class ExactMixin(SavingMixin):
    """Exactness for `Trainer` and its subclasses, through methods that they are meant to override.

    Args:
        objective: "clm", "mlm", "span", "sft", "dpo", "classify", "tag" or "embed".
        splits: the manifest's counts of the training and the evaluation split.
        eval_collator: collator of the evaluation; the same rows always get the same masks.
    """

    def __init__(self, *args, objective: str, splits: dict, eval_collator=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.objective, self.splits = objective, splits
        self.eval_collator = eval_collator or self.data_collator
        self.stopwatch = Stopwatch()
        self.preemption, self.watchdog = Preemption(self.args.max_hours), Watchdog()
        for guard in (self.preemption, SpikeGuard(), self.watchdog):  # what is about to be saved is looked at
            self.add_callback(guard)
        self._kept, self._left_out = (0, 0.0), 0  # since the last log: steps and the sum of their losses; others
        self._evaluated: tuple[int, dict] | None = None
        self._resuming: str | None = None

    # --- Evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict:
        """Nats and targets summed over the split: the same for any batch size and number of processes."""
        if self._evaluated and self._evaluated[0] == self.state.global_step:  # the last step was evaluated in training
            return dict(self._evaluated[1])
        with self.stopwatch.paused("evaluation"):
            metrics = self.held_out_figures()
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._evaluated = (self.state.global_step, metrics)
        return dict(metrics)

    def held_out_figures(self) -> dict[str, float]:
        return figures(self.token_sums(), self.objective, self.splits["validation"])

    def token_sums(self, collator=None) -> TokenSums:
        if not self.accelerator._models:  # evaluation without training before it
            self.model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        return token_sums(
            self.model,  # not the wrapped one: other batch shapes would make a compiled model compile again
            self.eval_dataset,
            collator or self.eval_collator,
            self.args.per_device_eval_batch_size,
            shift=self.objective in ("clm", "sft"),
            device=self.args.device,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            reduce=lambda tensor: self.accelerator.reduce(tensor, reduction="sum"),
        )

    # --- Counts in tokens -------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Every entry of the history has its tokens (examples, pairs) and seconds; `epoch` is passes over the text."""
        if "loss" in logs:
            if self._left_out and self._kept[0]:  # the mean of the steps that were made
                logs["loss"] *= (self._kept[0] + self._left_out) / self._kept[0]
            elif self._left_out:
                logs.pop("loss")
            self._kept, self._left_out = (0, 0.0), 0
        if "train_loss" in logs:
            logs["train_loss"] = mean_loss(self.state.log_history, default=logs["train_loss"])
        # Trainer's own epoch is the share of the run, since the training data are the whole run in order.
        self.state.epoch = self.state.global_step * self.args.rows_per_step / self.splits["train"]["rows"]
        logs |= {unit: round(self.state.global_step * size) for unit, size in batch_sizes(self.args).items()}
        logs["train_seconds"] = round(self.stopwatch.seconds, 3)
        super().log(logs, start_time)

    # --- Training and checkpoints -----------------------------------------------------------------------------------

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)
        if inner.num_workers:
            inner.worker_init_fn = partial(leave_signals_to_the_parent, inner.worker_init_fn)
        return loader

    def train(self, resume_from_checkpoint=None, **kwargs):
        if resume_from_checkpoint is not None:
            resume_from_checkpoint = self._for_these_processes(resume_from_checkpoint)
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
            if hasattr(self.train_dataset, "resume"):  # Trainer would count through all the batches before
                self.train_dataset.resume(state.global_step * self.args.rows_per_step, resume_from_checkpoint)
                self.args.ignore_data_skip, self._resuming = True, resume_from_checkpoint
            # TRL counts the tokens of a run in an attribute that has no public name and is in no checkpoint.
            counted = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
            if counted and hasattr(self, "_total_train_tokens"):
                self._total_train_tokens = counted[-1]
            self.args.eval_on_start = False  # the checkpoint's history has that evaluation
        plan = next((one.plan for one in self.callback_handler.callbacks if isinstance(one, Progress)), {})
        try:
            with explained_memory(self.args, plan.get("memory_by_micro_batch", {})):
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.watchdog.stop()
        self.preemption.check(self.args, self.state)
        return output

    def training_step(self, *args, **kwargs):
        if self._resuming:  # starting the data loader has drawn from the random state
            self._load_rng_state(self._resuming)
            self._resuming = None
        return super().training_step(*args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm before clipping, looked at while the step can still be left out, with its loss."""
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is None or self.is_deepspeed_enabled:  # DeepSpeed has no such moment
            return norm
        if usable(float(norm), self.args, self.state):
            self._kept = (self._kept[0] + 1, self._tr_loss.clone())
            return norm
        self.log({"skipped_steps": count_skipped(float(norm), self.args, self.state)})
        self._left_out += 1
        self._tr_loss.zero_().add_(self._kept[1])
        for parameter in model.parameters():
            parameter.grad = None  # which optimizers take for a parameter that took no part
        return norm


class ExactTrainer(ExactMixin, Trainer):
    """`Trainer` with `ExactMixin`."""
