"""Reproducible randomness without side effects on the global generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def undisturbed_randomness(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python, and restore their states on exit.

    For code that takes no generator: samplers, augmentations, collate functions.

    Args:
        seed: seed of the generators inside the context.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
