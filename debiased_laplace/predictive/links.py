"""Class probabilities of Gaussian logits.

References:
    MacKay (1992), doi 10.1162/neco.1992.4.5.720 (probit); Hobbhahn, Kristiadi & Hennig (2022), arXiv 2003.01227
    (Laplace bridge); Daxberger et al. (2021), arXiv 2106.14806 (its normalized form).
"""

import math

import torch
from jaxtyping import Float
from laplace.utils.functional_utils import draw_gaussian
from torch import Tensor


def probit(mean: Float[Tensor, "n C"], variance: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
    """Return the softmax of logits scaled down by their variances."""
    return torch.softmax(mean / (1 + math.pi / 8 * variance).sqrt(), dim=-1)


def bridge(mean: Float[Tensor, "n C"], covariance: Float[Tensor, "n C C"], *, normalized: bool) -> Float[Tensor, "n C"]:
    """Return the mean of the Dirichlet distribution given by the Laplace bridge.

    Args:
        mean: of the logits.
        covariance: of the logits.
        normalized: scale mean and variance to the range in which the bridge is accurate.

    Returns:
        Class probabilities. If the covariance is zero or the bridge overflows: the softmax of the mean, its limit.
    """
    C = mean.shape[-1]
    row_sums = covariance.sum(-1)
    total = row_sums.sum(-1)
    safe = torch.where(total > 0, total, torch.ones_like(total))
    centred = mean - row_sums * (mean.sum(-1) / safe)[:, None]
    variance = covariance.diagonal(dim1=-2, dim2=-1) - row_sums.square() / safe[:, None]
    if normalized:
        scale = variance.mean(-1, keepdim=True) / math.sqrt(C / 2)
        centred, variance = centred / scale.sqrt(), variance / scale
    concentration = (1 - 2 / C + centred.exp() / C**2 * (-centred).exp().sum(-1, keepdim=True)) / variance
    probabilities = concentration / concentration.sum(-1, keepdim=True)
    usable = (probabilities.isfinite() & (probabilities >= 0)).all(-1, keepdim=True)
    return torch.where(usable, probabilities, torch.softmax(mean, dim=-1))


def gaussian_draws(
    mean: Float[Tensor, "n C"],
    covariance: Float[Tensor, "n C C"],
    *,
    n_samples: int,
    generator: torch.Generator | None,
) -> Float[Tensor, "S n C"]:
    """Draw each input's outputs from its Gaussian; covariances may be singular."""
    draws: Tensor = draw_gaussian(mean, covariance, n_samples, generator)
    return draws


def independent_draws(
    mean: Float[Tensor, "n C"],
    variance: Float[Tensor, "n C"],
    *,
    n_samples: int,
    generator: torch.Generator | None,
) -> Float[Tensor, "S n C"]:
    """Draw independent outputs."""
    noise = torch.randn(n_samples, *mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + variance.clamp_min(0).sqrt() * noise
