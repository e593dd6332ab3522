"""Which documents are held out: those whose content hashes below `eval_fraction`."""

import hashlib

from unlabeled.errors import UserError


def unit_hash(raw: bytes) -> float:
    """A number in [0, 1) from the content alone; what lies below `eval_fraction` is held out, wherever it stands."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") / 2**64


def check_held_out(eval_fraction: float, train: int, held_out: int, unit: str = "documents") -> None:
    """Refuse an `eval_fraction` that holds out nothing, or everything.

    Args:
        train, held_out: how many documents, examples or pairs (`unit`) ended on each side.

    Raises:
        UserError: naming `eval_fraction`.
    """
    if eval_fraction and train and not held_out:
        raise UserError(
            f"eval_fraction {eval_fraction} holds out none of the {train:,} {unit}; raise it, or set eval_data"
        )
    if eval_fraction and held_out and not train:
        raise UserError(
            f"eval_fraction {eval_fraction} holds out all of the {held_out:,} {unit}; lower it, or set eval_data"
        )
