"""Gaussian over the logits of a last linear layer, by differences, in closed form from features."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from debiased_laplace.curvature.layer_covariance import LayerCovariance, OutputCovariances
from debiased_laplace.predictive.mean_field import LEADING, GaussianLogits, sorted_differences

_CACHE_BYTES = 2**21
"""Size of the matrices of a chunk of inputs that stay in a processor's cache."""


def layer_logits(
    covariance: LayerCovariance, features: Float[Tensor, "n d"], means: Float[Tensor, "n C"]
) -> GaussianLogits:
    """Return the Gaussian over the logits, by differences to each input's first class."""
    differences, order = sorted_differences(means)
    found = [_spread(part, order[chosen]) for chosen, part in covariance.of_features(features)]
    return GaussianLogits(order, differences, *map(torch.cat, zip(*found, strict=True)))


def _spread(part: OutputCovariances, order: Int64[Tensor, "n C"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return covariances of leading differences, variances of the others, and the centred logits' total variance."""
    C, own, lead = order.shape[1], part.variances().gather(1, order), order[:, 0]
    samples = torch.arange(len(order), device=order.device)
    B, v = part.factor, part.weights
    to_lead = ((B @ (B[samples, lead] * v)[:, :, None])[..., 0] if len(v) else torch.zeros_like(own)).clone()
    of_sum = B.sum(1).square() @ v
    for Q, w in part.terms:
        if Q is None:
            # different logits have covariance 0
            to_lead.scatter_add_(1, lead[:, None], w.gather(1, lead[:, None]))
            of_sum = of_sum + w.sum(1)
        else:
            to_lead = to_lead + (w * Q[lead]) @ Q.T
            of_sum = of_sum + w @ Q.sum(0).square()
    variances = own - 2 * to_lead.gather(1, order) + own[:, :1]
    covariance = torch.cat(list(_covariances(part, order[:, :LEADING])))
    total = (own.sum(1) - of_sum / C).clamp_min(0)
    return covariance, variances[:, LEADING:].clamp_min(0), total


def _covariances(part: OutputCovariances, leading: Int64[Tensor, "n T"]) -> Iterator[Float[Tensor, "m D D"]]:
    """Yield covariances of the leading classes' differences to the first one, for chunks of inputs."""
    C, T, k = part.factor.shape[1], leading.shape[1], len(part.weights)
    size = max(1, _CACHE_BYTES // (T * max(C, k) * part.factor.element_size()))
    for start in range(0, len(leading), size):
        rows = slice(start, start + size)
        chosen = leading[rows]
        of_leading = part.factor[rows].gather(1, chosen[..., None].expand(-1, -1, k))
        D = of_leading[:, 1:] - of_leading[:, :1]
        total = (D * part.weights) @ D.mT
        for Q, w in part.terms:
            if Q is None:
                own = w[rows].gather(1, chosen)
                total = total + torch.diag_embed(own[:, 1:]) + own[:, :1, None]
            else:
                D = (Q[chosen[:, 1:]] - Q[chosen[:, :1]]).mul_(w[rows, None, :].sqrt())
                total = total + D @ D.mT
        yield total
