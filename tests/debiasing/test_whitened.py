"""Directions in the metric of a Kronecker estimate, against a dense transcription of every step."""

from collections.abc import Iterator

import pytest
import torch
from models import MODELS
from oracles import (
    averaged_over_null_blocks,
    dense_cross_fitted_kronecker,
    dense_folds,
    dense_ggn,
    dense_kronecker_basis,
    eigenpairs_above,
    mean_of,
    non_increasing,
)
from sub_batches import rows_of, small_network
from torch import Tensor, nn

from debiased_laplace.curvature.contexts import differentiable_kernels
from debiased_laplace.curvature.roots import MonteCarloGaussNewton
from debiased_laplace.debiasing.estimate import estimate
from debiased_laplace.debiasing.options import EstimatorOptions
from debiased_laplace.debiasing.split_curvature import CurvatureEstimate, SplitCurvature
from debiased_laplace.debiasing.whitened import FLOOR

ORDER = torch.randperm(40, generator=torch.Generator().manual_seed(6))
N_DATA = 70
WEIGHT, PRIOR = N_DATA / (0.6**2 * 1.3), 0.37


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with differentiable_kernels(nn.LSTM(1, 1)):
        yield


def options(**chosen: object) -> EstimatorOptions:
    usual = {"rank": None, "magnitudes": "cross_fitted", "solver": "auto", "seed": 0}
    return EstimatorOptions(**{**usual, "complement": "kron", "metric": "kron", **chosen})


def dealt(n: int, n_folds: int) -> Tensor:
    return (torch.arange(n) % n_folds)[torch.randperm(n, generator=torch.Generator().manual_seed(2))]


def close(found: Tensor, expected: Tensor, rtol: float) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= rtol * float(expected.abs().max())


def dense_curvature(found: CurvatureEstimate) -> Tensor:
    """Without prior and N, whatever the parts are."""
    return (found.curvature.precision(WEIGHT, torch.tensor(PRIOR).double()).to_dense() - PRIOR * eye(found)) / WEIGHT


def eye(found: CurvatureEstimate) -> Tensor:
    return torch.eye(found.curvature.directions.shape[0], dtype=torch.float64)


