"""The estimator as a whole: split samples in, curvature of the full batch out."""

from dataclasses import dataclass, replace

from torch import Tensor

from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.sub_batch import DirectionalMoments, SubBatchCurvature
from debiased_laplace.debiasing import complement as outside
from debiased_laplace.debiasing.complement import RESIDUAL_OF, LowRankCurvature
from debiased_laplace.debiasing.cross_fitting import cross_fitted_moments
from debiased_laplace.debiasing.directions import REQUESTED, choose_solver, find_directions, threshold_of
from debiased_laplace.debiasing.kronecker import basis_from, estimate_kronecker
from debiased_laplace.debiasing.magnitudes import (
    Magnitudes,
    cross_fitted,
    deviations_from_projections,
    held_out,
    same_batch,
)
from debiased_laplace.debiasing.options import CurvatureEstimate, EstimatorOptions, SplitCurvature
from debiased_laplace.linalg.eigenpairs import Eigenpairs
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the samples say along the directions and outside them.

    Attributes:
        own: of the samples that the directions come from, where their eigenvalues are not all of it.
        others: of the samples that the magnitudes come from, or of the folds; None for the biased estimate.
        basis: in which the diagonal outside is; None for the axes.
    """

    own: DirectionalMoments | None
    others: DirectionalMoments | None
    basis: KroneckerBasis | None


def estimate(split: SplitCurvature, options: EstimatorOptions) -> CurvatureEstimate:
    """Directions, then magnitudes: from other samples, from other folds, or from the same samples, the biased way.

    Args:
        split: curvature of the samples, by what they are used for.
        options: what kind of estimate.

    Returns:
        The estimate.

    Raises:
        ValueError: if a full structure does not fit into memory.
    """
    if options.structure == "kron":
        return estimate_kronecker(split, options)
    if options.structure == "full":
        options = _full(split.directions, options)
    a = split.directions
    if options.complement == "kron" and isinstance(a, RowCurvature):
        a.keep_rows()
    pairs = find_directions(
        a, rank=options.rank, solver=options.solver, seed=options.seed, threshold=_threshold(options)
    )
    evidence = _evidence(split, pairs, options)
    magnitudes = _magnitudes(split, pairs, evidence)
    curvature = _with_complement(pairs, magnitudes, evidence, split.share, options)
    source = (a if split.magnitudes is None else split.magnitudes).source
    return CurvatureEstimate(curvature, magnitudes, pairs.outcome, source, pairs.dropped)


def _full(a: SubBatchCurvature, options: EstimatorOptions) -> EstimatorOptions:
    """Every direction, and in the null space of H_a, whose directions are anybody's, one mean value."""
    if choose_solver(a, None) == "lanczos":
        raise ValueError(
            f"hessian_structure='full' of {a.network.n_parameters:,} parameters and {a.n_samples:,} direction "
            "samples takes more than a quarter of the free memory, or too long; expected fewer ('last_layer', "
            "'subnetwork', direction_samples), or 'lowrank' or 'kron'."
        )
    return replace(options, rank=None, complement="isotropic", solver="gram")


def _threshold(options: EstimatorOptions) -> float:
    return REQUESTED if options.structure == "full" else threshold_of(options.rank)


def _evidence(split: SplitCurvature, pairs: Eigenpairs, options: EstimatorOptions) -> Evidence:
    a, U = split.directions, pairs.vectors
    residual = RESIDUAL_OF[options.complement]
    basis = basis_from(a, options) if options.complement == "kron" else None
    # the draws that the directions were chosen by would count twice
    again = a.redrawn() if split.magnitudes is not None or split.folds is not None else a
    own = again.moments(U, residual, basis) if residual != "none" or again is not a else None
    others = None
    if split.magnitudes is not None:
        others = split.magnitudes.moments(U, residual, basis)
    elif split.folds is not None:
        others = cross_fitted_moments(
            a,
            split.folds,
            pairs,
            residual,
            threshold=_threshold(options),
            seed=options.seed,
            basis_of=None if basis is None else lambda part: basis_from(part, options),
        )
    return Evidence(own, others, basis)


def _magnitudes(split: SplitCurvature, pairs: Eigenpairs, evidence: Evidence) -> Magnitudes:
    a, others = split.directions, evidence.others
    redrawn = evidence.own if a.is_random else None
    if split.magnitudes is not None and others is not None:
        return held_out(pairs.values, others, n_a=a.n_samples, n_data=split.n_data, a_redrawn=redrawn)
    if others is not None:
        return cross_fitted(pairs.values, others, n_data=split.n_data, redrawn=redrawn, decreasing=True)
    if evidence.own is not None:
        deviations = evidence.own.standard_deviations
    elif pairs.projections is not None:
        deviations = deviations_from_projections(pairs.projections, a.n_samples)
    else:
        deviations = a.moments(pairs.vectors).standard_deviations
    return same_batch(pairs.values, deviations, n=a.n_samples, n_data=split.n_data, drawn=a.is_random)


def _with_complement(
    pairs: Eigenpairs, magnitudes: Magnitudes, evidence: Evidence, share: float, options: EstimatorOptions
) -> LowRankCurvature:
    """The low rank with what is outside it, weighted as a finite population wants it."""
    U, m = pairs.vectors, magnitudes.values
    own, others = evidence.own, evidence.others
    weighted = [(share if others is not None else 1.0, own), (1 - share, others)]
    parts = [(weight, part) for weight, part in weighted if part is not None]
    if options.complement == "none":
        return outside.without_complement(U, m)
    if options.complement == "isotropic":
        return outside.isotropic(U, m, _sum([(w, part.trace) for w, part in parts]))
    return outside.diagonal(U, m, _sum([(w, part.residual_diagonal) for w, part in parts]), evidence.basis)


def _sum(terms: list[tuple[float, Tensor | None]]) -> Tensor:
    known = [weight * value for weight, value in terms if value is not None]
    return sum(known[1:], start=known[0])
