r"""Gain of debiasing a posterior that is fitted to one batch, in nats of its KL to the full batch.

Two posteriors differ in their magnitudes alone, the batch's own or the cross-fitted ones. They share the rows,
directions and Kronecker basis of the batch, and their held-out KLs share the rows in that basis.

References:
    Hutchinson (1990), Comm. Statist. Simulation Comput. 19(2), doi 10.1080/03610919008812866 (estimate of a trace).
"""

import warnings
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.roots import OutputRoot
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.data.batches import sample_hashes
from debiased_laplace.data.splitting import deal
from debiased_laplace.debiasing.estimate import estimate_variants
from debiased_laplace.debiasing.held_out_kl import prior_trace
from debiased_laplace.debiasing.options import EstimatorOptions
from debiased_laplace.debiasing.split_curvature import SplitCurvature
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal

RANK = 100
"""Largest number of directions of the posteriors."""

MIXTURES = 2
"""Mixtures per sample in place of its rows; traces vary far more between samples than between mixtures of one."""


@dataclass(frozen=True)
class MixedGaussNewton(OutputRoot):
    r"""Root of the GGN with its columns mixed by random signs, $S Z / \sqrt m$, which is unbiased for the GGN.

    $\mathrm{tr}(V^\top A V) = E \|A^{1/2} V^\top z\|^2$ for a vector z of random signs: a trace takes one backward pass
    per mixture, where the rows take one per output.

    Attributes:
        likelihood: of the outputs.
        n_mixtures: m.
    """

    likelihood: Likelihood
    n_mixtures: int
    kind: str = "GGN"

    def n_columns(self, n_outputs: int) -> int:  # noqa: ARG002
        """Return the number of mixtures."""
        return self.n_mixtures

    def targets_or_noise(self, targets: Tensor, n_outputs: int, generator: torch.Generator) -> Tensor:
        """Draw the signs Z (n, C, m)."""
        shape = (len(targets), n_outputs, self.n_mixtures)
        signs = torch.randint(0, 2, shape, generator=generator).mul(2).sub(1).to(targets.device)
        factors = self.likelihood.output_factors(n_outputs, targets)
        # a factor of a whole block of the curvature commutes with the block's root
        return signs if factors is None else signs * factors.sqrt()[..., None]

    def columns(self, outputs: Tensor, targets_or_noise: Tensor, chosen: slice) -> Tensor:
        """Return the chosen mixtures."""
        signs = targets_or_noise[..., chosen].to(outputs.dtype)
        return self.likelihood.root(outputs, slice(None)) @ signs / self.n_mixtures**0.5

    def transposed(self, outputs: Tensor, targets_or_noise: Tensor, X: Tensor) -> Tensor:
        """Return the transposed root times X, by the formula of the likelihood."""
        return targets_or_noise.to(X.dtype).mT @ self.likelihood.root_transposed(outputs, X) / self.n_mixtures**0.5

    def product(self, outputs: Tensor, targets_or_noise: Tensor, x: Tensor) -> Tensor:
        """Return the root times its transpose times x."""
        S = self.columns(outputs, targets_or_noise, slice(None))
        return (S @ (S.mT @ x[..., None]))[..., 0]


def with_mixed_rows(samples: RowCurvature, seed: int) -> RowCurvature:
    """Return a curvature with the same expectation and at most two rows per sample, drawn by the seed."""
    if samples.rows_per_sample <= MIXTURES:
        return samples
    root = MixedGaussNewton(samples.network.likelihood, MIXTURES)
    return RowCurvature(samples.network, samples.samples, root, seed=seed)


