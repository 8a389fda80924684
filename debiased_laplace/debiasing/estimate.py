"""The estimator as a whole: sub-batches in, curvature of the full batch out."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from debiased_laplace.curvature.ggn import DirectionalMoments, SubBatchCurvature
from debiased_laplace.debiasing import complement as outside
from debiased_laplace.debiasing.complement import RESIDUAL_OF, ComplementKind, LowRankCurvature
from debiased_laplace.debiasing.directions import Solver, find_directions
from debiased_laplace.debiasing.magnitudes import (
    Magnitudes,
    deviations_from_projections,
    held_out,
    same_batch,
)
from debiased_laplace.linalg.eigenpairs import Eigenpairs, SolverOutcome

MagnitudesKind = Literal["held_out", "same_batch"]


@dataclass(frozen=True)
class EstimatorOptions:
    """What kind of estimate; the names are those of the public constructor."""

    rank: int | None
    magnitudes: MagnitudesKind
    complement: ComplementKind
    solver: Solver
    seed: int


@dataclass(frozen=True, eq=False)
class CurvatureEstimate:
    """An estimate of the full batch's mean curvature.

    Attributes:
        curvature: low rank plus diagonal.
        magnitudes: along the directions, with their errors.
        outcome: of the eigensolver.
        source: which engine computed the curvature along the directions.
        dropped: the largest curvature that counted as not supported by the direction samples.
    """

    curvature: LowRankCurvature
    magnitudes: Magnitudes
    outcome: SolverOutcome
    source: str
    dropped: float = 0.0


def estimate_held_out(
    a: SubBatchCurvature, b: SubBatchCurvature, n_data: int, options: EstimatorOptions
) -> CurvatureEstimate:
    """Directions from a, magnitudes from b.

    Args:
        a: curvature of the direction samples.
        b: curvature of the magnitude samples, disjoint from them.
        n_data: N.
        options: rank, complement, solver, seed.

    Returns:
        The estimate.
    """
    pairs = _directions(a, options)
    residual = RESIDUAL_OF[options.complement]
    seen_by_b = b.moments(pairs.vectors, residual)
    magnitudes = held_out(pairs, seen_by_b, n_a=a.n_samples, n_data=n_data)
    parts = [(1 - a.n_samples / n_data, seen_by_b)]
    if residual != "none":
        parts.append((a.n_samples / n_data, a.moments(pairs.vectors, residual)))
    curvature = _with_complement(pairs, magnitudes, options.complement, parts)
    return CurvatureEstimate(curvature, magnitudes, pairs.outcome, b.source, pairs.dropped)


def estimate_same_batch(batch: SubBatchCurvature, n_data: int, options: EstimatorOptions) -> CurvatureEstimate:
    """Directions and magnitudes from the same samples: biased unless they are all the data.

    Args:
        batch: curvature of all samples used.
        n_data: N.
        options: rank, complement, solver, seed.

    Returns:
        The estimate.
    """
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
    magnitudes = same_batch(pairs, deviations, n=n, n_data=n_data)
    curvature = _with_complement(pairs, magnitudes, options.complement, parts)
    return CurvatureEstimate(curvature, magnitudes, pairs.outcome, batch.source, pairs.dropped)


def _directions(curvature: SubBatchCurvature, options: EstimatorOptions) -> Eigenpairs:
    return find_directions(curvature, rank=options.rank, solver=options.solver, seed=options.seed)


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
