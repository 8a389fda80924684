r"""Estimates of the full-batch curvature along directions: the biased one that everybody uses, and the split.

References:
    Tatzel, Mucsányi, Hackel & Hennig (2025), arXiv 2410.14325 (directions and magnitudes from different halves);
    Lam (2016), doi 10.1214/15-AOS1393 (the same idea for covariance matrices).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from scipy.optimize import isotonic_regression
from torch import Tensor

from debiased_laplace.curvature.sub_batch import DirectionalMoments, RunningMoments
from debiased_laplace.debiasing.intervals import ErrorShape, mismatch_of_folds


@dataclass(frozen=True, eq=False)
class Magnitudes:
    r"""Curvature along directions, a mean per sample.

    Attributes:
        values: the estimate of $u_i^\top H_D u_i$ of the full batch.
        standard_errors: of the values, from the spread over samples; 0 where every sample was used; None where no
            per-sample values were computed.
        in_sample: $u_i^\top H_a u_i$ of the samples that the directions come from.
        n_floored: how many values had to be raised to 0.
        error_shape: what else is known of the errors; None where there are none, or nobody asked for third moments.
    """

    values: Float[Tensor, " k"]
    standard_errors: Float[Tensor, " k"] | None
    in_sample: Float[Tensor, " k"]
    n_floored: int
    error_shape: ErrorShape | None = None

    def to(self, dtype: torch.dtype) -> "Magnitudes":
        """The same in another precision."""
        errors = None if self.standard_errors is None else self.standard_errors.to(dtype)
        shape = None if self.error_shape is None else self.error_shape.to(dtype)
        return Magnitudes(self.values.to(dtype), errors, self.in_sample.to(dtype), self.n_floored, shape)

    def scaled(self, factors: Float[Tensor, " k"]) -> "Magnitudes":
        """The same along directions of other lengths: each curvature times a positive number."""
        errors, shape = self.standard_errors, self.error_shape
        if shape is not None:
            shape = replace(shape, mismatch=shape.mismatch * factors)
        return replace(
            self,
            values=self.values * factors,
            standard_errors=None if errors is None else errors * factors,
            in_sample=self.in_sample * factors,
            error_shape=shape,
        )


def held_out(
    in_sample: Float[Tensor, " k"],
    b: DirectionalMoments,
    *,
    n_a: int,
    n_data: int,
    a_redrawn: DirectionalMoments | None = None,
) -> Magnitudes:
    r"""$u_i^\top [f H_a + (1 - f) H_b] u_i$ with $f = |a| / N$: unbiased for the full batch.

    Valid only if b is drawn from the samples outside a. Weighting by the known share of a makes the estimate exact
    where a and b are all the data.

    Args:
        in_sample: $u_i^\top H_a u_i$.
        b: moments of the magnitude samples along the directions.
        n_a: number of direction samples.
        n_data: N.
        a_redrawn: for a Monte-Carlo curvature, whose draws the directions have chosen among: moments of the direction
            samples with fresh draws, which take the place of `in_sample` in the share of a. Then no sample is known
            exactly, and the standard errors do without the finite population (they are a little too large).

    Returns:
        The magnitudes.
    """
    f = n_a / n_data
    share_of_a = in_sample if a_redrawn is None else a_redrawn.means
    values = f * share_of_a + (1 - f) * b.means
    if a_redrawn is None:
        unseen = max(1 - b.n_samples / (n_data - n_a), 0.0) if n_data > n_a else 0.0
        parts = [(1 - f, b)]
    else:
        unseen = 1.0
        parts = [(f, a_redrawn), (1 - f, b)]
    errors = unseen**0.5 * _spread(parts)
    shape = _error_shape(parts, torch.zeros_like(errors), 1 - unseen)
    return floored(values.to(in_sample.dtype), errors, in_sample, shape)


def cross_fitted(
    in_sample: Float[Tensor, " k"],
    folds: DirectionalMoments,
    *,
    n_data: int,
    redrawn: DirectionalMoments | None = None,
    decreasing: bool,
) -> Magnitudes:
    r"""$f \lambda_i(H_B) + (1 - f) c_i$ with $f = |B| / N$: $c_i$ is what folds say along others' i-th direction.

    Valid only if folds are of samples and B is drawn from all N. At B = N it is the full batch itself.

    Args:
        in_sample: $u_i^\top H_B u_i$.
        folds: pooled moments of the folds, matched by index.
        n_data: N.
        redrawn: for a Monte-Carlo curvature, moments along the directions with fresh draws, in place of `in_sample`.
        decreasing: whether the true values are known to decrease with the index, as those of eigenvectors do on
            average: $c_i$ is made non-increasing by isotonic regression, which keeps its sum.

    Returns:
        The magnitudes; their standard errors, from the spread of all samples, are approximate: B stands for the rest
        of the data, of which it is no part, so that $\sqrt{(1 - f) / |B|}$ takes the place of $1 / \sqrt{|B|}$.
    """
    n = folds.n_samples
    f = n / n_data
    c = _non_increasing(folds.means) if decreasing else folds.means
    share = in_sample if redrawn is None else redrawn.means
    sampled = 0.0 if redrawn is not None else f
    errors = (1 - sampled) ** 0.5 * _spread([(1.0, folds)])
    mismatch = (1 - f) * mismatch_of_folds(c, in_sample.to(c), folds.n_folds) if folds.n_folds > 1 else 0 * c
    shape = _error_shape([(1.0, folds)], mismatch, sampled)
    return floored((f * share + (1 - f) * c).to(in_sample.dtype), errors, in_sample, shape)


def _non_increasing(values: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    fitted = isotonic_regression(values.cpu().numpy(), increasing=False)
    return torch.from_numpy(fitted.x.copy()).to(values)


def same_batch(values: Float[Tensor, " k"], own: DirectionalMoments, *, n_data: int, drawn: bool = False) -> Magnitudes:
    r"""The eigenvalues of $H_B$ themselves: too large for the leading directions, too small for the trailing ones.

    Args:
        values: $u_i^\top H_B u_i$.
        own: moments over the samples of B of the curvature along each direction.
        n_data: N.
        drawn: the curvature is a Monte-Carlo one, which is not known exactly even on all the data.

    Returns:
        The magnitudes; their standard errors, and intervals from these, know nothing of the bias.
    """
    sampled = 0.0 if drawn else own.n_samples / n_data
    errors = (1 - sampled) ** 0.5 * _spread([(1.0, own)])
    return floored(values, errors, values, _error_shape([(1.0, own)], torch.zeros_like(errors), sampled))


def moments_from_projections(projections: Float[Tensor, "R k"], n_samples: int) -> DirectionalMoments:
    """Moments over samples of the curvature along directions, from the rows' projections on them."""
    sums = RunningMoments(projections.shape[1], projections)
    sums.add(projections.to(sums.first.dtype).square().unflatten(0, (n_samples, -1)).sum(1))
    return sums.moments()


