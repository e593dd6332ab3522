"""Random numbers that are a pure function of what they are used for.

Masks come from (seed, epoch, row) and the order of an epoch from (seed, epoch), never from the state of a generator.
Therefore checkpoints hold no random state, evaluations are repeatable, and neither the number of processes nor that of
data loader workers changes a run.
"""

import numpy as np

# The seed of all evaluation masks: a constant, so that runs with different seeds are compared on the same masks.
EVALUATION_SEED = 0


def seeded_generator(purpose: str, *key: int) -> np.random.Generator:
    """A generator for a purpose and non-negative integers, for example `seeded_generator("mask", seed, epoch, row)`."""
    # SeedSequence ignores trailing zeros, so that (1,) and (1, 0) would be one stream: the key's length goes in first.
    entropy = [int.from_bytes(purpose.encode(), "little"), len(key), *key]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def epoch_permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of the rows in one epoch: int64 (size,)."""
    return seeded_generator("order", seed, epoch).permutation(size)
