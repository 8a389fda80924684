"""Split a batch into disjoint parts, with equal samples in the same part."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from jaxtyping import Int64
from torch import Tensor

from debiased_laplace.data.batches import Batch, sample_hashes

Positions = Int64[Tensor, " _"]


def disjoint_split(batch: Batch, shares: Sequence[float], seed: int) -> list[Positions]:
    """Draw disjoint parts of a batch at random.

    Args:
        batch: the samples.
        shares: share of the samples in each part.
        seed: of the draw.

    Returns:
        Increasing positions of each part, together all samples. With equal samples, sizes may differ from the shares.

    Raises:
        ValueError: if a part would be empty.
    """
    n = len(batch)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    # equal samples in two parts would let the directions depend on the samples that measure along them
    _, kind = torch.unique(sample_hashes(batch)[order], return_inverse=True)
    # the first place in the drawn order of each kind of sample
    first = torch.full((n,), n).scatter_reduce(0, kind, torch.arange(n), "amin")[kind]
    first, together = first.sort(stable=True)
    ends = [*(first.diff().nonzero().flatten() + 1).tolist(), n]
    wanted = [int(n * share / sum(shares) + 1e-9) for share in accumulate(shares)]
    cuts = [0, *(min(ends, key=lambda end, w=w: abs(end - w)) for w in wanted[:-1]), n]  # type: ignore[misc]
    parts = [order[together][i:j].sort().values for i, j in pairwise(cuts)]
    if min(len(part) for part in parts) == 0:
        raise ValueError(
            f"Expected samples that can be divided into {len(parts)} parts without equal ones in two of them; got {n} "
            f"samples, {len(ends)} of them distinct."
        )
    return parts


def disjoint_halves(batch: Batch, seed: int) -> tuple[Positions, Positions]:
    """Draw two disjoint halves of a batch; the first is smaller by one if the number of samples is odd.

    Raises:
        ValueError: if there are fewer than two distinct samples.
    """
    a, b = disjoint_split(batch, (0.5, 0.5), seed)
    return a, b
