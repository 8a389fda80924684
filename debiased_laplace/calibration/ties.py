"""Ties: numbers that differ by rounding are made equal before they are ranked, binned or compared with a threshold."""

import torch
from jaxtyping import Float
from torch import Tensor

LONGEST = 4  # tolerances that a group of ties may span; longer chains of neighbours are different numbers
RELATIVE = 1e-12
ABSOLUTE = 1e-14  # of probabilities, entropies in nats and their differences
SINGLE = 1e-6  # relative, of numbers that a network may have computed in single precision
THRESHOLD = 1e-9  # relative, of finished metrics


def merge_ties(values: Float[Tensor, " n"], tolerance: Float[Tensor, " n"] | None = None) -> Float[Tensor, " n"]:
    """Replace numbers that differ by rounding by the smallest of them; all others stay as they are.

    Args:
        values: one score per sample.
        tolerance: of each value; None: that of quantities whose terms are probabilities.
    """
    if tolerance is None:
        tolerance = RELATIVE * values.abs() + ABSOLUTE
    ordered, order = values.sort()
    width = tolerance[order]
    starts = torch.ones_like(order, dtype=torch.bool)
    starts[1:] = ordered.diff() > width[1:]
    group = starts.cumsum(dim=0) - 1
    first = starts.nonzero()[:, 0]
    last = torch.cat([first[1:] - 1, first.new_tensor([len(order) - 1])])
    merged = torch.where(
        (ordered[last] - ordered[first] <= LONGEST * width[last])[group], ordered[first][group], ordered
    )
    return torch.empty_like(values).index_copy_(0, order, merged)
