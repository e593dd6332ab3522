"""Held-out documents: those whose content has a hash below `eval_fraction`."""

import hashlib

from unlabeled.errors import UserError


def unit_hash(raw: bytes) -> float:
    """A number in [0, 1) that depends on the content alone."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") / 2**64


def check_held_out(eval_fraction: float, train: int, held_out: int, unit: str = "documents") -> None:
    """Refuse an `eval_fraction` that holds out nothing, or everything.

    Args:
        eval_fraction: share to hold out.
        train, held_out: documents, examples or pairs in each split.
        unit: what they are, for messages.

    Raises:
        UserError: one of the splits is empty.
    """
    if eval_fraction and train and not held_out:
        raise UserError(
            f"eval_fraction {eval_fraction} holds out none of the {train:,} {unit}; raise it, or set eval_data"
        )
    if eval_fraction and held_out and not train:
        raise UserError(
            f"eval_fraction {eval_fraction} holds out all of the {held_out:,} {unit}; lower it, or set eval_data"
        )
