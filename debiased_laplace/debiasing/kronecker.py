"""Curvature of the Kronecker posterior: an eigenbasis from some samples, the curvature along it from others."""

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
from debiased_laplace.curvature.row_curvature import UNUSED, RowCurvature
from debiased_laplace.curvature.sub_batch import DirectionalMoments, SubBatchCurvature
from debiased_laplace.debiasing.complement import LowRankCurvature
from debiased_laplace.debiasing.cross_fitting import Fold, each_fold, pooled
from debiased_laplace.debiasing.magnitudes import Magnitudes, cross_fitted, floored, held_out, of_drawn_rows, same_batch
from debiased_laplace.debiasing.options import EstimatorOptions
from debiased_laplace.debiasing.split_curvature import CurvatureEstimate, SplitCurvature
from debiased_laplace.linalg.eigenpairs import SolverOutcome
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis


def estimate_kronecker(split: SplitCurvature, options: EstimatorOptions) -> CurvatureEstimate:
    """Estimate an eigenbasis, then magnitudes along it: from other samples, from other folds, or from the same samples.

    Args:
        split: curvature of the direction and magnitude samples.
        options: of the basis, the magnitudes and K-FAC.

    Returns:
        The estimate, with the magnitudes as a diagonal in the basis.
    """
    a, b = split.directions, split.magnitudes
    keep_rows_for_factors(a, options)
    factors, source = factors_of(a, options)
    basis = kronecker_basis(factors, a.network.like.dtype)
    if options.kron_magnitudes == "exact":
        magnitudes = _exact(split, factors, basis, options)
    else:
        magnitudes = _from_factors(split, factors, basis, options)
    like = a.network.like
    magnitudes = magnitudes.to(like.dtype)
    curvature = LowRankCurvature(magnitudes.values, like.new_zeros(len(like), 0), like.new_zeros(0), basis)
    outcome = SolverOutcome("dense", True, 0, "all eigenvectors of every pair of Kronecker factors")
    return CurvatureEstimate(curvature, magnitudes, outcome, joined(source, (a if b is None else b).source))


def keep_rows_for_factors(curvature: SubBatchCurvature, options: EstimatorOptions) -> None:
    """Hold the rows in memory if the factors are computed from rows, which are needed again."""
    # rows of a last linear layer are never formed
    if isinstance(curvature, RowCurvature) and options.kron_basis == "row_matrices" and curvature.linear_layer is None:
        curvature.keep_rows()


def basis_from(curvature: SubBatchCurvature, options: EstimatorOptions) -> KroneckerBasis:
    """Return the Kronecker eigenbasis of a set of samples."""
    return kronecker_basis(factors_of(curvature, options)[0], curvature.network.like.dtype)


def basis_without(
    batch: SubBatchCurvature, factors: list[KroneckerFactors], fold: Fold, options: EstimatorOptions
) -> KroneckerBasis:
    """Return the Kronecker eigenbasis of all samples but a fold's, given the factors of all."""
    return kronecker_basis(factors_without(batch, factors, fold, options), batch.network.like.dtype)


def factors_without(
    batch: SubBatchCurvature, factors: list[KroneckerFactors], fold: Fold, options: EstimatorOptions
) -> list[KroneckerFactors]:
    """Return the factors of all samples but a fold's, given those of all."""
    if not isinstance(batch, RowCurvature) or options.kron_basis != "row_matrices":
        return factors_of(batch.part(fold.others), options)[0]
    # factors are sums over samples, and the fold has fewer samples than the others
    share = len(fold.held) / batch.n_samples
    held = factors_of(batch.part(fold.held), options)[0]
    dtype = batch.network.like.dtype
    return [whole.without(part, share, dtype) for whole, part in zip(factors, held, strict=True)]


def factors_of(curvature: SubBatchCurvature, options: EstimatorOptions) -> tuple[list[KroneckerFactors], str]:
    """Return the factors of every parameter, in order, and the engine or backend that computed them."""
    network = curvature.network
    selection, layers_only = network.selection, options.kron_basis == "kfac"
    shapes = matrix_shapes(selection, layers_only=layers_only, largest_side=network.largest_side)
    if not isinstance(curvature, RowCurvature):
        return partial_trace_factors(curvature.dense(), shapes), curvature.source
    if network.shard is not None:
        shapes = shapes[network.shard.numbers]
    if options.kron_basis == "row_matrices":
        return row_matrix_factors(curvature, shapes), curvature.source
    by_name, source = _kfac(curvature, options)
    if set(selection.names) <= set(by_name) and not any(e is not None for e in selection.entries):
        return [by_name[name] for name in selection.names], source
    # K-FAC does not cover the other parameters: they get the exact diagonal
    rest = row_matrix_factors(curvature, shapes)
    chosen = [
        by_name.get(name, other) if entries is None else other
        for name, other, entries in zip(selection.names, rest, selection.entries, strict=True)
    ]
    return chosen, joined(source, curvature.source)


