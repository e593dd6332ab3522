"""A trainer for sentence embeddings: a budget in pairs, fixed order, and exact evaluation of pairs."""

import math

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import SequentialSampler

from unlabeled.config import EmbedArguments
from unlabeled.data.pairs import GRADES, text_columns
from unlabeled.errors import UserError
from unlabeled.models.embedding import embed, load_saved_embedder
from unlabeled.training.results import Samples
from unlabeled.training.trainer import ExactTrainerMixin

SCALE = 20.0  # of the cosines in the softmax: the inverse of a temperature of 0.05, as in sentence-transformers


def describe_batch(args: EmbedArguments, negatives: int = 0) -> str:
    """A line for the plan; `negatives` is the number of hard negatives of a pair."""
    hard = f" and {args.batch_pairs * negatives:,} hard negatives" if negatives else ""
    processes = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
    return (
        f"{args.batch_pairs:,} pairs over {processes}, each anchor among "
        f"{args.batch_pairs:,} positives{hard}, {args.per_device_train_batch_size} embedded at a time, "
        f"{args.max_steps:,} steps"
    )


class ExactSentenceTransformerTrainer(ExactTrainerMixin, SentenceTransformerTrainer):
    """`SentenceTransformerTrainer` with a fixed order of rows, and exact evaluation and resume."""

    def make_plan(self, model: SentenceTransformer, args, data_collator, kwargs: dict) -> dict:
        return super().make_plan(model.transformers_model, args, data_collator, kwargs)

    def describe_isolation(self, model, data_collator) -> str:
        return "one text in a row"

    def plan_lines(self, model, args) -> dict[str, str]:
        return {"batch": describe_batch(args, self.splits["train"]["negatives"])}

    @property
    def text_tokenizer(self):
        return self.model.tokenizer

    def get_batch_sampler(self, dataset, batch_size: int, drop_last: bool, **_) -> DefaultBatchSampler:
        """Batches of the rows in their order."""
        return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write in one process: Trainer calls this in all, and sentence-transformers writes the same files in each."""
        if self.args.should_save:
            super()._save(output_dir, state_dict)

    def add_model_card_callback(self, default_args_dict: dict) -> None:
        """Leave the card to `export`."""

    @property
    def rows_per_epoch(self) -> int:
        """Pairs of the whole batches of an epoch, see `order_of_pairs`."""
        pairs = self.splits["train"]["rows"]
        return pairs - pairs % self.args.batch_pairs

    def check_dataset(self, dataset) -> None:
        columns = set(getattr(dataset, "column_names", None) or ())
        if not {"anchor", "positive"} <= columns:
            raise UserError("evaluate: the data set needs the columns anchor and positive")

    def load_saved(self) -> SentenceTransformer:
        texts = self.eval_dataset["anchor"][:8]
        return load_saved_embedder(self.args.output_dir, self.model, texts, self.args)

    def held_out_metrics(self, dataset: Dataset, prefix: str) -> dict[str, float]:
        """The metrics of pairs; the same for any evaluation batch and any number of processes, which all embed all.

        - `eval_loss`: as in training, each anchor with the positives and the hard negatives of the next pairs,
          `batch_pairs` in all, except negatives that are the anchor or its positive again.
        - `accuracy_at_1`, `mrr`: the rank of an anchor's own positive among all held-out positives; ties count as lost.
        - `spearmanr`: rank correlation of the cosine and what an anchor shares with a text: the passage (`positive`),
          the work (`same_work`) or nothing (`other_work`), where the data have these columns.
        """
        batch_size = self.args.per_device_eval_batch_size
        was_training = self.model.training
        graded_columns = [name for name in GRADES if name in dataset.column_names]
        vectors = {name: embed(self.model, dataset[name][:], batch_size) for name in graded_columns}
        anchors = embed(self.model, dataset["anchor"][:], batch_size)
        cosines = anchors @ vectors["positive"].T
        pair_count = len(dataset)
        window_size = min(self.args.batch_pairs, pair_count)
        window = (torch.arange(pair_count)[:, None] + torch.arange(window_size)) % pair_count
        candidates = [cosines.gather(1, window)]
        for name in text_columns(dataset)[2:]:
            negatives = anchors @ embed(self.model, dataset[name][:], batch_size).T
            negatives = negatives.masked_fill(is_own_text(dataset, name), -math.inf)
            candidates.append(negatives.gather(1, window))
        losses = -(SCALE * torch.cat(candidates, dim=1)).log_softmax(dim=1)[:, 0]
        self.model.train(was_training)
        rank = (cosines >= cosines.diag()[:, None]).sum(dim=1)
        metrics = {
            "eval_loss": float(losses.mean()),
            "accuracy_at_1": float((rank == 1).double().mean()),
            "mrr": float((1 / rank).mean()),
        }
        if len(vectors) == len(GRADES):
            similarities = torch.cat([(anchors * vectors[name]).sum(dim=1) for name in GRADES])
            correlation = float(spearmanr(np.repeat(list(GRADES.values()), pair_count), similarities).statistic)
            metrics["spearmanr"] = 0.0 if math.isnan(correlation) else correlation  # nan where all embeddings are equal
        return metrics | {"pairs": pair_count}


def is_own_text(pairs: Dataset, column: str) -> torch.Tensor:
    """Which negatives are the anchor or the positive of which pair: bool (pairs, negatives)."""
    rows_of_text: dict[str, list[int]] = {}
    for row, text in enumerate(pairs[column]):
        rows_of_text.setdefault(text, []).append(row)
    is_own = torch.zeros(len(pairs), len(pairs), dtype=torch.bool)
    for name in ("anchor", "positive"):
        for row, text in enumerate(pairs[name]):
            is_own[row, rows_of_text.get(text, [])] = True
    return is_own


def nearest_neighbours(
    before: SentenceTransformer, after: SentenceTransformer, pairs: Dataset, batch_size: int
) -> Samples:
    """The nearest held-out positives of the first three anchors, before and after training."""
    lines = ["The nearest of all held-out positives to the first anchors, before and after this stage.", ""]
    anchors = pairs["anchor"][:3]
    positives = pairs["positive"][:]
    nearest = {}
    for name, model in (("before", before), ("after", after)):
        cosines = embed(model, anchors, batch_size) @ embed(model, positives, batch_size).T
        nearest[name] = cosines.max(dim=1)
    for row, anchor in enumerate(anchors):
        sections = {"Anchor": anchor, "Its positive": positives[row]}
        for name, (cosines, indices) in nearest.items():
            sections[f"Nearest {name} (cosine {cosines[row]:.2f})"] = positives[indices[row]]
        for heading, text in sections.items():
            lines += [f"**{heading}**", ""]
            lines += [f"    {line}" for line in text.splitlines()]
            lines.append("")
        lines += ["---", ""]
    return Samples("\n".join(lines), example=[pairs[0]["anchor"], pairs[0]["positive"]])
