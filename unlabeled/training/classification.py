"""A trainer for classes, tags and numbers: its loss, exact scores, early stopping and a report."""

import math
import os
from pathlib import Path

import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from transformers import EarlyStoppingCallback, Trainer

from unlabeled import compat
from unlabeled.data.labeled_rows import LabeledSplit, task_lines
from unlabeled.data.labels import Task
from unlabeled.data.targets import IGNORE_INDEX
from unlabeled.errors import UserError
from unlabeled.models.classification import check_direction, describe_heads, describe_pooling
from unlabeled.reporting.label_report import class_report, regression_report
from unlabeled.training.results import Samples
from unlabeled.training.trainer import ExactTrainerMixin

METRICS = Path(__file__).parent / "metrics"
# The metric that early stopping watches.
BEST = {"classification": "accuracy", "entities": "f1", "regression": "spearmanr"}


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Nats of all targets that are not -100; where the labels are numbers, the sum of squared errors. In float32."""
    if labels.is_floating_point():
        return F.mse_loss(logits.float().squeeze(-1), labels, reduction="sum")
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def label_loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
    """For `Trainer(compute_loss_func=...)`: the mean over the targets of the whole batch, over all processes."""
    return summed_loss(outputs.logits, labels) / num_items_in_batch


class ResumableEarlyStopping(EarlyStoppingCallback):
    """`EarlyStoppingCallback` for exact resuming.

    It does not count the evaluation that a run, or a resumed one, starts with. A run that is resumed after it has
    stopped early stops again: Trainer makes one step before it asks, whose weights are neither evaluated nor saved.

    Attributes:
        start: the step at which this process began to train.
        has_stopped: whether the run had stopped early before it was resumed.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.start = state.global_step
        self.has_stopped = self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_step_end(self, args, state, control, **kwargs):
        if self.has_stopped:
            control.should_training_stop = True
            control.should_log = False
            control.should_evaluate = False
            control.should_save = False

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if state.global_step > self.start:
            super().on_evaluate(args, state, control, metrics, **kwargs)


