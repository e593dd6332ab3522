"""Fine-tuning on labels: batches of one length, the loss, the model with its head, exact scores and a report."""

import os
from itertools import pairwise
from pathlib import Path

import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GenericForSequenceClassification

from unlabeled.data.labeled_rows import LabeledSplit
from unlabeled.data.labels import Task
from unlabeled.data.targets import IGNORE_INDEX
from unlabeled.errors import UserError
from unlabeled.models.adapter_files import adapter_base
from unlabeled.models.configs import load_config
from unlabeled.models.loading import load_with_info
from unlabeled.reporting.plots import plot_confusion, plot_scatter
from unlabeled.training import ExactTrainerMixin

METRICS = Path(__file__).parent / "metrics"
BEST = {"classification": "accuracy", "entities": "f1", "regression": "spearmanr"}  # what early stopping watches


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Nats of all targets that are not -100; where the labels are numbers, the sum of squared errors. In float32."""
    if labels.is_floating_point():
        return F.mse_loss(logits.float().squeeze(-1), labels, reduction="sum")
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def label_loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
    """For `Trainer(compute_loss_func=...)`: the mean over the targets of the whole batch, over all processes."""
    return summed_loss(outputs.logits, labels) / num_items_in_batch


def load_labelled(
    auto_class, args, task: Task, tokenizer, is_causal: bool | None
) -> tuple[PreTrainedModel, dict[str, bool]]:
    """The model that `AdapterArguments` name with a head for the labels, and the modules that are trained in full.

    Those belong to the head, or are new beside it: {name: whether it begins at random}. A checkpoint that has a head
    for as many labels is continued with it.

    Raises:
        UserError: no such model or head, or a combination that would not be exact.
    """
    name = args.model_name_or_path
    if is_deepspeed_zero3_enabled():
        raise UserError("ZeRO-3 would draw a new head in shards, another one for each number of processes; use ZeRO-2")
    if args.adapter == "qlora":
        raise UserError("adapter: qlora would quantise the new head as well; set it to lora")
    if adapter_base(name):
        raise UserError(f"model_name_or_path {name} is an adapter; merge it first with scripts/merge_adapter.py")
    config = load_config(name)
    if type(config) not in auto_class._model_mapping:
        kind = auto_class.__name__.removeprefix("AutoModelFor")
        raise UserError(f"transformers has no model for {kind} of model_type {config.model_type}; choose another model")
    if is_causal is not None:
        if config.is_encoder_decoder:
            raise UserError("is_causal is for models of one stack; remove it for an encoder-decoder")
        config.is_causal = is_causal
    config.update(task.config | {"pad_token_id": tokenizer.pad_token_id})
    model, info = load_with_info(auto_class, name, args.attn_implementation, other_heads=True, config=config)
    drawn = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    heads = {
        child: any(key.split(".")[0] == child for key in drawn)
        for child, module in model.named_children()
        if child != model.base_model_prefix and any(True for _ in module.parameters())
    }
    # What else the checkpoint did not have, such as BERT's pooler.
    inside = {key.rsplit(".", 1)[0] for key in drawn if key.split(".")[0] not in heads}
    return model, heads | dict.fromkeys(sorted(inside), True)


def describe_heads(heads: dict[str, bool]) -> str:
    """Which modules of a head are new, and which a checkpoint for as many labels had, for the plan."""
    kinds = {
        "new": [name for name, new in heads.items() if new],
        "continued": [n for n, new in heads.items() if not new],
    }
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)


@torch.no_grad()
def check_direction(model, is_causal: bool | None) -> str:
    """Measure whether a token sees those after it, and return a line for the plan.

    Raises:
        UserError: the architecture does not do what `is_causal` says.
    """
    if model.config.is_encoder_decoder:
        return "the encoder's to both sides"
    ids = torch.tensor([[7, 8, 9, 10], [7, 8, 9, 11]], device=model.device) % model.config.vocab_size
    states = model.eval().base_model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    sees = bool((states[0, :3] - states[1, :3]).abs().max() > 1e-6)
    if is_causal is not None and sees is is_causal:
        raise UserError(f"{type(model).__name__} does not honour is_causal: {str(is_causal).lower()}; remove the key")
    return "to both sides" if sees else "to the left only (is_causal: false opens it)"


def describe_pooling(model) -> str:
    """What of a text the head of a stock model for sequence classification reads."""
    config = model.config
    if config.is_encoder_decoder:
        return "the decoder's state at the end token"
    if isinstance(model, GenericForSequenceClassification) or hasattr(model, "score"):
        return "the last token that is no padding"
    pooling = getattr(config, "classifier_pooling", None)
    return {"mean": "the mean of the tokens", "late": "the mean of the tokens' scores"}.get(pooling, "the first token")


def reads_type_ids(model) -> bool:
    """Whether the model has an embedding of token types; GPT-2 takes `token_type_ids` too, and adds those words."""
    return (getattr(model.config, "type_vocab_size", None) or 0) > 1


def check_end_tokens(model, splits: dict[str, LabeledSplit], name: str) -> None:
    """Heads of encoder-decoders read the state at the end token, of which each text needs exactly one."""
    eos = model.config.eos_token_id
    rows = [row["input_ids"] for split in splits.values() for row in split.rows]
    if model.config.is_encoder_decoder and any((row == eos).sum() != 1 or row[-1] != eos for row in rows):
        raise UserError(f"the tokenizer of {name} does not end each text with its end token, which the head reads")


class ResumableEarlyStopping(EarlyStoppingCallback):
    """`EarlyStoppingCallback` that does not count the evaluation a run, or a resumed one, starts with."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.start = state.global_step

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if state.global_step > self.start:
            super().on_evaluate(args, state, control, metrics, **kwargs)


