"""The estimator as a whole: split samples in, curvature of the full batch out."""

from collections.abc import Sequence
from dataclasses import replace

from debiased_laplace.curvature.sub_batch import SubBatchCurvature
from debiased_laplace.debiasing.directions import choose_solver
from debiased_laplace.debiasing.kronecker import estimate_kronecker
from debiased_laplace.debiasing.lowrank import LowRankChoice, estimate_low_ranks
from debiased_laplace.debiasing.options import EstimatorOptions
from debiased_laplace.debiasing.split_curvature import CurvatureEstimate, SplitCurvature
from debiased_laplace.debiasing.whitened import estimate_whitened


def estimate(split: SplitCurvature, options: EstimatorOptions) -> CurvatureEstimate:
    """Directions, then magnitudes: from other samples, from other folds, or from the same samples, the biased way.

    Args:
        split: curvature of the samples, by what they are used for.
        options: what kind of estimate.

    Returns:
        The estimate.

    Raises:
        ValueError: if a full structure does not fit into memory, or the curvature has no rows to whiten.
    """
    if options.structure == "kron":
        return corrected(estimate_kronecker(split, options), options)
    if options.structure == "full":
        _check_full(split.directions)
        # all eigenvectors; in the null space of H_a, where they are arbitrary, one average curvature
        return estimates_of_ranks(split, options, [LowRankChoice(None, "isotropic")])[0]
    return estimates_of_ranks(split, options, [LowRankChoice(options.rank, options.complement or "kron")])[0]


def corrected(found: CurvatureEstimate, options: EstimatorOptions) -> CurvatureEstimate:
    """The estimate, knowing its errors where the bias of the inverse is to be corrected."""
    if options.inverse_correction == "none":
        return found
    curvature, magnitudes = found.curvature, found.magnitudes
    errors = magnitudes.standard_errors
    if errors is None:
        raise ValueError("inverse_correction needs standard errors, which kron_magnitudes='kronecker' does not have.")
    variances = errors.square()
    if curvature.metric is not None:
        # of the weights, which are not the curvatures
        variances = variances / (curvature.directions.square() * curvature.metric[:, None]).sum(0).pow(4)
    return replace(found, curvature=replace(curvature, error_variances=variances))


def estimates_of_ranks(
    split: SplitCurvature, options: EstimatorOptions, choices: Sequence[LowRankChoice]
) -> list[CurvatureEstimate]:
    """Low-rank estimates that differ only in rank and complement, in the metric of the options."""
    if options.metric == "kron":
        found = estimate_whitened(split, options, [choice.rank for choice in choices])
    else:
        found = estimate_low_ranks(split, options, choices)
    return [corrected(one, options) for one in found]


def _check_full(a: SubBatchCurvature) -> None:
    """Refuse a full structure that only Lanczos could compute."""
    if choose_solver(a, None) == "lanczos":
        raise ValueError(
            f"hessian_structure='full' of {a.network.n_parameters:,} parameters and {a.n_samples:,} direction "
            "samples takes more than a quarter of the free memory, or too long; expected fewer ('last_layer', "
            "'subnetwork', direction_samples), or 'lowrank' or 'kron'."
        )
