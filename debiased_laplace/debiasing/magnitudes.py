r"""Estimates of the full-batch curvature along directions: the usual biased one, held-out and cross-fitted ones.

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
        standard_errors: standard errors from the spread over samples; 0 if every sample was used; None without
            per-sample values.
        in_sample: $u_i^\top H_a u_i$ of the samples that the directions come from.
        n_floored: number of negative values that were raised to 0.
        error_shape: skewness and other properties of the errors; None without standard errors or third moments.
    """

    values: Float[Tensor, " k"]
    standard_errors: Float[Tensor, " k"] | None
    in_sample: Float[Tensor, " k"]
    n_floored: int
    error_shape: ErrorShape | None = None

    def to(self, dtype: torch.dtype) -> "Magnitudes":
        """Convert to another precision."""
        errors = None if self.standard_errors is None else self.standard_errors.to(dtype)
        shape = None if self.error_shape is None else self.error_shape.to(dtype)
        return Magnitudes(self.values.to(dtype), errors, self.in_sample.to(dtype), self.n_floored, shape)

    def scaled(self, factors: Float[Tensor, " k"]) -> "Magnitudes":
        """Rescale for directions of other lengths: multiply each curvature by a positive number."""
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
    n_data: float,
    a_redrawn: DirectionalMoments | None = None,
) -> Magnitudes:
    r"""Estimate $u_i^\top [f H_a + (1 - f) H_b] u_i$ with $f = |a| / N$, which is unbiased for the full batch.

    Valid only if b is drawn from the samples outside a. The weight f makes the estimate exact if a and b are all the
    data.

    Args:
        in_sample: $u_i^\top H_a u_i$.
        b: moments of the magnitude samples along the directions.
        n_a: number of direction samples.
        n_data: size N of the data set, as a number of samples with their mean weight.
        a_redrawn: for a Monte-Carlo curvature: moments of the direction samples with fresh draws, which replace
            `in_sample` in the share of a. Standard errors are then without finite-population correction, because no
            sample's curvature is exact (slightly too large).

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
    n_data: float,
    redrawn: DirectionalMoments | None = None,
    decreasing: bool,
) -> Magnitudes:
    r"""Estimate $f \lambda_i(H_B) + (1 - f) c_i$ with $f = |B| / N$ and $c_i$ the cross-fitted curvature.

    Valid only if folds are of samples and B is drawn from all N. Exact if B is all the data.

    Args:
        in_sample: $u_i^\top H_B u_i$.
        folds: pooled moments $c_i$ of the folds, each along the i-th direction of the others.
        n_data: size N of the data set, as a number of samples with their mean weight.
        redrawn: for a Monte-Carlo curvature: moments along the directions with fresh draws, in place of `in_sample`.
        decreasing: whether the true values decrease with the index, as those of eigenvectors do on average: $c_i$ is
            then made non-increasing by isotonic regression, which preserves its sum.

    Returns:
        The magnitudes. Standard errors, from the spread of all samples, are approximate.
    """
    # standard errors use sqrt((1 - f) / |B|), as B estimates the mean of the other N - |B| samples
    n = folds.n_samples
    f = n / n_data
    c = _non_increasing(folds.means) if decreasing else folds.means
    share = in_sample if redrawn is None else redrawn.means
    sampled = 0.0 if redrawn is not None else f
    errors = (1 - sampled) ** 0.5 * _spread([(1.0, folds)])
    mismatch = (1 - f) * mismatch_of_folds(c, in_sample.to(c), folds.n_folds) if folds.n_folds > 1 else 0 * c
    shape = _error_shape([(1.0, folds)], mismatch, sampled)
    return floored((f * share + (1 - f) * c).to(in_sample.dtype), errors, in_sample, shape)


def of_drawn_rows(
    in_sample: Float[Tensor, " k"],
    known: Float[Tensor, " k"],
    others: DirectionalMoments,
    *,
    decreasing: bool,
) -> Magnitudes:
    r"""Estimate $u_i^\top (\sum k_r v_r v_r^\top) u_i$ plus the curvature of the rows that nobody drew.

    Args:
        in_sample: $u_i^\top \hat H u_i$ of the rows that the directions come from.
        known: the same with the weights $k_r = 1/N$, which they have in the full batch.
        others: moments of rows that the directions do not depend on, weighted for those not drawn.
        decreasing: whether the sum is made non-increasing by isotonic regression, as in `cross_fitted`.

    Returns:
        The magnitudes, with standard errors of the draw.
    """
    rest = others.means
    if decreasing and others.draw_variances is not None:
        rest = _non_increasing(rest)
    values = known + rest
    if decreasing and others.draw_variances is None:
        # the sum and not the others alone: known rows are large ones, so that the others need not decrease
        values = _non_increasing(values)
    errors = _error_of_draw(others)
    mismatch = torch.zeros_like(errors)
    if others.n_folds > 1:
        mismatch = mismatch_of_folds(rest, (in_sample - known).to(errors), others.n_folds)
    shape = _error_shape([(1.0, others)], mismatch, others.sampled_share)
    return floored(values.to(in_sample.dtype), errors, in_sample, shape)


def _error_of_draw(rows: DirectionalMoments) -> Float[Tensor, " k"]:
    """Return the standard error of a mean over drawn rows, of all samples or of some."""
    errors, f = _spread([(1.0, rows)]), rows.sampled_share
    if rows.draw_variances is None:
        return errors
    # the share of these samples in all is known but for the draw of their rows
    return ((1 - f) * errors.square() + f * rows.draw_variances).sqrt()


def _non_increasing(values: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    fitted = isotonic_regression(values.cpu().numpy(), increasing=False)
    return torch.from_numpy(fitted.x.copy()).to(values)


def same_batch(
    values: Float[Tensor, " k"], own: DirectionalMoments, *, n_data: float, drawn: bool = False
) -> Magnitudes:
    r"""Return the eigenvalues of $H_B$, which are too large for leading directions and too small for trailing ones.

    Args:
        values: $u_i^\top H_B u_i$.
        own: moments over the samples of B of the curvature along each direction.
        n_data: size N of the data set, as a number of samples with their mean weight.
        drawn: whether the curvature is a Monte-Carlo estimate, or one from drawn rows: inexact even on all the data.

    Returns:
        The magnitudes. Standard errors, and intervals from them, do not include the bias.
    """
    sampled = own.sampled_share if drawn else own.n_samples / n_data
    errors = _error_of_draw(own) if drawn else (1 - sampled) ** 0.5 * _spread([(1.0, own)])
    return floored(values, errors, values, _error_shape([(1.0, own)], torch.zeros_like(errors), sampled))


def moments_from_projections(projections: Float[Tensor, "R k"], n_samples: int) -> DirectionalMoments:
    """Compute moments over samples of the curvature along directions from the rows' projections on them."""
    sums = RunningMoments(projections.shape[1], projections)
    sums.add(projections.to(sums.first.dtype).square().unflatten(0, (n_samples, -1)).sum(1))
    return sums.moments()


