"""The estimator as a whole: sub-batches in, curvature of the full batch out."""

from dataclasses import replace

from torch import Tensor

from debiased_laplace.curvature.sub_batch import DirectionalMoments, SubBatchCurvature
from debiased_laplace.debiasing import complement as outside
from debiased_laplace.debiasing.complement import RESIDUAL_OF, ComplementKind, LowRankCurvature
from debiased_laplace.debiasing.directions import REQUESTED, choose_solver, find_directions
from debiased_laplace.debiasing.kronecker import estimate_kronecker
from debiased_laplace.debiasing.magnitudes import (
    Magnitudes,
    deviations_from_projections,
    held_out,
    same_batch,
)
from debiased_laplace.debiasing.options import CurvatureEstimate, EstimatorOptions
from debiased_laplace.linalg.eigenpairs import Eigenpairs


def estimate(
    a: SubBatchCurvature, b: SubBatchCurvature | None, n_data: int, options: EstimatorOptions
) -> CurvatureEstimate:
    """Directions from a, magnitudes from b; from a as well, the biased way, where there is no b.

    Args:
        a: curvature of the direction samples.
        b: curvature of the magnitude samples, disjoint from them.
        n_data: N.
        options: what kind of estimate.

    Returns:
        The estimate.

    Raises:
        ValueError: if a full structure does not fit into memory.
    """
    if options.structure == "kron":
        return estimate_kronecker(a, b, n_data, options)
    if options.structure == "full":
        if choose_solver(a, None) == "lanczos":
            raise ValueError(
                f"hessian_structure='full' of {a.network.n_parameters:,} parameters and {a.n_samples:,} direction "
                "samples takes more than a quarter of the free memory, or too long; expected fewer ('last_layer', "
                "'subnetwork', direction_samples), or 'lowrank' or 'kron'."
            )
        # every direction, and in the null space of H_a, whose directions are anybody's, one mean value
        options = replace(options, rank=None, complement="isotropic", solver="gram")
    return estimate_same_batch(a, n_data, options) if b is None else estimate_held_out(a, b, n_data, options)


def estimate_held_out(
    a: SubBatchCurvature, b: SubBatchCurvature, n_data: int, options: EstimatorOptions
) -> CurvatureEstimate:
    """Directions from a, magnitudes from b."""
    pairs = _directions(a, options)
    residual = RESIDUAL_OF[options.complement]
    seen_by_b = b.moments(pairs.vectors, residual)
    again = a.redrawn()
    seen_by_a = again.moments(pairs.vectors, residual) if residual != "none" or a.is_random else None
    magnitudes = held_out(
        pairs.values,
        seen_by_b,
        n_a=a.n_samples,
        n_data=n_data,
        a_redrawn=seen_by_a if a.is_random else None,
    )
    parts = [(1 - a.n_samples / n_data, seen_by_b)]
    if seen_by_a is not None:
        parts.append((a.n_samples / n_data, seen_by_a))
    curvature = _with_complement(pairs, magnitudes, options.complement, parts)
    return CurvatureEstimate(curvature, magnitudes, pairs.outcome, b.source, pairs.dropped)


def estimate_same_batch(batch: SubBatchCurvature, n_data: int, options: EstimatorOptions) -> CurvatureEstimate:
    """Directions and magnitudes from the same samples: biased unless they are all the data."""
    pairs = _directions(batch, options)
    residual = RESIDUAL_OF[options.complement]
    n = batch.n_samples
    parts = []
    if residual == "none" and pairs.projections is not None:
        deviations = deviations_from_projections(pairs.projections, n)
    else:
        moments = batch.moments(pairs.vectors, residual)
        deviations = moments.standard_deviations
        parts = [(1.0, moments)]
    magnitudes = same_batch(pairs.values, deviations, n=n, n_data=n_data, drawn=batch.is_random)
    curvature = _with_complement(pairs, magnitudes, options.complement, parts)
    return CurvatureEstimate(curvature, magnitudes, pairs.outcome, batch.source, pairs.dropped)


def _directions(curvature: SubBatchCurvature, options: EstimatorOptions) -> Eigenpairs:
    threshold = REQUESTED if options.structure == "full" else None
    return find_directions(curvature, rank=options.rank, solver=options.solver, seed=options.seed, threshold=threshold)


def _with_complement(
    pairs: Eigenpairs,
    magnitudes: Magnitudes,
    kind: ComplementKind,
    parts: list[tuple[float, DirectionalMoments]],
) -> LowRankCurvature:
    U, m = pairs.vectors, magnitudes.values
    if kind == "isotropic":
        return outside.isotropic(U, m, _weighted([(w, part.trace) for w, part in parts]))
    if kind == "diagonal":
        return outside.diagonal(U, m, _weighted([(w, part.residual_diagonal) for w, part in parts]))
    return outside.without_complement(U, m)


def _weighted(parts: list[tuple[float, Tensor | None]]) -> Tensor:
    """The weighted sum, with the weights of the finite population."""
    terms = [weight * value for weight, value in parts if value is not None]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
