r"""Distances of a posterior to the full-batch posterior, in double precision.

The reference has precision $R = N \tau H + \delta I$ with the dense mean GGN $H$. An approximation enters through three
things only: the covariances of the outputs at the test inputs, $\mathrm{tr}(\hat P^{-1} R)$ and $\log\det \hat P$.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

N_DRAWS = 512
Z_95 = 1.959963984540054


@dataclass(frozen=True, eq=False)
class Approximation:
    r"""What the criteria need to know of a posterior.

    Attributes:
        covariances: (n, C, C) of the outputs at the test inputs.
        trace: $\mathrm{tr}(\hat P^{-1} R)$; None for a posterior that is none over the parameters.
        log_det: $\log\det \hat P$; None likewise.
    """

    covariances: Tensor
    trace: float | None = None
    log_det: float | None = None


@dataclass(frozen=True, eq=False)
class Reference:
    r"""The full-batch posterior at one prior precision.

    Attributes:
        precision: R (P, P).
        log_det: $\log\det R$.
        covariances: (n, C, C) of the outputs at the test inputs.
        outputs: (n, C), the means.
        noise: observation standard deviation in regression; None in classification.
        seed: of the normal draws that all predictive probabilities share.
    """

    precision: Tensor
    log_det: float
    covariances: Tensor
    outputs: Tensor
    noise: float | None
    seed: int = 0


def reference(
    curvature: Tensor, jacobians: Tensor, outputs: Tensor, *, weight: float, prior: float, noise: float | None
) -> Reference:
    r"""The full-batch posterior with precision weight · curvature + prior · I, weight being $N\tau$."""
    R = weight * curvature
    R.diagonal().add_(prior)
    L = torch.linalg.cholesky(R)
    return Reference(R, 2 * float(L.diagonal().log().sum()), dense_covariances(L, jacobians), outputs, noise)


def dense_covariances(L: Tensor, jacobians: Tensor) -> Tensor:
    """Covariances (n, C, C) of the outputs for a precision with Cholesky factor L."""
    X = torch.linalg.solve_triangular(L, jacobians.flatten(0, 1).T, upper=False).T.unflatten(0, jacobians.shape[:2])
    return X @ X.mT


def distances(approximation: Approximation, full: Reference) -> dict[str, float | None]:
    """All criteria that a posterior has; what is not finite, or not defined for it, is None."""
    ours, theirs = (s.covariances.diagonal(dim1=-2, dim2=-1) for s in (approximation, full))
    result: dict[str, float | None] = {
        "predictive_kl": float(gaussian_kl(full.covariances, approximation.covariances).median()),
        "log_variance_error": float((ours / theirs).log().abs().mean()),
        "variance_ratio": float(ours.mean() / theirs.mean()),
        "total_variation": float(total_variation(approximation.covariances, full).mean()),
        "parameter_kl": None,
        "log_det_difference": None,
    }
    if approximation.trace is not None and approximation.log_det is not None:
        difference = approximation.log_det - full.log_det
        result["log_det_difference"] = difference
        result["parameter_kl"] = 0.5 * (approximation.trace - len(full.precision) + difference)
    return {name: value if value is not None and math.isfinite(value) else None for name, value in result.items()}


def gaussian_kl(first: Tensor, second: Tensor) -> Tensor:
    r"""$KL(N(f, \Sigma_1) \| N(f, \Sigma_2))$ of covariances (n, C, C), in nats; infinite for a singular second one."""
    L1, _ = torch.linalg.cholesky_ex(first)
    L2, failed = torch.linalg.cholesky_ex(second)
    whitened = torch.linalg.solve_triangular(L2, L1, upper=False)
    log_dets = (L2.diagonal(dim1=-2, dim2=-1).log() - L1.diagonal(dim1=-2, dim2=-1).log()).sum(-1)
    kl = 0.5 * (whitened.square().sum((-1, -2)) - first.shape[-1]) + log_dets
    return torch.where(failed == 0, kl, torch.inf)


def total_variation(covariances: Tensor, full: Reference) -> Tensor:
    """Half the summed absolute difference of the two predictives, per test input."""
    if full.noise is not None:
        spreads = ((s.squeeze((-1, -2)) + full.noise**2).sqrt() for s in (covariances, full.covariances))
        return gaussian_total_variation(*spreads)
    ours, theirs = (probabilities(s, full) for s in (covariances, full.covariances))
    return 0.5 * (ours - theirs).abs().sum(-1)


def probabilities(covariances: Tensor, full: Reference) -> Tensor:
    """Mean softmax (n, C) over draws of the outputs; the draws depend continuously on the covariances."""
    n, C = full.outputs.shape
    generator = torch.Generator().manual_seed(full.seed)
    half = torch.randn(N_DRAWS // 2, n, C, generator=generator, dtype=torch.float64)
    # a symmetric root is the same for equal covariances, and exists for singular ones
    values, vectors = torch.linalg.eigh(covariances)
    root = (vectors * values.clamp_min(0).sqrt()[:, None, :]) @ vectors.mT
    deviations = torch.einsum("sni,nij->snj", half, root)
    return 0.5 * sum((full.outputs + sign * deviations).softmax(-1).mean(0) for sign in (1, -1))


def gaussian_total_variation(first: Tensor, second: Tensor) -> Tensor:
    """Total variation between normal distributions of equal means and these standard deviations."""
    narrow, wide = torch.minimum(first, second), torch.maximum(first, second)
    ratio = wide / narrow
    # the densities cross where (x / narrow)² (1 - 1 / ratio²) = 2 log ratio; equal ones everywhere
    gap = (1 - ratio.pow(-2)).clamp_min(torch.finfo(ratio.dtype).tiny)
    crossing = (2 * ratio.log() / gap).sqrt()
    return torch.erf(crossing / 2**0.5) - torch.erf(crossing / ratio / 2**0.5)


def coverage(values: Tensor, errors: Tensor, truth: Tensor, intervals: Tensor) -> dict[str, int]:
    """How many intervals around the largest estimates contain the truth: the package's, plain and log-scale ones.

    Only directions with an estimate above a millionth of the largest one count.
    """
    counted = values > 1e-6 * values.max()
    values, errors, truth, (lower, upper) = values[counted], errors[counted], truth[counted], intervals[counted].T
    plain = (truth - values).abs() <= Z_95 * errors
    logarithmic = (truth / values).log().abs() <= Z_95 * errors / values
    inside = (lower <= truth) & (truth <= upper)
    hits = {"interval": inside, "plain": plain, "log": logarithmic}
    return {"n": len(values), **{name: int(hit.sum()) for name, hit in hits.items()}}
