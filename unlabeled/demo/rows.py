"""Splits and orders of rows by hash: a row keeps its split and its place on every machine."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

Rows = Iterator[tuple[str, dict]]  # (split, row)


def sha256(content: bytes) -> bytes:
    """The SHA-256 of some bytes."""
    return hashlib.sha256(content).digest()


def split_of(key: str, train: int = 80, validation: int = 10) -> str:
    """The split of every row with this key.

    A hash decides, not a shuffle, so that a row keeps its split whatever else is in the file.

    Args:
        key: What the rows of one split share.
        train: Percentage of the training split.
        validation: Percentage of the validation split; the rest is the test split.
    """
    bucket = int.from_bytes(sha256(key.encode())[:8], "big") % 100
    if bucket < train:
        return "train"
    return "validation" if bucket < train + validation else "test"


def sort_by_hash(items: Iterable[T], key: Callable[[T], str] = str) -> list[T]:
    """Each item once, in an order that looks shuffled and does not depend on the order of `items`."""
    return sorted(dict.fromkeys(items), key=lambda item: sha256(key(item).encode()))


def tidy(text: str) -> str:
    """Remove spaces at the ends of lines, repeated empty lines, and empty lines at either end."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip("\n")


def message(role: str, content: str) -> list[dict[str, str]]:
    """A conversation of one message, as TRL reads it."""
    return [{"role": role, "content": content}]
