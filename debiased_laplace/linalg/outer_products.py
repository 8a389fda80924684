r"""Factorization of stacks of outer products $M = g a^\top$.

The gradient of a linear layer's weight at one sample is an outer product; rotating it only takes products with its two
factors.
"""

import torch
from jaxtyping import Float
from torch import Tensor

_WORTHWHILE = 32
"""Smallest o + i for which a factorization saves time."""


def outer_factors(
    M: Float[Tensor, "n o i"],
) -> tuple[Float[Tensor, "n o"], Float[Tensor, "n i"]] | None:
    """Factorize every matrix into g and a.

    Args:
        M: matrices.

    Returns:
        The factors g and a; None if a matrix is not an outer product up to rounding, or the matrices are small.
    """
    n, o, i = M.shape
    if n == 0 or min(o, i) < 2 or o + i < _WORTHWHILE:
        return None
    # test one matrix first: most stacks without the structure are rejected by it
    if n > 1 and outer_factors(M[:1]) is None:
        return None
    largest = M.square().sum(2).argmax(1)
    a = M[torch.arange(n, device=M.device), largest]
    length = a.square().sum(1).clamp_min(torch.finfo(M.dtype).tiny)
    g = (M @ a[:, :, None])[..., 0] / length[:, None]
    off = (M - g[:, :, None] * a[:, None, :]).abs().amax((1, 2))
    rounding = 32 * torch.finfo(M.dtype).eps * M.abs().amax((1, 2))
    return (g, a) if bool((off <= rounding).all()) else None