def gain_of_debiasing(
    batch: RowCurvature, reference: RowCurvature, *, prior_precision: float, n_data: int, seed: int
) -> float:
    r"""Estimate by how much debiasing lowers the KL of a posterior to the full batch, without bias.

    The gain is the difference of the held-out KLs of the posteriors that `DebiasedLaplace(magnitudes="same_batch")` and
    `"cross_fitted"` fit with at most 100 directions and the Kronecker complement: half of $N \tau$ times the difference
    of $\mathrm{tr}(\hat P^{-1} [f H_a + (1 - f) H_c])$, of $\mathrm{tr}(\hat P^{-1} P_0)$ and of $\log\det \hat P$.

    Args:
        batch: curvature of the samples a that the posteriors are fitted to.
        reference: curvature of disjoint samples c, see `with_mixed_rows`.
        prior_precision: of the posteriors, above 0.
        n_data: N.
        seed: of folds and mixtures.

    Returns:
        The gain in nats; negative if debiasing raises the KL.
    """
    biased, debiased, basis = _posteriors(batch, prior_precision, n_data, seed)
    pair = (biased, debiased)
    f = batch.n_samples / n_data
    own_traces = _mean_traces(with_mixed_rows(batch, seed), pair, basis)
    traces = f * own_traces + (1 - f) * _mean_traces(reference, pair, basis)
    prior = batch.network.like.new_tensor(prior_precision).expand(batch.network.n_parameters)
    rest = [prior_trace(precision, prior) + float(precision.log_det) for precision in pair]
    # temperature and observation noise are 1
    values = 0.5 * (n_data * traces + traces.new_tensor(rest))
    return float(values[0] - values[1])


def _posteriors(
    batch: RowCurvature, prior_precision: float, n_data: int, seed: int
) -> tuple[LowRankPlusDiagonal, LowRankPlusDiagonal, KroneckerBasis | None]:
    """Return the precisions of both posteriors in coordinates of their common basis, and the basis."""
    options = EstimatorOptions(rank=RANK, complement="kron", seed=seed)
    folds = _folds(batch, options.n_folds, seed)
    variants = [replace(options, magnitudes="same_batch"), options]
    with warnings.catch_warnings():
        # a small batch supports fewer directions than asked for
        warnings.filterwarnings("ignore", message=f"rank={RANK} was asked for")
        estimates = estimate_variants(SplitCurvature(batch, None, folds, n_data), variants)
    prior = batch.network.like.new_tensor(prior_precision)
    biased, debiased = (replace(e.curvature, basis=None).precision(float(n_data), prior) for e in estimates)
    return biased, debiased, estimates[0].curvature.basis


def _folds(batch: RowCurvature, n_folds: int, seed: int) -> Int64[Tensor, " n"]:
    """Deal the samples to folds, with equal samples in the same fold."""
    hashes = torch.cat([sample_hashes(part) for part in batch.samples])
    kinds, kind = torch.unique(hashes, return_inverse=True)
    first = torch.full((len(kinds),), len(kind)).scatter_reduce(0, kind, torch.arange(len(kind)), "amin")
    # in the order of the samples, as a posterior deals its own
    order = torch.empty_like(first).scatter(0, first.argsort(), torch.arange(len(kinds)))
    generator = torch.Generator().manual_seed(seed)
    torch.randperm(len(kinds), generator=generator)
    return deal(len(kinds), min(n_folds, len(kinds)), generator)[order[kind]]


def _mean_traces(
    samples: RowCurvature, precisions: tuple[LowRankPlusDiagonal, ...], basis: KroneckerBasis | None
) -> Float[Tensor, " p"]:
    r"""Return $\mathrm{tr}(\hat P^{-1} H)$ for each posterior in double precision, H being the mean curvature."""
    total = torch.zeros(len(precisions), dtype=torch.float64)
    for block in samples.rows():
        # one matrix, as a stack of small ones would be multiplied one by one
        rows = block.flatten(0, 1)
        coordinates = rows if basis is None else basis.coordinates(rows)
        for i, precision in enumerate(precisions):
            total[i] += precision.variances(coordinates).double().sum().cpu()
    return total / samples.n_samples
