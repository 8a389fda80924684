"""Scores of a test set in a few sums, so that stored reports of the same test set can be compared in pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

N_BATCHES = 64
COUNTS = "samples"


def sum_scores(
    scores: Mapping[str, Float[Tensor, " n"]], clusters: Int[Tensor, " n"] | None
) -> dict[str, tuple[float, ...]]:
    """Sums of every score over batches, and under "samples" the sizes of the batches.

    Sample i, or cluster i, is in batch i modulo 64, whatever is predicted: so the sums of two methods or two reports
    pair as the samples do, at the size of 64 numbers.

    Args:
        scores: name to one number per sample.
        clusters: number of each sample's cluster, from 0 on; None where all samples are independent.
    """
    first = next(iter(scores.values()), None)
    if first is None:
        return {}
    unit = torch.arange(first.numel()) if clusters is None else clusters.cpu()
    n_batches = min(N_BATCHES, int(unit.max()) + 1)
    batch = unit % n_batches
    ones = torch.ones(first.numel(), dtype=torch.float64)
    named = {COUNTS: ones, **{name: score.detach().cpu().to(torch.float64) for name, score in scores.items()}}
    return {
        name: tuple(torch.zeros(n_batches, dtype=torch.float64).index_add_(0, batch, score).tolist())
        for name, score in named.items()
    }


@dataclass(frozen=True)
class PairedSpread:
    """How far a difference of means may be from its expectation.

    Attributes:
        standard_error: of the difference.
        degrees_of_freedom: of Student's distribution for it.
    """

    standard_error: float
    degrees_of_freedom: int


def paired_spread(
    old: Mapping[str, Sequence[float]], new: Mapping[str, Sequence[float]], score: str
) -> PairedSpread | None:
    r"""Standard error of the difference of two means over the same samples.

    With batches b of n_b samples and sums D_b of the differences, mean $\bar D = \sum_b D_b / n$:
    $\frac{B}{B-1} \frac1{n^2} \sum_b (D_b - n_b \bar D)^2$.

    Args:
        old: the one's sums, as of `sum_scores`.
        new: the other's.
        score: name of the score.

    Returns:
        None where the sums are missing, of other batches, or of one batch.
    """
    sizes = old.get(COUNTS, ())
    if score not in old or score not in new or sizes != new.get(COUNTS) or len(sizes) < 2:
        return None
    if not len(old[score]) == len(new[score]) == len(sizes) or sum(sizes) <= 0:
        return None
    n, B = sum(sizes), len(sizes)
    D = [after - before for after, before in zip(new[score], old[score], strict=True)]
    mean = sum(D) / n
    squares = sum((d - size * mean) ** 2 for d, size in zip(D, sizes, strict=True))
    return PairedSpread(sqrt(B / (B - 1) * squares) / n, B - 1)