def _spread(parts: Sequence[tuple[float, DirectionalMoments]]) -> Float[Tensor, " k"]:
    """Return the standard error of a weighted sum of means of independent samples."""
    variances = [weight**2 * part.standard_deviations.square() / part.n_samples for weight, part in parts]
    return torch.stack(variances).sum(0).sqrt()


def _error_shape(
    parts: Sequence[tuple[float, DirectionalMoments]], mismatch: Float[Tensor, " k"], sampled_share: float
) -> ErrorShape | None:
    """Return the error shape with the skewness of a weighted sum of means of independent samples."""
    cumulants = [weight**3 * part.third_cumulants for weight, part in parts if part.third_cumulants is not None]
    if len(cumulants) < len(parts):
        return None
    spread = _spread(parts)
    skewness = torch.where(spread > 0, torch.stack(cumulants).sum(0) / spread.pow(3), 0.0)
    return ErrorShape(
        skewness,
        mismatch,
        round(min(part.n_samples if part.n_drawn is None else max(part.n_drawn, 2) for _, part in parts)),
        sampled_share,
    )


def floored(values: Tensor, errors: Tensor | None, in_sample: Tensor, shape: ErrorShape | None = None) -> Magnitudes:
    """Return magnitudes with negative values raised to 0 and counted, as a precision cannot be negative."""
    negative = int((values < 0).sum())
    return Magnitudes(values.clamp_min(0), errors, in_sample, negative, shape).to(values.dtype)
