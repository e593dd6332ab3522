"""A `Trainer` with exact evaluation, budgets in tokens, guards, and an export that a reader understands."""

import os
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME

from unlabeled import compat
from unlabeled.config.compilation import resolve_compile
from unlabeled.errors import RunFinished, UserError
from unlabeled.hub.finished_run import report_finished_run
from unlabeled.hub.preconditions import check_push, check_push_of_own_base
from unlabeled.models.adapters import clear_base_name, has_own_base, save_own_base
from unlabeled.models.attention import check_isolation
from unlabeled.models.exports import load_and_check_export
from unlabeled.models.optimizers import OptimizerFactory
from unlabeled.models.schedules import learning_rate_factor
from unlabeled.reporting.run_plan import estimate_run, make_run_plan, print_run_plan
from unlabeled.runtime.checkpoints import find_checkpoint_defect
from unlabeled.runtime.output_dir import acquire_output_dir, make_output_dir
from unlabeled.runtime.safe_loading import check_checkpoint
from unlabeled.training.epochs import EpochEnds
from unlabeled.training.evaluation import TokenSums, token_metrics, token_sums, with_prefix
from unlabeled.training.memory_errors import user_error_on_out_of_memory
from unlabeled.training.preemption import Preemption
from unlabeled.training.progress import add_token_progress
from unlabeled.training.results import Samples, batch_sizes, named_model, write_results
from unlabeled.training.run_identity import run_identity
from unlabeled.training.saving import BestCheckpointPath, SavingMixin
from unlabeled.training.spikes import SpikeGuard, count_skipped, is_finite_step
from unlabeled.training.timer import TrainingTimer
from unlabeled.training.watchdog import Watchdog
from unlabeled.training.workers import protect_workers, user_error_on_dead_worker

# The class that loads what a stage exports.
AUTO_CLASSES = {
    "clm": AutoModelForCausalLM,
    "mlm": AutoModelForMaskedLM,
    "span": AutoModelForSeq2SeqLM,
    "sft": AutoModelForCausalLM,
    "dpo": AutoModelForCausalLM,
    "classify": AutoModelForSequenceClassification,
    "tag": AutoModelForTokenClassification,
}


def describe_own_optimizer(trainer_arguments: dict) -> str | None:
    """A line for the plan on an optimizer that is not the one of the training arguments, None where it is that."""
    optimizer_class, _ = trainer_arguments.get("optimizer_cls_and_kwargs") or (None, None)
    optimizer, _ = trainer_arguments.get("optimizers") or (None, None)
    if optimizer is not None:
        optimizer_class = type(optimizer)
    if optimizer_class in (None, OptimizerFactory):
        return None
    return f"{optimizer_class.__name__}, as the recipe says (memory is estimated for that of the arguments)"


def mean_loss(history: list[dict], default: float) -> float:
    """The mean training loss of all logged steps; Trainer's own leaves out those before the run was resumed."""
    logged = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if not logged:
        return default
    before = [0] + [step for step, _ in logged]
    total = sum(loss * (step - last) for (step, loss), last in zip(logged, before, strict=False))
    return total / logged[-1][0]


