"""The Kronecker posterior's curvature: an eigenbasis from some samples, the curvature along it from others."""

import torch
from torch import Tensor

from debiased_laplace.curvature.kfac import KfacSums
from debiased_laplace.curvature.kronecker import (
    KroneckerFactors,
    kronecker_basis,
    matrix_shapes,
    partial_trace_factors,
    row_matrix_factors,
)
from debiased_laplace.curvature.row_curvature import NOBODY, RowCurvature
from debiased_laplace.curvature.sub_batch import SubBatchCurvature
from debiased_laplace.debiasing.complement import LowRankCurvature
from debiased_laplace.debiasing.magnitudes import Magnitudes, floored, held_out, same_batch
from debiased_laplace.debiasing.options import CurvatureEstimate, EstimatorOptions
from debiased_laplace.linalg.eigenpairs import SolverOutcome
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis


def estimate_kronecker(
    a: SubBatchCurvature, b: SubBatchCurvature | None, n_data: int, options: EstimatorOptions
) -> CurvatureEstimate:
    """Eigenbasis from a, magnitudes from b; from a as well where there is no b.

    Args:
        a: curvature of the direction samples.
        b: curvature of the magnitude samples, disjoint from them; None for the biased estimate.
        n_data: N.
        options: basis, magnitudes and K-FAC's approximation.

    Returns:
        The estimate, with the magnitudes as a diagonal in the basis.
    """
    if isinstance(a, RowCurvature) and options.kron_basis == "row_matrices" and a.linear_layer is None:
        a.keep_rows()
    factors, who = factors_of(a, options)
    basis = kronecker_basis(factors, a.network.like.dtype)
    if options.kron_magnitudes == "exact":
        magnitudes = _exact(a, b, basis, n_data)
    else:
        # draws that the basis has been chosen by would count twice
        again = factors_of(a.redrawn(), options)[0] if b is not None and a.is_random else factors
        magnitudes = _from_factors((factors, again), b, basis, a.n_samples / n_data, options)
    like = a.network.like
    magnitudes = magnitudes.to(like.dtype)
    curvature = LowRankCurvature(magnitudes.values, like.new_zeros(len(like), 0), like.new_zeros(0), basis)
    outcome = SolverOutcome("dense", True, 0, "all eigenvectors of every pair of Kronecker factors")
    source = joined(who, (a if b is None else b).source)
    return CurvatureEstimate(curvature, magnitudes, outcome, source)


def factors_of(curvature: SubBatchCurvature, options: EstimatorOptions) -> tuple[list[KroneckerFactors], str]:
    """The factors of every parameter, in order, and who computed them."""
    selection = curvature.network.selection
    shapes = matrix_shapes(selection, layers_only=options.kron_basis == "kfac")
    if not isinstance(curvature, RowCurvature):
        return partial_trace_factors(curvature.dense(), shapes), curvature.source
    if options.kron_basis == "row_matrices":
        return row_matrix_factors(curvature, shapes), curvature.source
    found, who = _kfac(curvature, options)
    # K-FAC knows nothing of the other parameters: they get the exact diagonal
    if set(selection.names) <= set(found) and not any(e is not None for e in selection.entries):
        return [found[name] for name in selection.names], who
    rest = row_matrix_factors(curvature, shapes)
    chosen = [
        found.get(name, other) if entries is None else other
        for name, other, entries in zip(selection.names, rest, selection.entries, strict=True)
    ]
    return chosen, joined(who, curvature.source)


def _kfac(curvature: RowCurvature, options: EstimatorOptions) -> tuple[dict[str, KroneckerFactors], str]:
    network = curvature.network
    if network.foreign is not None and network.foreign.offers_kfac(curvature.root, options.kfac_approx):
        pairs = network.foreign.kfac(curvature.samples, curvature.n_samples)
        return {name: KroneckerFactors(left, right) for name, (left, right) in pairs.items()}, network.foreign.name
    sums = KfacSums(network, curvature.root, options.kfac_approx)
    for batch, side in curvature.batches():
        sums.add(batch, side)
    return sums.factors(), "torch.func rows"


def joined(*sources: str) -> str:
    """The names of all who computed something."""
    names = {name for source in sources for name in source.split(" and ")}
    return " and ".join(sorted(names - {NOBODY}))


def _exact(a: SubBatchCurvature, b: SubBatchCurvature | None, basis: KroneckerBasis, n_data: int) -> Magnitudes:
    seen_by_a = a.coordinate_moments(basis)
    if b is None:
        deviations = seen_by_a.standard_deviations
        return same_batch(seen_by_a.means, deviations, n=a.n_samples, n_data=n_data, drawn=a.is_random)
    redrawn = a.redrawn().coordinate_moments(basis) if a.is_random else None
    return held_out(seen_by_a.means, b.coordinate_moments(basis), n_a=a.n_samples, n_data=n_data, a_redrawn=redrawn)


def _from_factors(
    of_a: tuple[list[KroneckerFactors], list[KroneckerFactors]],
    b: SubBatchCurvature | None,
    basis: KroneckerBasis,
    f: float,
    options: EstimatorOptions,
) -> Magnitudes:
    """Products of the factors' own curvatures along the basis: unbiased factor by factor only."""
    in_sample, share_of_a = (_diagonal(factors, basis) for factors in of_a)
    if b is None:
        return floored(in_sample, None, in_sample)
    return floored(f * share_of_a + (1 - f) * _diagonal(factors_of(b, options)[0], basis), None, in_sample)


def _diagonal(factors: list[KroneckerFactors], basis: KroneckerBasis) -> Tensor:
    return torch.cat([f.diagonal_in(block) for f, block in zip(factors, basis.blocks, strict=True)])