def _kfac(curvature: RowCurvature, options: EstimatorOptions) -> tuple[dict[str, KroneckerFactors], str]:
    network = curvature.network
    # backends sum over samples without weights
    weighted = curvature.samples.weights is not None
    offered = network.backend is not None and network.backend.offers_kfac(curvature.root, options.kfac_approx)
    if network.backend is not None and offered and not weighted:
        pairs = network.backend.kfac(curvature.samples, curvature.n_samples)
        return {name: KroneckerFactors(left, right) for name, (left, right) in pairs.items()}, network.backend.name
    sums = KfacSums(network, curvature.root, options.kfac_approx)
    for batch, targets_or_noise in curvature.batches():
        sums.add(batch, targets_or_noise)
    return sums.factors(), "torch.func rows"


def joined(*sources: str) -> str:
    """Join the names of engines and backends, each once."""
    names = {name for source in sources for name in source.split(" and ")}
    return " and ".join(sorted(names - {UNUSED}))


def _exact(
    split: SplitCurvature, factors: list[KroneckerFactors], basis: KroneckerBasis, options: EstimatorOptions
) -> Magnitudes:
    a, b, n_data = split.directions, split.magnitudes, split.n_data
    has_others = b is not None or split.effective_folds is not None
    if has_others and split.known_factors is not None:
        in_sample, known = a.coordinate_means(basis, [torch.ones_like(split.known_factors), split.known_factors])
        others = b.coordinate_moments(basis) if b is not None else _folds_along_others(split, factors, options)
        return of_drawn_rows(in_sample, known, others, decreasing=False)
    own = a.coordinate_moments(basis)
    in_sample = own.means
    if not has_others:
        drawn = a.draw is not None
        return same_batch(in_sample, own, n_data=n_data, drawn=a.is_random or drawn)
    redrawn = a.redrawn().coordinate_moments(basis) if a.is_random else None
    if b is not None:
        return held_out(in_sample, b.coordinate_moments(basis), n_a=a.n_samples, n_data=n_data, a_redrawn=redrawn)
    moments = _folds_along_others(split, factors, options)
    return cross_fitted(in_sample, moments, n_data=n_data, redrawn=redrawn, decreasing=False)


def _folds_along_others(
    split: SplitCurvature, factors: list[KroneckerFactors], options: EstimatorOptions
) -> DirectionalMoments:
    assert split.effective_folds is not None  # for the type checker
    batch = split.directions
    folds = each_fold(split.effective_folds, progress_bar=batch.progress_bar)
    return pooled(_fold_along_others(batch, split.rest or batch, factors, fold, options) for fold in folds)


def _fold_along_others(
    batch: SubBatchCurvature,
    measured: SubBatchCurvature,
    factors: list[KroneckerFactors],
    fold: Fold,
    options: EstimatorOptions,
) -> DirectionalMoments:
    """Measure a fold along the basis of the other folds; in the null space of their factors, use the average."""
    others = factors_without(batch, factors, fold, options)
    moments = measured.part(fold.held).coordinate_moments(kronecker_basis(others, batch.network.like.dtype))

    def averaged(values: Tensor) -> Tensor:
        blocks = values.split([len(f.left) * len(f.right) for f in others])
        return torch.cat([f.averaged_over_null(block) for f, block in zip(others, blocks, strict=True)])

    return moments.mapped(averaged, lambda deviations: averaged(deviations.square()).sqrt())


def _from_factors(
    split: SplitCurvature, factors: list[KroneckerFactors], basis: KroneckerBasis, options: EstimatorOptions
) -> Magnitudes:
    """Return products of the factors' curvatures along the basis, which are unbiased factor by factor only."""
    a, b, f = split.directions, split.magnitudes, split.share
    in_sample = _diagonal(factors, basis)
    if b is None and split.effective_folds is None:
        return floored(in_sample, None, in_sample)
    # the basis depends on the draws that it was computed from
    share_of_a = _diagonal(factors_of(a.redrawn(), options)[0], basis) if a.is_random else in_sample
    if b is not None:
        return floored(f * share_of_a + (1 - f) * _diagonal(factors_of(b, options)[0], basis), None, in_sample)
    assert split.effective_folds is not None  # for the type checker
    c = torch.zeros_like(in_sample)
    for fold in each_fold(split.effective_folds, progress_bar=a.progress_bar):
        others = basis_from(a.part(fold.others), options)
        held = factors_of(a.part(fold.held), options)[0]
        c += len(fold.held) / a.n_samples * _diagonal(held, others)
    return floored(f * share_of_a + (1 - f) * c, None, in_sample)


def _diagonal(factors: list[KroneckerFactors], basis: KroneckerBasis) -> Tensor:
    return torch.cat([f.diagonal_in(block) for f, block in zip(factors, basis.blocks, strict=True)])