class ExactTrainerMixin(SavingMixin):
    """Exact evaluation, whole checkpoints, token counts and guards for `Trainer` and its subclasses.

    `train()` prints the run plan, acquires `output_dir`, resumes from the newest complete checkpoint and trains;
    `evaluate()` is exact; `export()` saves the model, and what a reader of the folder needs beside it.

    Args:
        model: on the device of `args`.
        args: one of the training arguments of `unlabeled.config`.
        objective: name of the stage: "clm", "mlm", "span", "sft", "dpo", "classify", "tag" or "embed".
        manifest: what is known of the data: counts of each split, fingerprint, sources.
        arguments: the other dataclasses that the recipe has parsed. Their values are recorded in the lineage, and
            compared when the run is resumed.
        eval_collator: data collator of the evaluation, which gives a row the same masks each time; `data_collator` by
            default.
        kwargs: those of the trainer that is extended.

    Raises:
        UserError: the model, the data and the arguments do not fit together, or the Hub refuses the token.
    """

    _is_constructed = False

    def __init__(
        self,
        *,
        model,
        args,
        objective: str,
        manifest: dict,
        arguments: tuple = (),
        data_collator=None,
        eval_collator=None,
        **kwargs,
    ):
        self.objective = objective
        self.manifest = manifest
        self.splits = manifest["splits"]
        self.arguments = (*arguments, args)
        check_push(args)
        if args.push_to_hub and has_own_base(model):
            check_push_of_own_base(args)
        # Before `Trainer` is made, since it reads there whether the model is to be compiled.
        self.plan = self.make_plan(model, args, data_collator, kwargs)
        make_output_dir(args.output_dir)  # `Trainer` would raise an OSError
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)  # type: ignore[call-arg]
        self.eval_collator = eval_collator or self.data_collator
        self.timer = TrainingTimer()
        self.preemption = Preemption(self.args.max_hours)
        self.watchdog = Watchdog()
        self.add_callback(self.timer)
        self.add_callback(BestCheckpointPath())
        self.add_callback(EpochEnds(self.rows_per_epoch, self.args.rows_per_step))
        self.add_callback(self.preemption)
        self.add_callback(SpikeGuard())
        self.add_callback(self.watchdog)
        self.progress = add_token_progress(self, self.plan)
        if hasattr(self.train_dataset, "heartbeat") and not self.args.dataloader_num_workers:
            self.train_dataset.heartbeat = self.watchdog.beat
        # Since the last log: the steps whose gradients were used with the sum of their losses, and the skipped steps.
        self._used = (0, 0.0)
        self._skipped = 0
        self._evaluated: tuple[int, dict] | None = None  # step and metrics of the last evaluation
        self._resuming: str | None = None
        self._is_started = False
        self._is_constructed = True

    # --- The run ----------------------------------------------------------------------------------------------------

    def make_plan(self, model, args, data_collator, kwargs: dict) -> dict:
        """The run plan: sizes, costs and lines to print; see `make_run_plan`."""
        parent = named_model(self.arguments)
        head_share = getattr(kwargs.get("compute_loss_func"), "head_share", None)
        isolation = self.describe_isolation(model, data_collator)
        estimate = estimate_run(model, args, self.manifest, head_share)
        resolve_compile(args, estimate.costs.flops)
        plan = make_run_plan(model, args, self.manifest, estimate, isolation, parent)
        plan["lines"] |= self.plan_lines(model, args)
        optimizer = describe_own_optimizer(kwargs)
        if optimizer:
            plan["lines"]["optimizer"] = optimizer
        return plan

    @property
    def text_tokenizer(self):
        """The tokenizer of the training text."""
        return self.processing_class

    def describe_isolation(self, model, data_collator) -> str:
        """A line for the plan on whether documents of one row see each other, which is tried out on the model."""
        if hasattr(data_collator, "probe"):
            return check_isolation(model, data_collator)
        return f"not checked: {type(data_collator).__name__} has no method `probe`"

    def plan_lines(self, model, args) -> dict[str, str]:
        """More lines for the plan, for trainers of single tasks."""
        return {}

    def start(self) -> None:
        """Acquire `output_dir` for this run, and print the plan. All processes call it.

        `train()` calls it first; a second call does nothing.

        Raises:
            RunFinished: the folder holds this run, finished. Its push is repeated where it is missing.
            UserError: the folder holds another run, another process trains in it, or its disk is too small.
        """
        if self._is_started:
            return
        args = self.args
        identity = run_identity(self.manifest, self.text_tokenizer, *self.arguments)
        with args.main_process_first(local=False) as is_first:
            is_finished = acquire_output_dir(args.output_dir, identity, self.plan["disk_bytes"], is_first)
        if is_finished:
            report_finished_run(args)
            raise RunFinished(f"{args.output_dir} holds this run, finished")
        if self.is_world_process_zero():
            print_run_plan(self.plan)
        self._is_started = True
        if args.push_to_hub:
            self.init_hf_repo()

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository on the Hub when training begins, and not when the trainer is made."""
        if self._is_constructed:
            super().init_hf_repo(token, private)

    def export(self, samples: Callable[[Any], Samples | str] | None = None, metrics: dict | None = None) -> dict:
        """Save the model in `output_dir`, check it, and write everything that a reader of the folder needs.

        The folder gets the model in the Hugging Face layout, `metrics.json`, `history.json`, the loss curve,
        `samples.md`, `lineage.json` and the model card. All processes call it.

        Args:
            samples: called in the first process with the model as `from_pretrained` loads it from the folder; returns
                what the model can do, as `Samples` or as Markdown.
            metrics: recorded beside those of the evaluation.

        Returns:
            the metrics of the run, as in `metrics.json`; empty in the other processes.

        Raises:
            RuntimeError: a saved weight is not the one that was trained.
            UserError: the disk is full.
        """
        args = self.args
        final = self.final_metrics() | (metrics or {})
        trained = self.accelerator.unwrap_model(self.model)
        if has_own_base(trained):
            clear_base_name(trained)
        self.save_model()
        if not self.is_world_process_zero():
            return {}
        if has_own_base(trained):
            save_own_base(trained.rebuild_base(), self.text_tokenizer, args.output_dir)
        saved = self.load_saved()
        content = samples(saved) if samples else ""
        if isinstance(content, str):
            content = Samples(content)
        results = write_results(self, final | content.metrics, content)
        if content.markdown:
            print(f"\n{content.markdown}")
        return results

    def final_metrics(self) -> dict[str, float]:
        """The metrics of the trained model: those of the validation split, evaluated now where they are not known."""
        return self.evaluate()

    def load_saved(self):
        """The model as its users load it from `output_dir`, compared with the trained one weight by weight."""
        return load_and_check_export(AUTO_CLASSES[self.objective], self.args.output_dir, self.model)

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
        return token_metrics(self.token_sums(dataset=dataset), self.objective, split)

    def token_sums(self, collator=None, dataset=None) -> TokenSums:
        if not compat.has_prepared_model(self.accelerator):  # evaluation without training before it
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
        """Add tokens (examples, pairs) and seconds of training to each entry; `epoch` counts passes over the text."""
        if "loss" in logs:
            used_steps, _ = self._used
            if self._skipped and used_steps:  # Trainer divides by the number of all steps
                logs["loss"] *= (used_steps + self._skipped) / used_steps
            elif self._skipped:
                logs.pop("loss")
            self._used = (0, 0.0)
            self._skipped = 0
        if "train_loss" in logs:
            logs["train_loss"] = mean_loss(self.state.log_history, default=logs["train_loss"])
        # Trainer's own epoch is the share of the run, since the training data set holds the rows of the whole run.
        self.state.epoch = self.state.global_step * self.args.rows_per_step / self.rows_per_epoch
        logs |= {unit: round(self.state.global_step * size) for unit, size in batch_sizes(self.args).items()}
        logs["train_seconds"] = round(self.timer.seconds, 3)
        super().log(logs, start_time)

    # --- Training and checkpoints -----------------------------------------------------------------------------------

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)
        if inner.num_workers:
            protect_workers(inner)
        return loader

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> LambdaLR:
        """The scheduler of Trainer, with a warm-up that begins above zero: see `learning_rate_factor`."""
        if self.lr_scheduler is None:
            built = super().create_scheduler(num_training_steps, optimizer)
            self.lr_scheduler = LambdaLR(built.optimizer, learning_rate_factor(self.args, num_training_steps))
        return self.lr_scheduler

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, **kwargs):
        """Train to the end of the budget, from the newest complete checkpoint of `output_dir` where there is one.

        Args:
            resume_from_checkpoint: the folder of a checkpoint to resume from instead; True where there has to be one
                in `output_dir`; False to train from the beginning.

        Raises:
            UserError: there is no such checkpoint, or it is not complete; or as `start` does.
            RunFinished: the run is finished already.
            Stopped: a signal or `max_hours` ended the run; it is saved.
        """
        self.start()
        checkpoint = self._find_checkpoint(resume_from_checkpoint)
        ignore_data_skip = self.args.ignore_data_skip
        eval_on_start = self.args.eval_on_start
        if checkpoint is not None:
            checkpoint = self._prepare_resume(checkpoint)
            self.args.eval_on_start = False  # the history of the checkpoint has that evaluation
        memory = self.plan["memory_by_micro_batch"]
        try:
            with user_error_on_out_of_memory(self.args, memory), user_error_on_dead_worker(self.args.output_dir):
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            self.watchdog.stop()
            self.args.eval_on_start = eval_on_start
            self.args.ignore_data_skip = ignore_data_skip
        self.preemption.check(self.args, self.state)
        return output

    def _find_checkpoint(self, resume_from_checkpoint: str | os.PathLike | bool | None) -> str | None:
        """The checkpoint that `train` resumes from, None to train from the beginning; see `train`."""
        if resume_from_checkpoint is False:
            return None
        if resume_from_checkpoint is None or resume_from_checkpoint is True:
            newest = self.newest_checkpoint()
            if newest is None and resume_from_checkpoint is True:
                raise UserError(f"there is no complete checkpoint in {self.args.output_dir} to resume from")
            return newest
        return os.fspath(resume_from_checkpoint)

    def _prepare_resume(self, checkpoint: str) -> str:
        """Check a checkpoint, and restore what Trainer does not: the position in the data and TRL's token count.

        Returns:
            the checkpoint, or a copy of it that this number of processes can load.
        """
        if defect := find_checkpoint_defect(checkpoint):
            raise UserError(f"cannot resume from {checkpoint}: {defect}")
        check_checkpoint(checkpoint)
        checkpoint = self._for_these_processes(checkpoint)
        state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        if state.best_model_checkpoint:  # `load_best_model_at_end` reads it
            check_checkpoint(state.best_model_checkpoint)
        if hasattr(self.train_dataset, "resume"):  # Trainer would iterate through all earlier batches
            self.train_dataset.resume(state.global_step * self.args.rows_per_step, checkpoint)
            self.args.ignore_data_skip = True
            self._resuming = checkpoint
        token_counts = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        if token_counts:
            compat.restore_token_count(self, token_counts[-1])
        return checkpoint

    def training_step(self, *args, **kwargs):
        if self._resuming:  # the start of the data loader has drawn random numbers
            self._load_rng_state(self._resuming)
            self._resuming = None
        return super().training_step(*args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm before clipping. A step whose norm is not usable is skipped, with its loss."""
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is None or self.is_deepspeed_enabled:  # DeepSpeed updates the weights before the norm is known
            return norm
        used_steps, used_loss = self._used
        if is_finite_step(float(norm), self.args, self.state):
            self._used = (used_steps + 1, compat.running_loss(self).clone())
            return norm
        self.log({"skipped_steps": count_skipped(float(norm), self.args, self.state)})
        self._skipped += 1
        compat.running_loss(self).zero_().add_(used_loss)
        for parameter in model.parameters():
            parameter.grad = None  # optimizers leave such parameters as they are
        return norm


class ExactTrainer(ExactTrainerMixin, Trainer):
    """`Trainer` with `ExactTrainerMixin`."""
