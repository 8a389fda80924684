"""Folds of a test set, so that no sample is corrected with a number that saw it."""

import torch
from jaxtyping import Int
from torch import Tensor

from debiased_laplace.calibration.estimates import count_units

N_FOLDS = 5


def draw_folds(
    n: int, *, seed: int, clusters: Int[Tensor, " n"] | None = None, n_folds: int = N_FOLDS
) -> Int[Tensor, " n"]:
    """The fold of every sample: as equal in size as can be, and drawn by the seed.

    Args:
        n: number of samples.
        seed: of the draw.
        clusters: number of each sample's cluster, from 0 on; a cluster stays in one fold, and folds are of equally
            many clusters. None where every sample is its own.
        n_folds: how many; fewer where there are fewer clusters or samples.

    Raises:
        ValueError: if there is only one cluster or sample, which leaves no other to fit on.
    """
    units = count_units(n, clusters)
    if units < 2:
        what = "test sample" if clusters is None else "cluster of test samples"
        raise ValueError(f"Cross-fitting needs at least two units; got {units} {what}.")
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    fold_of_unit = torch.empty(units, dtype=torch.int64)
    fold_of_unit[order] = torch.arange(units) % min(n_folds, units)
    return fold_of_unit if clusters is None else fold_of_unit[clusters]
