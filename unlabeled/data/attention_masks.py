"""Block-diagonal attention masks, which keep the documents of a packed row apart."""

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch


def block_mask(document_ids: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """A bidirectional attention mask under which tokens attend only to tokens of their own document.

    Args:
        document_ids: int64 (rows, length) on the CPU. The tokens of a document must be adjacent.
        window: if given, tokens attend only to tokens at most this far away, as in ModernBERT's sliding layers.

    Returns:
        bool (rows, 1, length, length), True where a query (dim 2) may attend to a key (dim 3).
    """
    rows, length = document_ids.shape
    mask = np.zeros((rows, 1, length, length), dtype=bool)
    band = None if window is None else _band(length, window)
    is_boundary = (document_ids[:, 1:] != document_ids[:, :-1]).numpy()
    # Filled block by block: comparing all pairs of tokens would dominate the time of a data loader that feeds a GPU.
    for row in range(rows):
        boundaries = np.flatnonzero(is_boundary[row]) + 1
        for start, end in pairwise([0, *boundaries, length]):
            mask[row, 0, start:end, start:end] = True if band is None else band[: end - start, : end - start]
    return torch.from_numpy(mask)


@lru_cache(maxsize=4)
def _band(length: int, window: int) -> np.ndarray:
    """bool (length, length), True where two positions are at most `window` apart."""
    positions = np.arange(length)
    return abs(positions[:, None] - positions[None, :]) <= window
