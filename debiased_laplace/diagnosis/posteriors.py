r"""What debiasing gains a posterior from one batch, in nats of its KL to the full batch.

Two posteriors differ in nothing but their magnitudes: the batch's own ones, and the cross-fitted ones. They share the
rows, directions and Kronecker basis of the batch, and what judges them is put into that basis once.
"""

import warnings
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.data.splitting import draw_sub_batches
from debiased_laplace.debiasing.estimate import estimates_of_ranks
from debiased_laplace.debiasing.held_out_kl import prior_trace
from debiased_laplace.debiasing.lowrank import LowRankChoice
from debiased_laplace.debiasing.options import EstimatorOptions
from debiased_laplace.debiasing.split_curvature import SplitCurvature
from debiased_laplace.diagnosis.mixtures import MixedGaussNewton
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal

RANK = 100
"""Directions of the posteriors, at most."""

MIXTURES = 2
"""Of the rows of a sample, in place of all of them: samples differ by far more than mixtures of the same one."""


def mixed(samples: RowCurvature, seed: int) -> RowCurvature:
    """The same curvature on average, with fewer rows, mixed by the seed, where there are many."""
    if samples.rows_per_sample <= MIXTURES:
        return samples
    root = MixedGaussNewton(samples.network.likelihood, MIXTURES)
    return RowCurvature(samples.network, samples.samples, root, seed=seed)


def gain_of_debiasing(
    batch: RowCurvature, reference: RowCurvature, *, prior_precision: float, n_data: int, seed: int
) -> float:
    r"""Nats by which the biased posterior is further from the full batch than the cross-fitted one, unbiasedly.

    The difference of two held-out KLs, of the posteriors that `DebiasedLaplace(magnitudes="same_batch")` and
    `"cross_fitted"` fit with a rank of 100 and the Kronecker complement: half of $N \tau$ times the difference of
    $\mathrm{tr}(\hat P^{-1} [f H_a + (1 - f) H_c])$, of $\mathrm{tr}(\hat P^{-1} P_0)$ and of $\log\det \hat P$.

    Args:
        batch: curvature of the samples a that the posteriors are fitted to.
        reference: `mixed` curvature of samples c that are none of these.
        prior_precision: of the posteriors, above 0.
        n_data: N.
        seed: of folds and mixtures.

    Returns:
        The gain; negative where debiasing does harm.
    """
    biased, debiased, basis = _posteriors(batch, prior_precision, n_data, seed)
    pair = (biased, debiased)
    share = batch.n_samples / n_data
    traces = share * _mean_traces(mixed(batch, seed), pair, basis) + (1 - share) * _mean_traces(reference, pair, basis)
    prior = batch.network.like.new_tensor(prior_precision).expand(batch.network.n_parameters)
    own = [prior_trace(precision, prior) + float(precision.log_det) for precision in pair]
    # temperature and observation noise are 1
    values = 0.5 * (n_data * traces + traces.new_tensor(own))
    return float(values[0] - values[1])


def _posteriors(
    batch: RowCurvature, prior_precision: float, n_data: int, seed: int
) -> tuple[LowRankPlusDiagonal, LowRankPlusDiagonal, KroneckerBasis | None]:
    """The precisions of both posteriors in coordinates of the basis that they share, and the basis."""
    options = EstimatorOptions(rank=RANK, complement="kron", seed=seed)
    folds = draw_sub_batches(
        torch.arange(batch.n_samples),
        direction_samples=0.5,
        magnitude_samples=None,
        shared=True,
        n_data=n_data,
        seed=seed,
        n_folds=options.n_folds,
    ).folds
    choices = [LowRankChoice(RANK, "kron", in_sample=True), LowRankChoice(RANK, "kron")]
    with warnings.catch_warnings():
        # fewer directions than asked for are all there are
        warnings.filterwarnings("ignore", message=f"rank={RANK} was asked for")
        found = estimates_of_ranks(SplitCurvature(batch, None, folds, n_data), options, choices)
    prior = batch.network.like.new_tensor(prior_precision)
    biased, debiased = (replace(one.curvature, basis=None).precision(float(n_data), prior) for one in found)
    return biased, debiased, found[0].curvature.basis


def _mean_traces(
    samples: RowCurvature, precisions: tuple[LowRankPlusDiagonal, ...], basis: KroneckerBasis | None
) -> Float[Tensor, " p"]:
    r"""$\mathrm{tr}(\hat P^{-1} H)$ of samples' mean curvature H, for each posterior, in double precision."""
    total = torch.zeros(len(precisions), dtype=torch.float64)
    for block in samples.rows():
        # one matrix: a stack of small ones is multiplied one by one
        rows = block.flatten(0, 1)
        coordinates = rows if basis is None else basis.coordinates(rows)
        for i, precision in enumerate(precisions):
            total[i] += precision.variances(coordinates).double().sum().cpu()
    return total / samples.n_samples
