"""Low rank plus diagonal: directions from some samples, magnitudes from others, and a complement."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from debiased_laplace.curvature.kronecker import KroneckerFactors, kronecker_basis
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.sub_batch import DirectionalMoments, ResidualRequest
from debiased_laplace.debiasing import complement
from debiased_laplace.debiasing.complement import RESIDUAL_OF, ComplementKind, LowRankCurvature
from debiased_laplace.debiasing.cross_fitting import cross_fitted_moments
from debiased_laplace.debiasing.directions import REQUESTED, find_directions, threshold_of
from debiased_laplace.debiasing.kronecker import basis_without, factors_of
from debiased_laplace.debiasing.magnitudes import (
    Magnitudes,
    cross_fitted,
    held_out,
    moments_from_projections,
    of_drawn_rows,
    same_batch,
)
from debiased_laplace.debiasing.options import EstimatorOptions
from debiased_laplace.debiasing.split_curvature import CurvatureEstimate, SplitCurvature
from debiased_laplace.linalg.eigenpairs import Eigenpairs, numerical_rank


def estimate_low_ranks(split: SplitCurvature, variants: Sequence[EstimatorOptions]) -> list[CurvatureEstimate]:
    """Estimate several low ranks from one eigendecomposition; smaller ranks take its leading directions.

    Args:
        split: curvature of the direction and magnitude samples.
        variants: options that differ in rank, complement and magnitudes only. "same_batch" uses the direction samples
            alone; it cannot be mixed with other magnitudes for a Monte-Carlo curvature.

    Returns:
        An estimate for each of the options.
    """
    a, options = split.directions, variants[0]
    kinds = [_complement_of(variant) for variant in variants]
    with_basis = "kron" in kinds
    if (with_basis or len(variants) > 1) and isinstance(a, RowCurvature):
        a.keep_rows()
    given = [variant.rank for variant in variants if variant.rank is not None]
    thresholds = [REQUESTED if v.structure == "full" else threshold_of(v.rank) for v in variants]
    # factors first: a Hessian that does not fit into memory fails here, before a Lanczos run
    factors = factors_of(a, options)[0] if with_basis else None
    basis = None if factors is None else kronecker_basis(factors, a.network.like.dtype)
    rank = max(given) if len(given) == len(variants) else None
    n_folds = 0 if split.effective_folds is None else len(split.effective_folds.unique())
    pairs = find_directions(
        a,
        rank=rank,
        solver=options.solver,
        seed=options.seed,
        threshold=min(thresholds),
        n_folds=n_folds,
        vector_format=options.vector_format,
    )
    requests = []
    for variant, kind, threshold in zip(variants, kinds, thresholds, strict=True):
        k = min(len(pairs.values) if variant.rank is None else variant.rank, numerical_rank(pairs.values, threshold))
        requests.append(ResidualRequest(k, RESIDUAL_OF[kind], basis if kind == "kron" else None, threshold))
    own_moments = _own_moments(split, pairs, list(dict.fromkeys(requests)))
    biased = [variant.magnitudes == "same_batch" for variant in variants]
    debiased = list(dict.fromkeys(r for r, same in zip(requests, biased, strict=True) if not same))
    other_moments = _other_moments(split, pairs, debiased, factors, options)
    estimates = []
    for request, same in zip(requests, biased, strict=True):
        leading = pairs if request.rank == len(pairs.values) else pairs.leading(request.rank)
        own, others = own_moments.get(request), None if same else other_moments.get(request)
        magnitudes = _magnitudes(split, leading, own, others)
        of_own, of_others = split.weights
        weighted = [(of_own if others is not None else 1.0, own), (of_others, others)]
        # nothing else reads the directions of a single estimate
        out = leading.vectors if len(variants) == 1 else None
        curvature = _with_complement(leading, magnitudes, request, weighted, out, a.network)
        source = (a if split.magnitudes is None else split.magnitudes).source
        estimates.append(CurvatureEstimate(curvature, magnitudes, pairs.outcome, source, leading.dropped))
    return estimates


def _complement_of(options: EstimatorOptions) -> ComplementKind:
    if options.structure == "full":
        # in the null space of H_a, where eigenvectors are arbitrary, one average curvature
        return "isotropic"
    if options.metric == "kron":
        # the axes of the whitened coordinates are those of the Kronecker basis
        return "diagonal"
    return options.complement or "kron"


def _own_moments(
    split: SplitCurvature, pairs: Eigenpairs, requests: list[ResidualRequest]
) -> dict[ResidualRequest, DirectionalMoments]:
    """Measure the direction samples, for the requests that their eigenvalues do not answer."""
    a = split.directions
    has_others = split.magnitudes is not None or split.effective_folds is not None
    # the directions depend on the draws that they were computed from
    again = (split.known or a.redrawn()) if has_others else a
    requests = [request for request in requests if request.residual != "none" or again is not a]
    moments = again.nested_moments(pairs.vectors, requests) if requests else []
    return dict(zip(requests, moments, strict=True))


def _other_moments(
    split: SplitCurvature,
    pairs: Eigenpairs,
    requests: list[ResidualRequest],
    factors: list[KroneckerFactors] | None,
    options: EstimatorOptions,
) -> dict[ResidualRequest, DirectionalMoments]:
    """Measure the magnitude samples, or every fold along the directions of the others; empty if there are neither."""
    a, b = split.directions, split.magnitudes
    if not requests or (b is None and split.effective_folds is None):
        return {}
    if b is not None:
        if len(requests) > 1 and isinstance(b, RowCurvature):
            b.keep_rows()
        moments = b.nested_moments(pairs.vectors, requests)
    else:
        assert split.effective_folds is not None  # for the type checker
        basis_of = None if factors is None else lambda fold: basis_without(a, factors, fold, options)
        folds = split.effective_folds
        moments = cross_fitted_moments(a, folds, pairs, requests, seed=options.seed, basis_of=basis_of, rest=split.rest)
    return dict(zip(requests, moments, strict=True))


def _magnitudes(
    split: SplitCurvature, pairs: Eigenpairs, own: DirectionalMoments | None, others: DirectionalMoments | None
) -> Magnitudes:
    a = split.directions
    if split.known_factors is not None and own is not None and others is not None:
        return of_drawn_rows(pairs.values, own.means, others, decreasing=split.magnitudes is None)
    redrawn = own if a.is_random else None
    if split.magnitudes is not None and others is not None:
        return held_out(pairs.values, others, n_a=a.n_samples, n_data=split.n_data, a_redrawn=redrawn)
    if others is not None:
        return cross_fitted(pairs.values, others, n_data=split.n_data, redrawn=redrawn, decreasing=True)
    drawn = a.draw is not None
    if own is None and pairs.projections is not None and not drawn:
        own = moments_from_projections(pairs.projections, a.n_samples)
    elif own is None:
        own = a.moments(pairs.vectors)
    return same_batch(pairs.values, own, n_data=split.n_data, drawn=a.is_random or drawn)


def _with_complement(
    pairs: Eigenpairs,
    magnitudes: Magnitudes,
    request: ResidualRequest,
    weighted: list[tuple[float, DirectionalMoments | None]],
    out: Tensor | None,
    network: Network,
) -> LowRankCurvature:
    """Complete the low rank with the weighted sum of the residuals; see `complement.diagonal` for `out`."""
    U, m = pairs.vectors, magnitudes.values
    parts = [(weight, part) for weight, part in weighted if part is not None]
    if request.residual == "none":
        found = complement.without_complement(U, m)
    elif request.residual == "trace":
        found = complement.isotropic(U, m, _sum([(w, part.trace) for w, part in parts]), network.n_parameters)
    else:
        residual = _sum([(w, part.residual_diagonal) for w, part in parts])
        found = complement.diagonal(U, m, residual, request.basis, out=out)
    return replace(found, shard=network.shard)


def _sum(terms: list[tuple[float, Tensor | None]]) -> Tensor:
    known = [weight * value for weight, value in terms if value is not None]
    return sum(known[1:], start=known[0])
