r"""Draw rows with probabilities proportional to scores, so that weights by inverse probability leave sums unbiased.

A row is one of the r rows of one of n samples. It is drawn if its permanent random number is below its inclusion
probability (Poisson sampling): draws of different rows are independent, draws of more rows contain those of fewer, and
neither the order of the samples nor the number of processes matters.

References:
    Särndal, Swensson & Wretman (1992), Model Assisted Survey Sampling, §3.5 (Poisson sampling); Ohlsson (1995),
    Coordination of samples using permanent random numbers; Steele, Lea & Flood (2014), doi 10.1145/2660193.2660195 (the
    generator whose mixing function is used).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

SHARE_OF_SCORES = 0.9
"""Share of the probabilities that is proportional to the scores; the rest is the same for all samples."""


@dataclass(frozen=True, eq=False)
class RowDraw:
    """Drawn rows, ordered by sample and row.

    Attributes:
        samples: index of each row's sample among those scored.
        rows: number of the row within its sample.
        probabilities: inclusion probability of each row.
        n_scored: number of samples scored.
        n_positive: number of rows with a positive score, which are those that can be drawn.
        expected: expected number of rows.
    """

    samples: Int64[Tensor, " R"]
    rows: Int64[Tensor, " R"]
    probabilities: Float[Tensor, " R"]
    n_scored: int
    n_positive: int
    expected: float

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True, eq=False)
class Rows:
    r"""Rows that were drawn.

    Attributes:
        positions: of each row: of its sample in the data set, and number of the row within the sample.
        part: 0 for rows that give directions, 1 for those that give magnitudes ("held_out"); the fold
            ("cross_fitted"); 0 ("same_batch").
        inclusion_probabilities: probability of each row to be drawn.
        design_effect: estimated variance of the trace of the curvature under this draw, relative to as many rows
            drawn uniformly.
        known_share: share of the trace that is known because its rows were drawn,
            $\sum k_r \|v_r\|^2 / \sum w_r \|v_r\|^2$.
    """

    positions: Int64[Tensor, "R 2"]
    part: Int64[Tensor, " R"]
    inclusion_probabilities: Float[Tensor, " R"]
    design_effect: float
    known_share: float

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.positions)

    def __repr__(self) -> str:
        return (
            f"Rows({self.n} rows of {len(self.positions[:, 0].unique())} samples, known share of the trace "
            f"{self.known_share:.3f}, design effect {self.design_effect:.3g})"
        )


def draw_rows(
    scores: Float[Tensor, "n r"], sizes: Float[Tensor, "n r"], positions: Int64[Tensor, " n"], *, n_rows: int, seed: int
) -> RowDraw:
    """Draw about `n_rows` rows.

    Args:
        scores: of every row, proportional to its expected squared norm; rows with score 0 are never drawn.
        sizes: factor of the scores that says how a sample's floor is shared out among its rows.
        positions: of the samples in the data set, which identify them.
        n_rows: expected number of rows drawn; with as many positive scores or fewer, all of them are drawn.
        seed: of the draw.
    """
    mixed = mixed_scores(scores.double(), sizes.double())
    probabilities = inclusion_probabilities(mixed.flatten(), n_rows).view_as(mixed)
    numbers = permanent_numbers(positions, scores.shape[1], seed)
    samples, rows = (numbers < probabilities).nonzero().unbind(1)
    return RowDraw(
        samples, rows, probabilities[samples, rows], len(scores), int((mixed > 0).sum()), float(probabilities.sum())
    )


def mixed_scores(scores: Float[Tensor, "n r"], sizes: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """Mix scores with a floor that is the same for all samples and proportional to `sizes` within each."""
    mean = scores.mean()
    totals = sizes.sum(1, keepdim=True)
    floor = torch.where(totals > 0, sizes / torch.where(totals > 0, totals, 1.0), 0.0) * sizes.shape[1]
    relative = scores / mean if mean > 0 else torch.zeros_like(scores)
    mixed = SHARE_OF_SCORES * relative + (1 - SHARE_OF_SCORES) * floor
    return torch.where(scores > 0, mixed, 0.0)


def inclusion_probabilities(scores: Float[Tensor, " m"], n_rows: float) -> Float[Tensor, " m"]:
    r"""Return $\min(1, c s)$ with the c that makes their sum `n_rows`; 1 where too few scores are positive."""
    positive = scores > 0
    if int(positive.sum()) <= n_rows:
        return positive.to(scores.dtype)
    ordered = scores.sort(descending=True).values
    # c if the first k are certain: what is left of n_rows over what is left of the scores
    rest = ordered.flip(0).cumsum(0).flip(0)
    k = torch.arange(len(ordered), device=scores.device)
    factors = (n_rows - k) / rest.clamp_min(torch.finfo(scores.dtype).tiny)
    certain = int((factors * ordered >= 1).cumprod(0).sum())
    return (factors[certain] * scores).clamp_max(1.0)


def chances_of_the_rest(probabilities: Float[Tensor, " R"], share: float) -> Float[Tensor, " R"]:
    r"""Return the probability of a row to be in part b, given that it is not in part a.

    Drawn rows are dealt to b with the probability q, to a otherwise. Weighted by the inverse, the rows of b are an
    unbiased estimate of all rows outside a.

    Args:
        probabilities: inclusion probabilities $\pi$.
        share: q.
    """
    return share * probabilities / (1 - (1 - share) * probabilities)


def permanent_numbers(positions: Int64[Tensor, " n"], n_rows: int, seed: int) -> Float[Tensor, "n r"]:
    """Return a uniform number in (0, 1) for every row of every sample, which depends on position, row and seed only."""
    with np.errstate(over="ignore"):
        of_seed = _mixed(np.asarray([seed % 2**64], dtype=np.uint64))
        of_samples = _mixed(positions.numpy().astype(np.uint64) ^ of_seed)
        numbers = _mixed(of_samples[:, None] + np.arange(1, n_rows + 1, dtype=np.uint64) * _STEP)
    # the 53 bits of a double, and the middle of each interval
    return torch.from_numpy(((numbers >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Mix the bits of 64-bit integers (splitmix64)."""
    x = x + _STEP
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
