"""The estimator: from the curvature of split samples to the curvature of the full batch."""

from collections.abc import Sequence
from dataclasses import replace

from debiased_laplace.curvature.sub_batch import SubBatchCurvature
from debiased_laplace.debiasing.directions import choose_solver
from debiased_laplace.debiasing.kronecker import estimate_kronecker
from debiased_laplace.debiasing.lowrank import estimate_low_ranks
from debiased_laplace.debiasing.options import EstimatorOptions
from debiased_laplace.debiasing.split_curvature import CurvatureEstimate, SplitCurvature
from debiased_laplace.debiasing.whitened import estimate_whitened


def estimate(split: SplitCurvature, options: EstimatorOptions) -> CurvatureEstimate:
    """Estimate directions, then magnitudes: from other samples, from other folds, or (biased) from the same samples.

    Args:
        split: curvature of the direction and magnitude samples.
        options: of the estimate.

    Returns:
        The estimate.

    Raises:
        ValueError: if a full structure does not fit into memory, the metric needs rows that the curvature does not
            have, or the correction of the inverse needs standard errors that the magnitudes do not have.
    """
    if options.structure == "kron":
        return corrected(estimate_kronecker(split, options), options)
    if options.structure == "full":
        _check_full(split.directions)
    return estimate_variants(split, [options])[0]


def estimate_variants(split: SplitCurvature, variants: Sequence[EstimatorOptions]) -> list[CurvatureEstimate]:
    """Estimate low ranks whose options differ in rank, complement and magnitudes only; see `estimate_low_ranks`."""
    estimate_all = estimate_whitened if variants[0].metric == "kron" else estimate_low_ranks
    return [corrected(*each) for each in zip(estimate_all(split, variants), variants, strict=True)]


def corrected(result: CurvatureEstimate, options: EstimatorOptions) -> CurvatureEstimate:
    """Add the variances that the correction of the inverse needs, if the options ask for it."""
    if options.inverse_correction == "none":
        return result
    curvature, magnitudes = result.curvature, result.magnitudes
    errors = magnitudes.standard_errors
    if errors is None:
        raise ValueError("inverse_correction needs standard errors, which kron_magnitudes='kronecker' does not have.")
    variances = errors.square()
    if curvature.metric is not None:
        # the weights are scaled curvatures
        variances = variances / (curvature.directions.square() * curvature.metric[:, None]).sum(0).pow(4)
    return replace(result, curvature=replace(curvature, error_variances=variances))


def _check_full(a: SubBatchCurvature) -> None:
    """Raise if the full structure is affordable by Lanczos only."""
    if choose_solver(a, None) == "lanczos":
        raise ValueError(
            f"hessian_structure='full' of {a.network.n_parameters:,} parameters and {a.n_samples:,} direction "
            "samples does not fit into the available memory (a quarter of what is free, unless `memory` says another), "
            "or takes too long; expected fewer ('last_layer', 'subnetwork', direction_samples), or 'lowrank' or 'kron'."
        )
