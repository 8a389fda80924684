r"""Losses in the order of their confidence: the risk of what is kept, and how each sample moves it.

Samples of equal confidence form a group, which is accepted in random order: every number here is the expectation over
that order, so that the order of the samples in the file does not matter. Ranks count from the most confident sample.

The areas are statistics of ranks. Their standard errors come from influence functions: how much the area moves when
the distribution moves towards one sample, by that sample's own loss and by its pushing all less confident ones down.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RankedLosses:
    """Losses, grouped by confidence from the most confident group on; float64 on the CPU.

    Attributes:
        losses: of each sample, nonnegative, in the order they came in.
        group: number of each sample's group.
        sizes: samples per group.
        sums: sum of the losses of each group.
        clusters: number of each sample's cluster, from 0 on; None where all samples are independent.
    """

    losses: Float[Tensor, " n"]
    group: Int[Tensor, " n"]
    sizes: Float[Tensor, " groups"]
    sums: Float[Tensor, " groups"]
    clusters: Int[Tensor, " n"] | None

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.losses.numel()

    @cached_property
    def ends(self) -> Float[Tensor, " groups"]:
        """Rank of the last sample of each group."""
        return self.sizes.cumsum(dim=0)

    @cached_property
    def starts(self) -> Float[Tensor, " groups"]:
        """Samples above each group."""
        return self.ends - self.sizes

    def accumulate(self, per_group: Float[Tensor, " groups"], ranks: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Sum of a quantity of the groups over the samples up to each rank; inside a group it grows evenly.

        Args:
            per_group: sums over the samples of each group.
            ranks: between 0 and n.
        """
        g = torch.searchsorted(self.ends, ranks.contiguous()).clamp(max=self.ends.numel() - 1)
        total = per_group.cumsum(dim=0)[g]
        return total - per_group[g] * (self.ends[g] - ranks) / self.sizes[g]

    @cached_property
    def oracle(self) -> "RankedLosses":
        """The same losses in the best order there is: smallest first."""
        return rank_losses(self.losses, -self.losses, clusters=self.clusters)

    @cached_property
    def ranks(self) -> Float[Tensor, " n"]:
        """1 to n."""
        return torch.arange(1, self.n + 1, dtype=torch.float64)

    @cached_property
    def risk(self) -> Float[Tensor, " n"]:
        """Mean loss of the k most confident samples, at place k - 1."""
        return self.risk_at(self.ranks)

    def risk_at(self, ranks: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Mean loss of as many most confident samples."""
        return self.accumulate(self.sums, ranks) / ranks

    @cached_property
    def area(self) -> float:
        """Mean of the risk over all ranks: the area under the risk-coverage curve."""
        return self.risk.mean().item()

    @cached_property
    def area_influence(self) -> Float[Tensor, " n"]:
        r"""Influence of each sample on `area`, with mean 0.

        The area is $\sum_g L_g w_g$ with the mean loss $L_g$ that a group adds and the mean $w_g$ of $-\log u$ over
        the coverages from $a$ to $b$ that it takes up. A sample enters $L_g$ of its own group, and $a$ and $b$ of all
        groups that are no more confident.
        """
        n, a, b, p = self.n, self.starts / self.n, self.ends / self.n, self.sizes / self.n
        tail = (1 / self.ranks).flip(0).cumsum(dim=0).flip(0)  # sum of 1/k from a rank on
        own = _sum_by_size(tail, self.sizes) / self.sizes
        w = (_antiderivative(b) - _antiderivative(a)) / p
        by_end = self.sums / n * (-b.log() - w) / p
        by_start = self.sums / n * (a.log() + w) / p
        by_start[0] = 0.0  # nothing is above the first group
        pushed = by_end.flip(0).cumsum(dim=0).flip(0) + by_start.flip(0).cumsum(dim=0).flip(0) - by_start
        influence = self.losses * own[self.group] + pushed[self.group]
        return influence - influence.mean()

    @cached_property
    def generalized_area(self) -> float:
        """Area under the share of samples that are kept and lost, over coverage."""
        return (self.sums * (self.n - (self.starts + self.ends) / 2)).sum().item() / self.n**2

    @cached_property
    def generalized_area_influence(self) -> Float[Tensor, " n"]:
        """Influence of each sample on `generalized_area`, with mean 0."""
        below = 1 - (self.starts + self.ends) / (2 * self.n)
        lost_above = (self.sums.cumsum(dim=0) - self.sums / 2) / self.n
        influence = self.losses * below[self.group] + lost_above[self.group]
        return influence - influence.mean()

    def risk_variance(self, ranks: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        r"""Variance of `risk_at` over test sets; the threshold that keeps so many is uncertain too.

        The influence of a sample is $(\ell - m) 1[\text{kept}] / c$ up to a constant, with $m$ the mean loss around the
        threshold: whoever enters above it pushes a sample of that loss out. Sums of squares over clusters grow from
        rank to rank, so that all ranks together cost one sort. Inside a group they are interpolated, which is
        conservative.
        """
        n, n_clusters, size = self.n, self.n_clusters, self.cluster_sizes
        S, m = self.accumulate(self.sums, ranks), self._loss_around(ranks)
        squares = [self.accumulate(x, ranks) for x in self._cluster_squares]
        mean = (S - m * ranks) / n
        AA, AB, BB, nA, nB = squares
        total = AA - 2 * m * AB + m.square() * BB - 2 * mean * (nA - m * nB) + mean.square() * size.square().sum()
        return total.clamp_min(0.0) * n_clusters / max(1, n_clusters - 1) / ranks.square()

    @cached_property
    def cluster_sizes(self) -> Float[Tensor, " clusters"]:
        """Samples of each cluster."""
        if self.clusters is None:
            return torch.ones(self.n, dtype=torch.float64)
        return torch.bincount(self.clusters).to(torch.float64)

    @property
    def n_clusters(self) -> int:
        """Number of independent units."""
        return self.cluster_sizes.numel()

    def _loss_around(self, ranks: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Mean loss of the samples next to a rank, a window that shrinks relative to n as n grows."""
        half = max(5.0, self.n ** (2 / 3) / 2)
        low, high = (ranks - half).clamp_min(0.0), (ranks + half).clamp_max(float(self.n))
        return (self.accumulate(self.sums, high) - self.accumulate(self.sums, low)) / (high - low)

    @cached_property
    def _cluster_squares(self) -> Float[Tensor, "5 groups"]:
        r"""What each group adds to $\sum A^2, \sum AB, \sum B^2, \sum n_c A, \sum n_c B$ over clusters.

        A is the loss and B the number of a cluster's samples that are kept so far, $n_c$ the number it has.
        """
        loss, one = self.losses, torch.ones_like(self.losses)
        A, B, size = torch.zeros_like(loss), torch.zeros_like(loss), one
        if self.clusters is not None:
            order = self.group.argsort(stable=True)
            order = order[self.clusters[order].argsort(stable=True)]
            A[order], B[order] = (_sum_before(x[order], self.clusters[order]) for x in (loss, one))
            size = self.cluster_sizes[self.clusters]
        added = torch.stack(
            [2 * A * loss + loss.square(), A + B * loss + loss, 2 * B + 1, size * loss, size], dim=1
        )  # fmt: skip
        return added.new_zeros(self.sizes.numel(), 5).index_add_(0, self.group, added).T.contiguous()


def rank_losses(
    losses: Float[Tensor, " n"], confidence: Float[Tensor, " n"], *, clusters: Int[Tensor, " n"] | None = None
) -> RankedLosses:
    """Losses in falling order of confidence.

    Args:
        losses: one per sample, nonnegative: 1 for an error, or a squared error.
        confidence: what is kept first; only its order matters.
        clusters: number of each sample's cluster, every number from 0 to the largest in use.
    """
    losses = losses.to("cpu", torch.float64)
    _, group, sizes = torch.unique(-confidence.cpu(), return_inverse=True, return_counts=True)
    sums = losses.new_zeros(sizes.numel()).index_add_(0, group, losses)
    return RankedLosses(
        losses, group, sizes.to(torch.float64), sums, None if clusters is None else clusters.to("cpu", torch.int64)
    )


def _antiderivative(u: Float[Tensor, " groups"]) -> Float[Tensor, " groups"]:
    r"""$\int_0^u -\log v\, dv = u - u \log u$."""
    return u - torch.xlogy(u, u)


def _sum_by_size(values: Float[Tensor, " n"], sizes: Float[Tensor, " groups"]) -> Float[Tensor, " groups"]:
    """Sums of consecutive stretches of these sizes."""
    stretch = torch.repeat_interleave(torch.arange(sizes.numel()), sizes.to(torch.int64))
    return values.new_zeros(sizes.numel()).index_add_(0, stretch, values)


def _sum_before(values: Float[Tensor, " n"], clusters: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Sum of the earlier values of the same cluster, for samples sorted by cluster."""
    before = values.cumsum(dim=0) - values
    first = torch.searchsorted(clusters, clusters)
    return before - before[first]