def _spread(parts: Sequence[tuple[float, DirectionalMoments]]) -> Float[Tensor, " k"]:
    """Standard error of a weighted sum of means of independent samples."""
    variances = [weight**2 * part.standard_deviations.square() / part.n_samples for weight, part in parts]
    return torch.stack(variances).sum(0).sqrt()


def _error_shape(
    parts: Sequence[tuple[float, DirectionalMoments]], mismatch: Float[Tensor, " k"], sampled_share: float
) -> ErrorShape | None:
    """Skewness of a weighted sum of means of independent samples, and the rest as given."""
    cumulants = [weight**3 * part.third_cumulants for weight, part in parts if part.third_cumulants is not None]
    if len(cumulants) < len(parts):
        return None
    spread = _spread(parts)
    skewness = torch.where(spread > 0, torch.stack(cumulants).sum(0) / spread.pow(3), 0.0)
    return ErrorShape(skewness, mismatch, min(part.n_samples for _, part in parts), sampled_share)


def floored(values: Tensor, errors: Tensor | None, in_sample: Tensor, shape: ErrorShape | None = None) -> Magnitudes:
    """Magnitudes with negative values raised to 0 and counted: a posterior precision cannot have them."""
    negative = int((values < 0).sum())
    return Magnitudes(values.clamp_min(0), errors, in_sample, negative, shape).to(values.dtype)