class DownstreamTrainer(ExactTrainerMixin, Trainer):
    """`Trainer` with exact evaluation of labels: predictions of all processes, in the order of the data.

    Args:
        task, test: what is learned; the `Split` that is scored at the end.
    """

    def __init__(self, *args, task: Task, test: LabeledSplit | None = None, **kwargs):
        self.task, self.test = task, test
        self.predictions: dict[str, np.ndarray] = {}  # of each target of a split
        training_args = kwargs["args"]
        if training_args.load_best_model_at_end:
            training_args.metric_for_best_model, training_args.greater_is_better = f"eval_{BEST[task.metric]}", True
        # In memory and under a name of its own: several processes may start at once.
        alone = {"experiment_id": str(os.getpid()), "keep_in_memory": True}
        self.metric = evaluate.load(str(METRICS / f"{task.metric}.py"), **alone)
        super().__init__(*args, **kwargs)
        if training_args.early_stopping_patience:
            self.add_callback(ResumableEarlyStopping(training_args.early_stopping_patience))

    def train(self, *args, **kwargs):
        done = super().train(*args, **kwargs)  # Trainer itself puts the best weights back
        if self.args.load_best_model_at_end:
            self._evaluated = None  # they were evaluated earlier
        return done

    def check_dataset(self, dataset) -> None:
        if not isinstance(dataset, LabeledSplit):
            raise UserError("evaluate: pass a split of unlabeled.data.labeled_rows.read_task")

    def held_out_metrics(self, dataset: LabeledSplit, prefix: str) -> dict[str, float]:
        metrics = self.figures(dataset, prefix)
        return {f"eval_{name.removeprefix(f'{prefix}_')}": value for name, value in metrics.items()}

    @torch.no_grad()
    def figures(self, split: LabeledSplit, name: str) -> dict[str, float]:
        """Loss and metrics over a whole split; the same for any batch size and number of processes."""
        if not self.accelerator._models:  # evaluation without training before it
            self.model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        args, size = self.args, self.args.per_device_eval_batch_size
        order = np.argsort(-split.lengths, kind="stable")  # so that little is padded
        rounds = -(-len(order) // args.world_size)
        # One more than the class, and 0 for words without a token. Each place is filled by one process.
        found = torch.zeros(len(split.truth) + 1, dtype=torch.float64)
        was_training = self.model.training
        self.model.eval()
        for start in range(0, rounds, size):
            turns = range(start, min(start + size, rounds))
            places = [turn * args.world_size + args.process_index for turn in turns]
            inside = [int(order[place]) for place in places if place < len(order)]
            rows = [split.rows[row] for row in inside] or [split.rows[order[0]]]  # forward passes are collective
            batch = self._prepare_inputs(self.data_collator(rows))
            labels = batch.pop("labels")
            with self.accelerator.autocast():
                logits = self.model(**batch).logits
            if not inside:
                continue
            found[-1] += summed_loss(logits, labels).double().cpu()
            values = logits.float().squeeze(-1) if not self.task.names else logits.argmax(-1) + 1
            values = values[labels != IGNORE_INDEX].double().cpu() if self.task.words else values.double().cpu()
            found[torch.from_numpy(np.concatenate([split.places[row] for row in inside]))] = values
        self.model.train(was_training)
        found = self.accelerator.reduce(found.to(args.device), reduction="sum").cpu().numpy()
        targets = sum(map(len, split.places))
        predicted = found[:-1] if not self.task.names else found[:-1].astype(int) - 1
        if self.task.words:
            predicted[predicted < 0] = self.task.outside
        self.predictions[name] = predicted
        scores = {key: value for key, value in self.score(split, predicted).items() if isinstance(value, float)}
        return {f"{name}_loss": float(found[-1]) / targets} | {f"{name}_{key}": v for key, v in scores.items()}

    def score(self, split: LabeledSplit, predicted: np.ndarray) -> dict:
        """The metrics of these predictions, with those of each kind of entity under `kinds`."""
        truth = split.truth
        if self.task.metric == "entities":
            cuts, names = np.cumsum(split.counts)[:-1], np.array(self.task.names)
            tags_of_rows = ([part.tolist() for part in np.split(names[ids], cuts)] for ids in (predicted, truth))
            predicted_tags, true_tags = tags_of_rows
            return self.metric.compute(predictions=predicted_tags, references=true_tags)
        return self.metric.compute(predictions=predicted, references=truth)


# --- Report -----------------------------------------------------------------------------------------------------------


def report(trainer: DownstreamTrainer, examples: int = 5) -> str:
    """Markdown: figures of each class, and examples that are wrong; beside it a picture of the predictions.

    Of the test data where there are some, otherwise of the validation data.
    """
    name, split = ("test", trainer.test) if trainer.test else ("eval", trainer.eval_dataset)
    task, truth, predicted = trainer.task, split.truth, trainer.predictions[name]
    folder, what = Path(trainer.args.output_dir), "test data" if name == "test" else "validation data"
    title = f"{folder.resolve().name}: {what}"
    if not task.names:
        plot_scatter(truth, predicted, folder / "predictions.png", title)
        far = np.argsort(-np.abs(predicted - truth), kind="stable")[:examples]
        lines = [f"The {what} that the model is furthest from.", "", "| text | true | predicted |", "|---|---|---|"]
        lines += [f"| {_cell(split.texts[i])} | {truth[i]:.3g} | {predicted[i]:.3g} |" for i in far]
        return "\n".join([*lines, "", "![Predicted against true numbers](predictions.png)", ""])
    matrix = np.zeros((len(task.names),) * 2, dtype=int)
    np.add.at(matrix, (truth, predicted), 1)
    plot_confusion(matrix, task.names, folder / "confusion.png", title)
    unit = "words" if task.words else "texts"
    lines = [f"Each {'tag' if task.words else 'class'} of the {what}, in {unit}.", ""]
    lines += _table({task.names[i]: row for i, row in enumerate(_per_class(matrix))})
    if kinds := trainer.score(split, predicted).get("kinds"):
        lines += ["", f"Each kind of entity of the {what}, whole entities.", "", *_table(kinds)]
    lines += ["", "![Confusion](confusion.png)", "", f"Some of the {what} that are predicted wrongly.", ""]
    starts = np.concatenate([[0], np.cumsum(split.counts)])
    wrong = [i for i, (a, b) in enumerate(pairwise(starts)) if (truth[a:b] != predicted[a:b]).any()]
    lines += ["| text | true | predicted |", "|---|---|---|"]
    for i in wrong[:: max(len(wrong) // examples, 1)][:examples]:
        span = range(starts[i], starts[i + 1])
        off = [place for place in span if truth[place] != predicted[place]]
        words = [f"{split.texts[i][split.words[place]]}: " if task.words else "" for place in off]
        said = ["; ".join(f"{word}{task.names[ids[place]]}" for word, place in zip(words, off, strict=True))
                for ids in (truth, predicted)]  # fmt: skip
        lines.append(f"| {_cell(split.texts[i])} | {_cell([said[0]])} | {_cell([said[1]])} |")
    return "\n".join([*lines, ""])


def _per_class(matrix: np.ndarray) -> list[dict[str, float]]:
    right, support, claimed = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    precision, recall = right / np.maximum(claimed, 1), right / np.maximum(support, 1)
    f1 = 2 * right / np.maximum(support + claimed, 1)
    keys = ("precision", "recall", "f1", "support")
    return [dict(zip(keys, row, strict=True)) for row in zip(precision, recall, f1, support, strict=True)]


def _table(rows: dict[str, dict[str, float]]) -> list[str]:
    lines = ["| | precision | recall | F1 | support |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        scores = " | ".join(f"{row[key]:.3f}" for key in ("precision", "recall", "f1"))
        lines.append(f"| {_cell([name])} | {scores} | {row['support']:,.0f} |")
    return lines


def _cell(text: list[str], longest: int = 200) -> str:
    """Text in a cell of a Markdown table."""
    whole = " ".join(" ".join(text).split()).replace("|", "\\|")
    return whole if len(whole) <= longest else f"{whole[: longest - 1]}…"
