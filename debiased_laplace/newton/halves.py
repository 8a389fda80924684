"""A batch in parts that share no sample, not even an equal one."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from jaxtyping import Int64
from torch import Tensor

from debiased_laplace.data.batches import Batch, sample_hashes

Positions = Int64[Tensor, " _"]


def draw_parts(batch: Batch, shares: Sequence[float], seed: int) -> list[Positions]:
    """Positions of disjoint parts, drawn by the seed; equal samples stay in one part.

    Batches repeat samples where data sets do. Equal ones in two parts would let the directions see what they are judged
    by.

    Args:
        batch: to be divided.
        shares: of the samples, for every part.
        seed: of the draw.

    Returns:
        Increasing positions of each part, all samples together. Equal samples make sizes differ from the shares.

    Raises:
        ValueError: if a part would be empty.
    """
    n = len(batch)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    _, kind = torch.unique(sample_hashes(batch)[order], return_inverse=True)
    # of every kind of sample, where it comes first in the order drawn
    first = torch.full((n,), n).scatter_reduce(0, kind, torch.arange(n), "amin")[kind]
    first, together = first.sort(stable=True)
    ends = [*(first.diff().nonzero().flatten() + 1).tolist(), n]
    wanted = [int(n * share / sum(shares) + 1e-9) for share in accumulate(shares)]
    cuts = [0, *(min(ends, key=lambda end, w=w: abs(end - w)) for w in wanted[:-1]), n]  # type: ignore[misc]
    parts = [order[together][i:j].sort().values for i, j in pairwise(cuts)]
    if min(len(part) for part in parts) == 0:
        raise ValueError(
            f"Expected samples that can be divided into {len(parts)} parts without equal ones in two of them; got {n} "
            f"samples of {len(ends)} kinds."
        )
    return parts


def draw_halves(batch: Batch, seed: int) -> tuple[Positions, Positions]:
    """Positions of two disjoint halves, the first of which is smaller by one where the number is odd.

    Raises:
        ValueError: if all samples are equal, or there is only one.
    """
    a, b = draw_parts(batch, (0.5, 0.5), seed)
    return a, b
