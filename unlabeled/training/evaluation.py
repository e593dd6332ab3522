"""Evaluation: nats and targets are added up, never averages of averages."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import send_to_device

from unlabeled.data.rows import EvaluationRows
from unlabeled.data.targets import IGNORE_INDEX
from unlabeled.models.losses import ChunkedLinearCrossEntropy


@dataclass(frozen=True)
class TokenSums:
    """What an evaluation adds up: nats of all targets, how often each token was a target (int64, vocabulary)."""

    nats: float
    target_counts: np.ndarray

    @property
    def targets(self) -> int:
        return int(self.target_counts.sum())

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.nats / self.targets

    @property
    def unigram_entropy(self) -> float:
        """Nats per target of the best predictor that ignores the context; it knows the targets' frequencies."""
        share = self.target_counts[self.target_counts > 0] / self.targets
        return float(-(share * np.log(share)).sum())


@torch.no_grad()
def token_sums(
    model,
    rows,
    collator: Callable,
    batch_size: int,
    shift: bool,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> TokenSums:
    """Sum the loss over all `rows`, equal for any batch size and number of processes up to float32 rounding.

    Args:
        model: called with the collator's batch less `labels`; put back into its mode afterwards.
        rows: prepared rows of one split.
        shift: True for causal models, False for masked ones and for encoder-decoders.
        reduce: sums a float64 tensor over all processes.
    """
    from torch.utils.data import DataLoader

    vocabulary = model.config.vocab_size
    nats = torch.zeros((), dtype=torch.float64)
    counts = torch.zeros(vocabulary, dtype=torch.float64)
    was_training, loss = model.training, ChunkedLinearCrossEntropy(model, shift)
    model.eval()
    # num_workers 0 and no shuffle: the loader draws nothing from the global generator that training resumes from.
    state = torch.get_rng_state()
    with loss.in_evaluation():
        for batch in DataLoader(EvaluationRows(rows, rank, world_size), batch_size=batch_size, collate_fn=collator):
            batch = send_to_device(batch, device)
            labels = batch.pop("labels")
            nats += loss(model(**batch), labels).double().cpu()
            counts += torch.bincount(labels[labels != IGNORE_INDEX].cpu(), minlength=vocabulary)
    loss.remove()
    torch.set_rng_state(state)
    model.train(was_training)
    sums = torch.cat([nats[None], counts])
    if reduce is not None and world_size > 1:
        sums = reduce(sums.to(device)).cpu()
    return TokenSums(float(sums[0]), sums[1:].long().numpy())


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Bits for each UTF-8 byte of the text: comparable between tokenizers, unlike loss and perplexity."""
    return nats / (math.log(2) * text_bytes)


def token_metrics(sums: TokenSums, objective: str, split: dict | None, prefix: str = "eval") -> dict[str, float]:
    """The metrics of an evaluation.

    `bits_per_byte` of a causal model is the code length of the text, or of the targets of conversations: every token
    counts once. For masked tokens it is the cost of the text if each token had the mean loss: a way to compare
    tokenizers, and no code length. For spans there is none, as sentinels are targets too.

    Args:
        sums: of all targets.
        objective: name of the stage.
        split: counts of the split in the manifest (`text_tokens`, `bytes`); None leaves out `bits_per_byte`.
        prefix: of the loss.
    """
    metrics = {f"{prefix}_loss": sums.loss, "perplexity": math.exp(min(sums.loss, 700.0))}
    if split is not None and objective != "span":
        nats = sums.loss * split["text_tokens"] if objective == "mlm" else sums.nats
        metrics["bits_per_byte"] = bits_per_byte(nats, split["bytes"])
    return metrics | {"targets": sums.targets, "unigram_entropy": sums.unigram_entropy}


def with_prefix(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """The metrics of an evaluation, all of them under another prefix than `eval`; some have none under that one."""
    if prefix == "eval":
        return metrics
    return {f"{prefix}_{name.removeprefix('eval_')}": value for name, value in metrics.items()}
