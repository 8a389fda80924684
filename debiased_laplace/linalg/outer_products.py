r"""Stacks of matrices that are outer products, $M = g a^\top$, told by looking at them.

The gradient of a linear layer's weight at one sample is one. Rotating such a matrix costs its two vectors' products.
"""

import torch
from jaxtyping import Float
from torch import Tensor

_WORTHWHILE = 32
"""Matrices whose sides sum up to less are not looked at."""


def outer_factors(
    M: Float[Tensor, "n o i"],
) -> tuple[Float[Tensor, "n o"], Float[Tensor, "n i"]] | None:
    """G and a of every matrix, if all of them are outer products up to rounding.

    Args:
        M: matrices.

    Returns:
        The factors; None if a matrix is none, or they are too small for it to matter.
    """
    n, o, i = M.shape
    if n == 0 or min(o, i) < 2 or o + i < _WORTHWHILE:
        return None
    # a single matrix that is none saves looking at the others
    if n > 1 and outer_factors(M[:1]) is None:
        return None
    largest = M.square().sum(2).argmax(1)
    a = M[torch.arange(n, device=M.device), largest]
    length = a.square().sum(1).clamp_min(torch.finfo(M.dtype).tiny)
    g = (M @ a[:, :, None])[..., 0] / length[:, None]
    off = (M - g[:, :, None] * a[:, None, :]).abs().amax((1, 2))
    rounding = 32 * torch.finfo(M.dtype).eps * M.abs().amax((1, 2))
    return (g, a) if bool((off <= rounding).all()) else None
