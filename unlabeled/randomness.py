"""Random numbers that are a pure function of what they are for, never of what was drawn before.

Masks come from (seed, epoch, row) and the order of an epoch from (seed, epoch). Nothing has to be saved in a
checkpoint, evaluation is the same each time, and neither the number of processes nor that of data loader workers
matters.
"""

import numpy as np

# The seed of every evaluation mask: one constant, so that runs with different seeds are scored on the same masks.
EVALUATION_SEED = 0


def generator(purpose: str, *key: int) -> np.random.Generator:
    """A generator for a purpose and integers from 0 up, for example `generator("mask", seed, epoch, row)`."""
    # SeedSequence ignores trailing zeros, (1,) and (1, 0) would be one stream: the length of the key goes in first.
    entropy = [int.from_bytes(purpose.encode(), "little"), len(key), *key]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of the rows in one epoch: int64 of shape (size,)."""
    return generator("order", seed, epoch).permutation(size)
