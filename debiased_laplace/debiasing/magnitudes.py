r"""Estimates of the full-batch curvature along directions: the biased one that everybody uses, and the split.

References:
    Tatzel, Mucsányi, Hackel & Hennig (2025), arXiv 2410.14325 (directions and magnitudes from different halves);
    Lam (2016), doi 10.1214/15-AOS1393 (the same idea for covariance matrices).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.optimize import isotonic_regression
from torch import Tensor

from debiased_laplace.curvature.sub_batch import DirectionalMoments


@dataclass(frozen=True, eq=False)
class Magnitudes:
    r"""Curvature along directions, a mean per sample.

    Attributes:
        values: the estimate of $u_i^\top H_D u_i$ of the full batch.
        standard_errors: of the values, from the spread over samples; 0 where every sample was used; None where no
            per-sample values were computed.
        in_sample: $u_i^\top H_a u_i$ of the samples that the directions come from.
        n_floored: how many values had to be raised to 0.
    """

    values: Float[Tensor, " k"]
    standard_errors: Float[Tensor, " k"] | None
    in_sample: Float[Tensor, " k"]
    n_floored: int

    def to(self, dtype: torch.dtype) -> "Magnitudes":
        """The same in another precision."""
        errors = None if self.standard_errors is None else self.standard_errors.to(dtype)
        return Magnitudes(self.values.to(dtype), errors, self.in_sample.to(dtype), self.n_floored)


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
        unseen = 1 - b.n_samples / (n_data - n_a) if n_data > n_a else 0.0
        errors = (1 - f) * (max(unseen, 0.0) / b.n_samples) ** 0.5 * b.standard_deviations
    else:
        of_a = f**2 * a_redrawn.standard_deviations.square() / a_redrawn.n_samples
        of_b = (1 - f) ** 2 * b.standard_deviations.square() / b.n_samples
        errors = (of_a + of_b).sqrt()
    return floored(values.to(in_sample.dtype), errors, in_sample)


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
    errors = ((1.0 if redrawn is not None else 1 - f) / n) ** 0.5 * folds.standard_deviations
    return floored((f * share + (1 - f) * c).to(in_sample.dtype), errors, in_sample)


def _non_increasing(values: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    fitted = isotonic_regression(values.cpu().numpy(), increasing=False)
    return torch.from_numpy(fitted.x.copy()).to(values)


def same_batch(
    values: Float[Tensor, " k"], deviations: Float[Tensor, " k"], *, n: int, n_data: int, drawn: bool = False
) -> Magnitudes:
    r"""The eigenvalues of $H_B$ themselves: too large for the leading directions, too small for the trailing ones.

    Args:
        values: $u_i^\top H_B u_i$.
        deviations: spread over the samples of B of the curvature along each direction.
        n: number of samples in B.
        n_data: N.
        drawn: the curvature is a Monte-Carlo one, which is not known exactly even on all the data.

    Returns:
        The magnitudes; their standard errors know nothing of the bias.
    """
    errors = ((1.0 if drawn else 1 - n / n_data) / n) ** 0.5 * deviations
    return floored(values, errors, values)


def deviations_from_projections(projections: Float[Tensor, "R k"], n_samples: int) -> Float[Tensor, " k"]:
    """Spread over samples (ddof 1) of the curvature along directions, from the rows' projections on them."""
    per_sample = projections.square().unflatten(0, (n_samples, -1)).sum(1)
    return per_sample.std(0, correction=1) if n_samples > 1 else torch.zeros_like(per_sample[0])


def floored(values: Tensor, errors: Tensor | None, in_sample: Tensor) -> Magnitudes:
    """Magnitudes with negative values raised to 0 and counted: a posterior precision cannot have them."""
    negative = int((values < 0).sum())
    return Magnitudes(values.clamp_min(0), None if errors is None else errors.to(values.dtype), in_sample, negative)
