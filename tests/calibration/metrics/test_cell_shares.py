import pytest
import torch

from debiased_laplace.calibration.estimates import estimate_share, wilson_interval
from debiased_laplace.calibration.metrics.cell_shares import intervals_of_shares


def draw(n: int = 300, n_cells: int = 5, n_clusters: int = 20):
    generator = torch.Generator().manual_seed(0)
    right = (torch.rand(n, generator=generator) < 0.7).double()
    cell = torch.randint(0, n_cells - 1, (n,), generator=generator)  # the last cell stays empty
    return right, cell, torch.randint(0, n_clusters, (n,), generator=generator)


def test_without_clusters_each_cell_is_wilsons() -> None:
    right, cell, _ = draw()
    intervals = intervals_of_shares(right, cell, 5, confidence_level=0.9, clusters=None)
    assert intervals[4] is None
    for c in range(4):
        inside = right[cell == c]
        expected = wilson_interval(inside.mean().item(), len(inside), confidence_level=0.9)
        assert intervals[c] == pytest.approx(expected, abs=1e-12)


def test_with_clusters_each_cell_is_the_share_of_its_samples() -> None:
    right, cell, clusters = draw()
    intervals = intervals_of_shares(right, cell, 5, confidence_level=0.9, clusters=clusters)
    assert intervals[4] is None
    for c in range(4):
        own = torch.unique(clusters[cell == c], return_inverse=True)[1]
        e = estimate_share(right[cell == c], confidence_level=0.9, clusters=own)
        assert intervals[c] == pytest.approx((e.low, e.high), abs=1e-9)


def test_a_single_cluster_says_nothing_about_others() -> None:
    ones, zeros = torch.ones(50, dtype=torch.float64), torch.zeros(50, dtype=torch.int64)
    assert intervals_of_shares(ones, zeros, 1, confidence_level=0.9, clusters=zeros) == [(0.0, 1.0)]
