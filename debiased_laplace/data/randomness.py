"""Randomness that is repeatable and leaves nobody else's disturbed."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def undisturbed_randomness(seed: int) -> Iterator[None]:
    """Run with the global generators of torch, NumPy and Python seeded, then put back as they were.

    For code that is not ours to hand a generator to: samplers, augmentations, collate functions.

    Args:
        seed: of the generators inside.
    """
    pythons, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
        finally:
            random.setstate(pythons)
            np.random.set_state(numpys)  # noqa: NPY002
