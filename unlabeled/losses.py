"""The loss: the mean over target tokens of the whole batch, whatever its division into micro-batches and processes.

Trainer calls `compute_loss_func(outputs, labels, num_items_in_batch)` with the number of targets of the whole
accumulated batch over all processes. Left to the models' own losses, BERT, RoBERTa, DistilBERT and others come out
larger by the factor of the accumulation, because they ignore that number (transformers issue 47688).
"""

import torch
import torch.nn.functional as F

IGNORE = -100


def token_nats(logits: torch.Tensor, labels: torch.Tensor, shift: bool) -> torch.Tensor:
    """The sum of -log p over all targets, in nats, computed in float32.

    Args:
        logits: (rows, length, vocabulary), any float type.
        labels: int64 (rows, length), -100 where there is no target.
        shift: True when position t predicts label t + 1 (causal), False when it predicts label t (masked).
    """
    if shift:
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def causal_lm_loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
    """Next-token loss for `Trainer(compute_loss_func=...)`: nats per target of the whole batch."""
    return token_nats(outputs.logits, labels, shift=True) / num_items_in_batch


def masked_lm_loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
    """Masked-token loss for `Trainer(compute_loss_func=...)`: nats per target of the whole batch."""
    return token_nats(outputs.logits, labels, shift=False) / num_items_in_batch
