"""Every class's probability in bins: what the calibration of each class is measured from."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ClassBins:
    """Each class's probability over bins of equal width, closed on the left, the last on both sides.

    Attributes:
        counts: samples per class and bin.
        confidence: sum of the class's probabilities there.
        positives: how many of these samples are of the class.
        variance: sum of p (1 - p), the variance of `positives` were the probabilities right.
    """

    counts: Float[Tensor, "C bins"]
    confidence: Float[Tensor, "C bins"]
    positives: Float[Tensor, "C bins"]
    variance: Float[Tensor, "C bins"]


def inner_edges(n_bins: int) -> Float[Tensor, " edges"]:
    """Edges between bins of equal width on [0, 1], netcal's: torch.linspace differs in the last digit."""
    return torch.from_numpy(np.linspace(0.0, 1.0, n_bins + 1)[1:-1].copy())


class ClassBinSums:
    """Sums of `ClassBins` over portions of rows.

    A row sums to 1, so that fewer than `n_bins` of its probabilities lie beyond the first bin. Only these are sorted
    into bins; the first bin is the rest of each class's total. At 1,000 classes that spares most of the work.
    """

    def __init__(self, n_classes: int, n_bins: int, device: torch.device) -> None:
        zeros = torch.zeros(4, n_classes * n_bins, dtype=torch.float64, device=device)
        self.counts, self.confidence, self.squares, self.positives = zeros
        self.totals = torch.zeros(2, n_classes, dtype=torch.float64, device=device)
        self.edges = inner_edges(n_bins).to(device)
        self.shape = (n_classes, n_bins)
        self.n = 0

    def add(self, p: Float[Tensor, "rows C"], squares: Float[Tensor, "rows C"], labels: Int[Tensor, " rows"]) -> None:
        """Add rows.

        Args:
            p: probabilities.
            squares: of them.
            labels: true classes.
        """
        n_classes, n_bins = self.shape
        self.n += p.shape[0]
        self.totals += torch.stack([p.sum(dim=0), squares.sum(dim=0)])
        place = (p >= self.edges[0]).flatten().nonzero()[:, 0]
        high = p.flatten()[place]
        cell = (place % n_classes) * n_bins + torch.bucketize(high, self.edges, right=True)
        self.counts.index_add_(0, cell, torch.ones_like(high))
        self.confidence.index_add_(0, cell, high)
        self.squares.index_add_(0, cell, high.square())
        true = p.gather(1, labels[:, None])[:, 0]
        cell = labels * n_bins + torch.bucketize(true, self.edges, right=True)
        self.positives.index_add_(0, cell, torch.ones_like(true))

    def finish(self) -> ClassBins:
        """The sums of all rows, on the CPU."""
        counts, confidence, squares, positives = (
            x.view(self.shape).cpu() for x in (self.counts, self.confidence, self.squares, self.positives)
        )
        totals = self.totals.cpu()
        counts[:, 0] = self.n - counts[:, 1:].sum(dim=1)
        for sums, total in ((confidence, totals[0]), (squares, totals[1])):
            rest = (total - sums[:, 1:].sum(dim=1)).clamp_min(0.0)
            sums[:, 0] = torch.where(counts[:, 0] > 0, rest, torch.zeros_like(rest))  # an empty bin has no rounding
        return ClassBins(counts, confidence, positives, (confidence - squares).clamp_min(0.0))
