"""Evaluation in sums, counts in tokens, and a training loop that is looked after."""

import os

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from unlabeled.errors import UserError
from unlabeled.models.schedules import learning_rate_factor
from unlabeled.runtime.checkpoints import find_checkpoint_defect
from unlabeled.runtime.safe_loading import check_checkpoint
from unlabeled.training.epochs import EpochEnds
from unlabeled.training.evaluation import TokenSums, figures, token_sums, with_prefix
from unlabeled.training.guards import (
    Preemption,
    SpikeGuard,
    Watchdog,
    count_skipped,
    is_finite_step,
    look_after_workers,
    user_error_on_dead_worker,
    user_error_on_out_of_memory,
)
from unlabeled.training.progress import TokenProgressCallback
from unlabeled.training.saving import BestCheckpointPath, SavingMixin
from unlabeled.training.timer import TrainingTimer


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


class ExactTrainerMixin(SavingMixin):
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
        self.timer = TrainingTimer()
        self.preemption, self.watchdog = Preemption(self.args.max_hours), Watchdog()
        self.add_callback(self.timer)
        self.add_callback(BestCheckpointPath())
        self.add_callback(EpochEnds(self.rows_per_epoch, self.args.rows_per_step))
        for guard in (self.preemption, SpikeGuard(), self.watchdog):  # what is about to be saved is looked at
            self.add_callback(guard)
        if hasattr(self.train_dataset, "heartbeat") and not self.args.dataloader_num_workers:
            self.train_dataset.heartbeat = self.watchdog.beat
        self._kept, self._left_out = (0, 0.0), 0  # since the last log: steps and the sum of their losses; others
        self._evaluated: tuple[int, dict] | None = None
        self._resuming: str | None = None

    # --- Evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict:
        """Exact sums over a data set: the same for any batch size and number of processes.

        Args:
            eval_dataset: of the kind that the trainer was made with, its own by default; a dict of them is evaluated
                one by one, as `metric_key_prefix` and its key; a string is a key of the trainer's own dict.
            ignore_keys: has nothing to ignore, since nothing but losses and decisions leaves the processes.
            metric_key_prefix: of all metrics; with "eval", those that belong to the text alone have none.

        Returns:
            the metrics. `bits_per_byte` is there for the trainer's own data set only, whose bytes are known.

        Raises:
            UserError: the data set is of another kind.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            if not isinstance(self.eval_dataset, dict) or dataset not in self.eval_dataset:
                raise UserError(f"evaluate: the trainer has no data set of the name {dataset!r}; pass the data set")
            return self.evaluate(self.eval_dataset[dataset], ignore_keys, f"{metric_key_prefix}_{dataset}")
        if isinstance(dataset, dict):
            parts = (self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in dataset.items())
            return {name: value for metrics in parts for name, value in metrics.items()}
        is_own = dataset is self.eval_dataset and metric_key_prefix == "eval"
        if is_own and self._evaluated and self._evaluated[0] == self.state.global_step:  # in training, or just before
            return dict(self._evaluated[1])
        if not is_own:
            self.check_dataset(dataset)
        with self.timer.paused("evaluation"), self.watchdog.watching(self.model):
            metrics = with_prefix(self.held_out_metrics(dataset, metric_key_prefix), metric_key_prefix)
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if is_own:
            self._evaluated = (self.state.global_step, metrics)
        return dict(metrics)

    def predict(self, test_dataset=None, ignore_keys=None, metric_key_prefix: str = "test"):
        """Trainer's would average over batches.

        Raises:
            UserError: always.
        """
        raise UserError(
            "predict is not supported, since batches of packed or padded rows have no predictions of one shape; "
            "call evaluate(dataset, metric_key_prefix=...), or load the output folder with a pipeline"
        )

    def check_dataset(self, dataset) -> None:
        """Raises UserError for a data set that `held_out_metrics` cannot read."""
        columns = getattr(dataset, "column_names", None) or ()
        needed = ("input_ids", "lengths", "targets") if self.objective == "sft" else ("input_ids", "lengths")
        missing = [name for name in needed if name not in columns]
        if missing:
            raise UserError(f"evaluate: the data set has no column {missing[0]}; pass rows of unlabeled.data.preparing")

    def held_out_metrics(self, dataset, prefix: str) -> dict[str, float]:
        """The metrics of a data set, named as with the prefix "eval"."""
        split = self.splits["validation"] if dataset is self.eval_dataset else None
        return figures(self.token_sums(dataset=dataset), self.objective, split)

    def token_sums(self, collator=None, dataset=None) -> TokenSums:
        if not self.accelerator._models:  # evaluation without training before it
            self.model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        return token_sums(
            self.model,  # not the wrapped one: other batch shapes would make a compiled model compile again
            self.eval_dataset if dataset is None else dataset,
            collator or self.eval_collator,
            self.args.per_device_eval_batch_size,
            shift=self.objective in ("clm", "sft"),
            device=self.args.device,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            reduce=lambda tensor: self.accelerator.reduce(tensor, reduction="sum"),
        )

    # --- Counts in tokens -------------------------------------------------------------------------------------------

    @property
    def rows_per_epoch(self) -> int:
        """Rows (pairs, examples) of the training text that are taken in one epoch."""
        return self.splits["train"]["rows"]

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
        self.state.epoch = self.state.global_step * self.args.rows_per_step / self.rows_per_epoch
        logs |= {unit: round(self.state.global_step * size) for unit, size in batch_sizes(self.args).items()}
        logs["train_seconds"] = round(self.timer.seconds, 3)
        super().log(logs, start_time)

    # --- Training and checkpoints -----------------------------------------------------------------------------------

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)
        if inner.num_workers:
            look_after_workers(inner)
        return loader

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> LambdaLR:
        """Trainer's, but for a warm-up that begins above zero: see `learning_rate_factor`."""
        if self.lr_scheduler is None:
            built = super().create_scheduler(num_training_steps, optimizer)
            self.lr_scheduler = LambdaLR(built.optimizer, learning_rate_factor(self.args, num_training_steps))
        return self.lr_scheduler

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, **kwargs):
        """Train, from the beginning or from a checkpoint, to the end of the budget.

        Args:
            resume_from_checkpoint: the folder of a checkpoint, or True for the newest complete one of `output_dir`.

        Raises:
            UserError: there is no such checkpoint, or it is not complete.
            Stopped: a signal or `max_hours` ended the run; it is saved.
        """
        ignore_data_skip = self.args.ignore_data_skip
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.newest_checkpoint()
            if resume_from_checkpoint is None:
                raise UserError(f"there is no complete checkpoint in {self.args.output_dir} to resume from")
        if resume_from_checkpoint is False:
            resume_from_checkpoint = None
        if resume_from_checkpoint is not None:
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            if defect := find_checkpoint_defect(resume_from_checkpoint):
                raise UserError(f"cannot resume from {resume_from_checkpoint}: {defect}")
            check_checkpoint(resume_from_checkpoint)
            resume_from_checkpoint = self._for_these_processes(resume_from_checkpoint)
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
            if state.best_model_checkpoint:  # read at the end with `load_best_model_at_end`
                check_checkpoint(state.best_model_checkpoint)
            if hasattr(self.train_dataset, "resume"):  # Trainer would count through all the batches before
                self.train_dataset.resume(state.global_step * self.args.rows_per_step, resume_from_checkpoint)
                self.args.ignore_data_skip, self._resuming = True, resume_from_checkpoint
            # TRL counts the tokens of a run in an attribute that has no public name and is in no checkpoint.
            counted = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
            if counted and hasattr(self, "_total_train_tokens"):
                self._total_train_tokens = counted[-1]
        plan = next((one.plan for one in self.callback_handler.callbacks if isinstance(one, TokenProgressCallback)), {})
        eval_on_start = self.args.eval_on_start
        if resume_from_checkpoint is not None:
            self.args.eval_on_start = False  # the history of the checkpoint has that evaluation
        try:
            memory = plan.get("memory_by_micro_batch", {})
            with user_error_on_out_of_memory(self.args, memory), user_error_on_dead_worker(self.args.output_dir):
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.watchdog.stop()
            self.args.eval_on_start = eval_on_start
            self.args.ignore_data_skip = ignore_data_skip
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
        if is_finite_step(float(norm), self.args, self.state):
            self._kept = (self._kept[0] + 1, self._tr_loss.clone())
            return norm
        self.log({"skipped_steps": count_skipped(float(norm), self.args, self.state)})
        self._left_out += 1
        self._tr_loss.zero_().add_(self._kept[1])
        for parameter in model.parameters():
            parameter.grad = None  # which optimizers take for a parameter that took no part
        return norm


class ExactTrainer(ExactTrainerMixin, Trainer):
    """`Trainer` with `ExactTrainerMixin`."""
