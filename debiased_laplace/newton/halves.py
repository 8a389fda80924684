"""A batch in two halves that share no sample, not even an equal one."""

import torch
from jaxtyping import Int64
from torch import Tensor

from debiased_laplace.data.batches import Batch, sample_hashes

Halves = tuple[Int64[Tensor, " a"], Int64[Tensor, " b"]]


def draw_halves(batch: Batch, seed: int) -> Halves:
    """Positions of two disjoint halves, drawn by the seed; equal samples stay in one half.

    Batches repeat samples where data sets do. Equal ones in both halves would let the directions see what they are
    judged by.

    Args:
        batch: at least two different samples.
        seed: of the draw.

    Returns:
        Increasing positions of the first half, which is smaller by one where the number is odd, and of the second. With
        equal samples the sizes may differ by more.

    Raises:
        ValueError: if all samples are equal, or there is only one.
    """
    n = len(batch)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    _, kind = torch.unique(sample_hashes(batch)[order], return_inverse=True)
    # of every kind of sample, where it comes first in the order drawn
    first = torch.full((n,), n).scatter_reduce(0, kind, torch.arange(n), "amin")[kind]
    first, together = first.sort(stable=True)
    cuts = first.diff().nonzero().flatten() + 1
    if len(cuts) == 0:
        raise ValueError(
            f"Expected samples that can be split into two halves without equal ones in both; got {n} "
            f"{'equal samples' if n > 1 else 'sample'}."
        )
    cut = int(cuts[(cuts - n // 2).abs().argmin()])
    order = order[together]
    return order[:cut].sort().values, order[cut:].sort().values
