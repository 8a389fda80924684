r"""Share of the curvature in its leading rows, by scores that one forward pass gives.

Scores are counted in bins of equal width in their logarithm, so that memory does not depend on the number of rows. Rows
in one bin differ by at most 0.6 % and count alike.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.curvature.drawn_rows import RowScorer
from debiased_laplace.data.batches import Batch
from debiased_laplace.diagnosis.findings import grouped
from debiased_laplace.processes import ALONE, Processes

_BINS_PER_OCTAVE = 128
_N_BINS = 512 * _BINS_PER_OCTAVE
"""Scores from 2**-256 to 2**256; those outside are in the first or last bin."""


@dataclass(frozen=True, eq=False)
class RowShares:
    r"""Share of the curvature that the leading rows carry; `print` says where 99 % of it is.

    The curvature is the trace of the GGN or the empirical Fisher, the sum of the squared norms of its rows, each of
    which takes one backward pass. Shares are estimates by the rows' scores (see `RowScorer`), which take none: for a
    classifier of MNIST, their correlation with the squared norms is 0.965. Weights of samples count.

    Attributes:
        n_rows: number of all rows: one for each sample and output, or one for each sample (empirical Fisher).
        numbers: numbers of rows, 1, 2, 4, … and all of them.
        leading: share of the curvature in as many rows, those with the largest scores.
        n_for_90: smallest number of rows that carry 90 %.
        n_for_99: likewise 99 %.
    """

    n_rows: int
    numbers: Int64[Tensor, " k"]
    leading: Float[Tensor, " k"]
    n_for_90: int
    n_for_99: int

    @property
    def random(self) -> Float[Tensor, " k"]:
        """Share of the curvature that as many rows of random samples carry on average."""
        return self.numbers.double() / self.n_rows

    def __str__(self) -> str:
        share = 100 * self.n_for_99 / self.n_rows
        return (
            f"By their scores, 99 % of the curvature is in {grouped(self.n_for_99)} of {grouped(self.n_rows)} rows; as "
            f"many rows of random samples carry {share:{'.0f' if share >= 9.5 else '.2g'}} %."
        )


def row_shares(
    scorer: RowScorer, batches: Iterable[Batch], bar: "tqdm[None]", processes: Processes = ALONE
) -> RowShares | None:
    """Estimate which share of the curvature of all samples, of which processes read parts, the leading rows carry.

    Returns:
        The shares; None if no row has curvature.

    Raises:
        ValueError: if samples or outputs are not finite, or targets do not fit.
    """
    n_samples = torch.zeros(1, dtype=torch.int64)
    counts, sums = torch.zeros(2, _N_BINS, dtype=torch.float64)
    for batch in batches:
        scores = scorer.scored(batch).scores
        scores = scores[scores > 0]
        bins = (scores.log2() * _BINS_PER_OCTAVE).floor().long() + _N_BINS // 2
        bins = bins.clamp(0, _N_BINS - 1)
        counts += torch.bincount(bins, minlength=_N_BINS)
        sums += torch.bincount(bins, weights=scores, minlength=_N_BINS)
        n_samples += len(batch)
        bar.update(len(batch))
    processes.add([n_samples, counts, sums])
    return _shares(counts, sums, int(n_samples) * scorer.root.n_columns(scorer.network.n_outputs))


def _shares(counts: Float[Tensor, " b"], sums: Float[Tensor, " b"], n_rows: int) -> RowShares | None:
    """Interpolate between the bins, from the largest score on."""
    filled = counts.nonzero().flatten().flip(0)
    if len(filled) == 0:
        return None
    number, carried = (torch.cat([t.new_zeros(1), t[filled].cumsum(0)]) for t in (counts, sums))
    share = carried / carried[-1]
    numbers = [2**i for i in range((n_rows - 1).bit_length())] + [n_rows]
    # less than a row of tolerance for rounding
    n_for_90, n_for_99 = (max(1, ceil(np.interp(x, share, number) - 1e-6)) for x in (0.90, 0.99))
    return RowShares(
        n_rows, torch.tensor(numbers), torch.from_numpy(np.interp(numbers, number, share)), n_for_90, n_for_99
    )
