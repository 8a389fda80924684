"""Randomness that is repeatable and leaves nobody else's disturbed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def undisturbed_randomness(seed: int) -> Iterator[None]:
    """Run with torch's global generators seeded, then put back as they were.

    For code that is not ours to hand a generator to: samplers, augmentations, collate functions.

    Args:
        seed: of the CPU and the CUDA generators inside.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