def expected(
    name: str, likelihood: str, a: Tensor, b: Tensor | None, folds: Tensor | None, rank: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Curvature (P, P), magnitudes along unit directions and these directions, by dense matrices only."""
    model, X = MODELS[name]()
    per_sample = [H.detach() for H in dense_ggn(model, X, likelihood)[0]]
    H_a, f = mean_of(per_sample, a), len(a) / N_DATA
    K = dense_kronecker_basis(model, H_a)
    own = torch.diagonal(K.T @ H_a @ K)
    if folds is not None:
        d = dense_cross_fitted_kronecker(
            per_sample, a, folds, n_data=N_DATA,
            basis_of=lambda positions: dense_kronecker_basis(model, mean_of(per_sample, positions)),
            averaged=lambda H, values: averaged_over_null_blocks(model, H, values),
        )[0]  # fmt: skip
    elif b is not None:
        d = f * own + (1 - f) * torch.diagonal(K.T @ mean_of(per_sample, b) @ K)
    else:
        d = own
    S = d + FLOOR * d.mean()
    T = K @ torch.diag(S.rsqrt())
    white = T.T @ H_a @ T
    in_sample, U = eigenpairs_above(white, 1e-6 if rank is None else 1e-10, rank)
    outside = torch.eye(len(S), dtype=S.dtype) - U @ U.T
    residual = torch.diagonal(outside @ white @ outside)
    m = in_sample
    if folds is not None:
        found = dense_folds(
            per_sample, a, folds, len(m), threshold=1e-6 if rank is None else 1e-10,
            whitening_of=lambda H: dense_kronecker_basis(model, H) @ torch.diag(S.rsqrt()),
        )  # fmt: skip
        m = f * in_sample + (1 - f) * non_increasing(found.values)
        residual = f * residual + (1 - f) * found.residual
    elif b is not None:
        H_b = T.T @ mean_of(per_sample, b) @ T
        m = f * in_sample + (1 - f) * torch.diagonal(U.T @ H_b @ U)
        residual = f * residual + (1 - f) * torch.diagonal(outside @ H_b @ outside)
    back = torch.linalg.inv(T)
    curvature = back.T @ (U @ torch.diag(m) @ U.T + torch.diag(residual)) @ back
    directions = T @ U
    lengths = torch.linalg.vector_norm(directions, dim=0)
    return curvature, m / lengths**2, directions / lengths


# model, likelihood, samples, folds (0: other samples for the magnitudes, None: the same), rank, route
CASES = {
    "cross-fitted, every direction": ("MLP", "classification", 23, 5, None, "gram"),
    "cross-fitted, few directions": ("LayerNorm and raw parameters", "regression", 17, 4, 6, "gram"),
    "cross-fitted, convolutions": ("convolutions and pooling", "classification", 20, 4, None, "gram"),
    "cross-fitted, more rows than parameters": ("partly frozen", "classification", 31, 4, 9, "dense"),
    "held out": ("MLP", "classification", 23, 0, None, "gram"),
    "held out, more rows than parameters": ("partly frozen", "regression", 26, 0, 8, "dense"),
    "same batch": ("MLP", "regression", 19, None, 12, "gram"),
}


@pytest.mark.parametrize("case", CASES)
def test_against_dense_matrices(case: str) -> None:
    name, likelihood, n, n_folds, rank, route = CASES[case]
    network, X, y = small_network(name, likelihood)
    a, rest = ORDER[:n].sort().values, ORDER[n:].sort().values
    folds, b = dealt(n, n_folds) if n_folds else None, rest if n_folds == 0 else None
    split = SplitCurvature(rows_of(network, X, y, a), None if b is None else rows_of(network, X, y, b), folds, N_DATA)
    magnitudes = "same_batch" if n_folds is None else "cross_fitted" if folds is not None else "held_out"
    found = estimate(split, options(rank=rank, magnitudes=magnitudes))
    assert found.outcome.solver == route
    curvature, m, directions = expected(name, likelihood, a, b, folds, rank)
    close(dense_curvature(found), curvature, 1e-7)
    close(found.magnitudes.values, m, 1e-6)
    basis = found.curvature.basis
    assert basis is not None
    ours = basis.vectors(found.curvature.directions.T).T
    close((ours * directions).sum(0).abs(), torch.ones(len(m), dtype=torch.float64), 1e-6)


def test_products_and_rows_agree() -> None:
    network, X, y = small_network("MLP")
    folds = dealt(20, 2)
    both = [
        estimate(
            SplitCurvature(rows_of(network, X, y, ORDER[:20].sort().values, batch_size=40), None, folds, N_DATA),
            options(rank=4, solver=solver),
        )
        for solver in ("gram", "lanczos")
    ]
    assert [one.outcome.solver for one in both] == ["gram", "lanczos"]
    close(dense_curvature(both[1]), dense_curvature(both[0]), 1e-5)


def test_magnitudes_and_errors_are_those_of_unit_directions() -> None:
    """Return the curvature of each held-out sample along a direction, in the original coordinates."""
    network, X, y = small_network("MLP")
    a, b = ORDER[:20].sort().values, ORDER[20:].sort().values
    found = estimate(
        SplitCurvature(rows_of(network, X, y, a), rows_of(network, X, y, b), None, N_DATA),
        options(rank=5, magnitudes="held_out"),
    )
    basis = found.curvature.basis
    assert basis is not None
    U = basis.vectors(found.curvature.directions.T).T
    per_sample = [H.detach() for H in dense_ggn(MODELS["MLP"]()[0], X, "classification")[0]]
    values = torch.stack([(U * (per_sample[j] @ U)).sum(0) for j in b.tolist()])
    f = len(a) / N_DATA
    errors = (1 - f) * ((1 - len(b) / (N_DATA - len(a))) / len(b)) ** 0.5 * values.std(0, correction=1)
    in_sample = (U * (mean_of(per_sample, a) @ U)).sum(0)
    close(found.magnitudes.values, f * in_sample + (1 - f) * values.mean(0), 1e-7)
    close(found.magnitudes.in_sample, in_sample, 1e-7)
    close(found.magnitudes.standard_errors, errors, 1e-7)


def test_all_the_data_give_the_full_batch_s_diagonal_and_directions_at_every_rank() -> None:
    network, X, y = small_network("MLP")
    H = mean_of([H.detach() for H in dense_ggn(MODELS["MLP"]()[0], X, "classification")[0]], torch.arange(40))
    split = SplitCurvature(rows_of(network, X, y), None, dealt(40, 5), 40)
    full = estimate(split, options())
    close(dense_curvature(full), H, 1e-5)  # except for directions below a millionth
    few = estimate(split, options(rank=3))
    # projected, so that the whitened trace is preserved
    for found in (full, few):
        assert found.curvature.metric is not None
        white = found.curvature.basis.to_dense().T @ dense_curvature(found) @ found.curvature.basis.to_dense()
        kept = float((torch.diagonal(white) / found.curvature.metric).sum())
        rotated = found.curvature.basis.to_dense().T @ H @ found.curvature.basis.to_dense()
        assert kept == pytest.approx(float((torch.diagonal(rotated) / found.curvature.metric).sum()), rel=1e-7)


def test_drawn_targets_are_drawn_again_for_the_share_of_the_samples() -> None:
    network, X, y = small_network("MLP")

    def batch() -> object:
        return rows_of(network, X, y, root=lambda likelihood: MonteCarloGaussNewton(likelihood, 2))

    split = SplitCurvature(batch(), None, dealt(40, 5), N_DATA)
    found = estimate(split, options(rank=6))
    in_sample = found.magnitudes.in_sample
    assert bool((found.magnitudes.standard_errors > 0).all())
    # the directions were computed from the samples' own draws, so their share needs fresh ones
    biased = estimate(SplitCurvature(batch(), None, None, N_DATA), options(rank=6, magnitudes="same_batch"))
    assert float(in_sample.sum()) == pytest.approx(float(biased.magnitudes.in_sample.sum()), rel=0.5)
    assert float(found.magnitudes.values.sum()) < float(in_sample.sum())
