r"""The bias of an inverse: an unbiased curvature still gives variances that are too large on average.

With an estimate v of a precision along a direction, unbiased and with variance $\mathrm{var}(v)$,
$E[1/v] \approx (1 + \mathrm{var}(v)/v^2) / E[v]$ (Jensen). Raising the precision to $v + \mathrm{var}(v)/v$ takes that
away to second order. Were the variance known, this would also lower the expected KL to the posterior with the true
precision. Estimated from skewed samples it comes out large where v does, and much of that gain is lost: the correction
is an option, and not the default.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def second_order(
    weights: Float[Tensor, " k"], variances: Float[Tensor, " k"], rest: Float[Tensor, " k"] | Float[Tensor, ""]
) -> Float[Tensor, " k"]:
    r"""Curvatures whose inverse, with the rest of the precision, is unbiased to second order.

    Args:
        weights: estimated curvatures m, in the unit of the precision.
        variances: of their estimates, in its square.
        rest: what else there is of the precision along each direction, $v = m + rest$.

    Returns:
        $m + \mathrm{var}/v$. Never more than v is added: beyond that the expansion says nothing.
    """
    v = weights + rest
    return weights + torch.minimum(variances / v, v)