class ExactClassificationTrainer(ExactTrainerMixin, Trainer):
    """`Trainer` that evaluates labels exactly: from the predictions of all processes, in the order of the data.

    Args:
        task: names of the labels, and whether each word has one.
        heads: the modules that are trained in full: {name: whether it is initialized at random}.
        splits: of which "test", where there is one, is evaluated once, after training.
        is_causal: as the model was loaded with.
        kwargs: those of `ExactTrainerMixin` and `Trainer`.
    """

    def __init__(
        self,
        *,
        task: Task,
        heads: dict[str, bool],
        labeled: dict[str, LabeledSplit],
        is_causal: bool | None = None,
        **kwargs,
    ):
        self.task = task
        self.heads = heads
        self.labeled = labeled
        self.is_causal = is_causal
        self.predictions: dict[str, np.ndarray] = {}  # of every target of a split, by the prefix of its metrics
        args = kwargs["args"]
        if args.load_best_model_at_end:
            args.metric_for_best_model = f"eval_{BEST[task.metric]}"
            args.greater_is_better = True
        # In memory and under a name of its own, as several processes may start at once.
        options = {"experiment_id": str(os.getpid()), "keep_in_memory": True}
        self.metric = evaluate.load(str(METRICS / f"{task.metric}.py"), **options)
        super().__init__(**kwargs)
        if args.early_stopping_patience:
            self.add_callback(ResumableEarlyStopping(args.early_stopping_patience))

    def make_plan(self, model, args, data_collator, kwargs: dict) -> dict:
        if model.config.is_encoder_decoder:
            self.manifest["target_length"] = args.max_length  # the decoder reads the text as well
        return super().make_plan(model, args, data_collator, kwargs)

    def describe_isolation(self, model, data_collator) -> str:
        return "one sentence in a row" if self.task.words else "one text in a row"

    def plan_lines(self, model, args) -> dict[str, str]:
        direction = check_direction(model, self.is_causal)
        head = describe_heads(self.heads)
        if not self.task.words:
            head = f"reads {describe_pooling(model)}, {head}"
        return task_lines(self.task, self.labeled) | {"attention": direction, "head": head}

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        for callback in self.callback_handler.callbacks:  # Trainer has put a restored one in the place of ours
            if isinstance(callback, ResumableEarlyStopping) and callback.has_stopped:
                self.state.global_step = callback.start  # the step after it is not part of the run
        if self.args.load_best_model_at_end:
            self._evaluated = None  # `Trainer` has loaded the best weights, which were evaluated earlier
        return output

    def check_dataset(self, dataset) -> None:
        if not isinstance(dataset, LabeledSplit):
            raise UserError("evaluate: pass a split of unlabeled.data.labeled_rows.read_task")

    def held_out_metrics(self, dataset: LabeledSplit, prefix: str) -> dict[str, float]:
        metrics = self.evaluate_split(dataset, prefix)
        return {f"eval_{name.removeprefix(f'{prefix}_')}": value for name, value in metrics.items()}

    def final_metrics(self) -> dict[str, float]:
        metrics = super().final_metrics()
        if "test" in self.labeled:
            metrics |= self.evaluate_split(self.labeled["test"], "test")
        return metrics

    @torch.no_grad()
    def evaluate_split(self, split: LabeledSplit, prefix: str) -> dict[str, float]:
        """Loss and metrics over a whole split; the same for any batch size and number of processes.

        The predictions are kept in `predictions[prefix]`.
        """
        if not compat.has_prepared_model(self.accelerator):  # evaluation without training before it
            self.model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        args = self.args
        batch_size = args.per_device_eval_batch_size
        longest_first = np.argsort(-split.lengths, kind="stable")  # so that little is padded
        rounds = math.ceil(len(longest_first) / args.world_size)
        # A prediction for each target, each filled in by one process, and the loss at the end. A class is stored as
        # its id plus 1, so that 0 is a word without a token.
        sums = torch.zeros(len(split.truth) + 1, dtype=torch.float64)
        was_training = self.model.training
        self.model.eval()
        for start in range(0, rounds, batch_size):
            turns = range(start, min(start + batch_size, rounds))
            indices = [turn * args.world_size + args.process_index for turn in turns]
            rows = [int(longest_first[index]) for index in indices if index < len(longest_first)]
            # Forward passes are collective, so a process without rows computes one that is not counted.
            examples = [split.rows[row] for row in rows or [longest_first[0]]]
            batch = compat.prepare_inputs(self, self.data_collator(examples))
            labels = batch.pop("labels")
            with self.accelerator.autocast():
                logits = self.model(**batch).logits
            if not rows:
                continue
            sums[-1] += summed_loss(logits, labels).double().cpu()
            values = logits.float().squeeze(-1) if not self.task.names else logits.argmax(-1) + 1
            if self.task.words:
                values = values[labels != IGNORE_INDEX]
            targets = np.concatenate([split.visible_targets[row] for row in rows])
            sums[torch.from_numpy(targets)] = values.double().cpu()
        self.model.train(was_training)
        sums = self.accelerator.reduce(sums.to(args.device), reduction="sum").cpu().numpy()
        predicted = sums[:-1]
        if self.task.names:
            predicted = predicted.astype(int) - 1
        if self.task.words:
            predicted[predicted < 0] = self.task.outside
        self.predictions[prefix] = predicted
        target_count = sum(map(len, split.visible_targets))
        scores = {key: value for key, value in self.score(split, predicted).items() if isinstance(value, float)}
        return {f"{prefix}_loss": float(sums[-1]) / target_count} | {
            f"{prefix}_{key}": value for key, value in scores.items()
        }

    def score(self, split: LabeledSplit, predicted: np.ndarray) -> dict:
        """The metrics of these predictions, with those of each type of entity under `kinds`."""
        if self.task.metric != "entities":
            return self.metric.compute(predictions=predicted, references=split.truth)
        ends = np.cumsum(split.counts)[:-1]
        names = np.array(self.task.names)
        sentences = [[part.tolist() for part in np.split(names[ids], ends)] for ids in (predicted, split.truth)]
        return self.metric.compute(predictions=sentences[0], references=sentences[1])

    def report(self) -> Samples:
        """Metrics of each class, and examples of errors, on the test data where there are some.

        Writes `confusion.png` or `predictions.png` into `output_dir`. For `export(samples=...)`.
        """
        name, prefix = ("test", "test") if "test" in self.labeled else ("validation", "eval")
        split = self.labeled[name]
        predicted = self.predictions[prefix]
        folder = Path(self.args.output_dir)
        title = f"{folder.resolve().name}: {name} data"
        if self.task.names:
            entities = self.score(split, predicted).get("kinds")
            markdown = class_report(self.task, split, predicted, entities, folder, title)
        else:
            markdown = regression_report(split, predicted, folder, title)
        return Samples(f"Measured on the {name} data.\n\n{markdown}", example=self._example())

    def _example(self) -> str | dict[str, str]:
        """The first validation text as a pipeline takes it."""
        text = self.labeled["validation"].texts[0]
        if self.task.words:
            return " ".join(text)
        if len(text) == 2:
            return {"text": text[0], "text_pair": text[1]}
        return text[0]
