"""Cross-fitting by every route, against a transcription with explicit eigenvectors of the other folds."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from models import MODELS
from oracles import (
    averaged_over_null_blocks,
    dense_cross_fitted_kronecker,
    dense_cross_fitted_posterior,
    dense_empirical_fisher,
    dense_folds,
    dense_ggn,
    dense_hessian,
    dense_kronecker_basis,
    dense_kronecker_values,
    eigenpairs_above,
    fold_sets,
    mean_of,
    non_increasing,
)
from sub_batches import network_of, rows_of, samples_of, small_network
from torch import Tensor, nn

from debiased_laplace.curvature.contexts import differentiable_kernels
from debiased_laplace.curvature.hessian_curvature import HessianCurvature
from debiased_laplace.curvature.roots import EmpiricalFisher, MonteCarloGaussNewton
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.curvature.sub_batch import DirectionalMoments, ResidualRequest, SubBatchCurvature
from debiased_laplace.data.batches import Batch
from debiased_laplace.debiasing.cross_fitting import Fold, cross_fitted_moments, each_fold, extended, pooled
from debiased_laplace.debiasing.directions import find_directions
from debiased_laplace.debiasing.estimate import estimate
from debiased_laplace.debiasing.kronecker import basis_from, basis_without, factors_of
from debiased_laplace.debiasing.options import EstimatorOptions
from debiased_laplace.debiasing.split_curvature import CurvatureEstimate, SplitCurvature
from debiased_laplace.linalg.eigenpairs import Eigenpairs, SolverOutcome
from debiased_laplace.linalg.kronecker_basis import KroneckerBasis
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal

ORDER = torch.randperm(40, generator=torch.Generator().manual_seed(5))
N_DATA = 70
N_HESSIANS = 14  # a dense one takes as many backward passes as there are parameters
HYPER = {"prior_precision": 0.37, "sigma_noise": 0.6, "temperature": 1.3}


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with differentiable_kernels(nn.LSTM(1, 1)):
        yield


def dealt(n: int, n_folds: int, seed: int = 0) -> Tensor:
    """Deal n samples into folds whose sizes differ by at most one."""
    return (torch.arange(n) % n_folds)[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]


def options(**chosen: object) -> EstimatorOptions:
    usual = {"rank": None, "magnitudes": "cross_fitted", "complement": "none", "solver": "auto", "seed": 0}
    return EstimatorOptions(**{**usual, **chosen})


def close(found: Tensor, expected: Tensor, rtol: float = 1e-8) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= rtol * float(expected.abs().max())


def dense_precision(found: CurvatureEstimate, n_data: int = N_DATA) -> Tensor:
    c, scale = found.curvature, n_data / (0.6**2 * 1.3)
    return LowRankPlusDiagonal(scale * c.diagonal + 0.37, c.directions, scale * c.weights, c.basis).to_dense()


@cache
def curvatures_of(kind: str, name: str, likelihood: str) -> list[Tensor]:
    network, X, y = small_network(name, likelihood)
    model = network.selection.model
    if kind == "GGN":
        return [H.detach() for H in dense_ggn(model, X, likelihood)[0]]
    if kind == "EF":
        return dense_empirical_fisher(model, X, y, likelihood)[0]
    return dense_hessian(model, X[:N_HESSIANS], y[:N_HESSIANS], likelihood)[0]


def batch_of(kind: str, name: str, likelihood: str, samples: Tensor, *, in_one: bool = False) -> SubBatchCurvature:
    network, X, y = small_network(name, likelihood)
    if kind == "Hessian":
        second = SecondDerivatives(network.selection, network.parameters, network.likelihood, Batch(X[:2], y[:2]))
        return HessianCurvature(network, samples_of(X, y, samples, 40 if in_one else 7), second)
    how = {"root": EmpiricalFisher} if kind == "EF" else {}
    # products are traced anew for every batch
    return rows_of(network, X, y, samples, batch_size=40 if in_one else 7, **how)


# kind, model, likelihood, samples, folds, rank, solver; and the route that they take
CASES = {
    "classification by rows": ("GGN", "MLP", "classification", 23, 5, None, "auto", "gram"),
    "classification by rows, few directions": ("GGN", "MLP", "classification", 23, 4, 7, "gram", "gram"),
    "every sample a fold": ("GGN", "MLP", "classification", 9, 9, None, "auto", "gram"),
    "two folds, which lack half of the directions": ("GGN", "MLP", "classification", 16, 2, None, "auto", "gram"),
    "regression by rows": ("GGN", "LayerNorm and raw parameters", "regression", 17, 4, None, "auto", "gram"),
    "more rows than parameters": ("GGN", "partly frozen", "regression", 26, 6, None, "auto", "dense"),
    "more rows than parameters, few directions": ("GGN", "partly frozen", "classification", 31, 4, 9, "auto", "dense"),
    "empirical Fisher": ("EF", "convolutions and pooling", "regression", 22, 5, None, "auto", "gram"),
    "empirical Fisher of a reused module": ("EF", "reused module", "classification", 40, 3, None, "auto", "dense"),
    "Hessian": ("Hessian", "MLP", "classification", 14, 3, 8, "gram", "dense"),
    "products only": ("GGN", "reused module", "classification", 24, 2, 5, "lanczos", "lanczos"),
    "products only, several outputs": ("GGN", "partly frozen", "regression", 20, 2, 6, "lanczos", "lanczos"),
    "products only, Hessian": ("Hessian", "MLP", "classification", 9, 2, 4, "lanczos", "lanczos"),
}
COMPLEMENTS = ["none", "isotropic", "diagonal", "kron"]
# products are slow, and the residual does not depend on them
WITH_COMPLEMENT = [(case, c) for case in CASES for c in COMPLEMENTS if "products" not in case or c == "none"]


@pytest.mark.parametrize(("case", "complement"), WITH_COMPLEMENT)
def test_against_the_eigenvectors_of_the_other_folds(case: str, complement: str) -> None:
    kind, name, likelihood, n, n_folds, rank, solver, route = CASES[case]
    per_sample = curvatures_of(kind, name, likelihood)
    samples, folds = torch.arange(n) if kind == "Hessian" else ORDER[:n].sort().values, dealt(n, n_folds)
    batch = batch_of(kind, name, likelihood, samples, in_one=route == "lanczos")
    split = SplitCurvature(batch, None, folds, N_DATA)
    found = estimate(split, options(rank=rank, solver=solver, complement=complement))
    assert found.outcome.solver == route
    model = MODELS[name]()[0]
    expected = dense_cross_fitted_posterior(
        per_sample, samples, folds, n_data=N_DATA, complement=complement, rank=rank,
        threshold=1e-6 if rank is None else 1e-10,
        basis_of=(lambda H: dense_kronecker_basis(model, H)) if complement == "kron" else None, **HYPER,
    )  # fmt: skip
    rtol = 1e-5 if route == "lanczos" else 1e-7  # a residual of 1e-8 is convergence, in directions 1e-8 over the gap
    close(found.magnitudes.values, expected.magnitudes, rtol)
    close(found.magnitudes.in_sample, expected.in_sample, rtol)
    close(found.magnitudes.standard_errors, expected.standard_errors, rtol)
    close(dense_precision(found), expected.posterior_precision, rtol)


# --- one route against another ---


def routes(
    batch: RowCurvature, k: int, folds: Tensor, requests: list[ResidualRequest]
) -> dict[str, list[DirectionalMoments]]:
    pairs = find_directions(batch, rank=k, solver="gram", seed=0)
    found = {}
    for solver in ("gram", "dense", "lanczos"):
        outcome = SolverOutcome(solver, True, 0, "chosen here")
        chosen = Eigenpairs(pairs.values, pairs.vectors, pairs.residuals, outcome)
        found[solver] = cross_fitted_moments(batch, folds, chosen, requests)
    return found


def test_the_routes_agree() -> None:
    samples = ORDER[:20].sort().values
    batch = batch_of("GGN", "convolutions and pooling", "classification", samples, in_one=True)
    requests = [ResidualRequest(6, residual, None, 1e-10) for residual in ("none", "trace", "diagonal")]
    found = routes(batch, 6, dealt(20, 3), requests)
    for request, expected in zip(requests, found["gram"], strict=True):
        assert expected.n_samples == 20
        for route in ("dense", "lanczos"):
            other = found[route][requests.index(request)]
            close(other.means, expected.means, 1e-5)
            close(other.standard_deviations, expected.standard_deviations, 1e-5)
            for part in ("trace", "residual_diagonal"):
                mine, theirs = getattr(other, part), getattr(expected, part)
                assert (mine is None) == (theirs is None) == (part.split("_")[-1] != request.residual)
                if theirs is not None:
                    close(mine, theirs, 1e-5)


def test_several_requests_at_once_give_the_same_as_each_alone() -> None:
    samples, folds = ORDER[:18].sort().values, dealt(18, 4)
    requests = [
        ResidualRequest(3, "none", None, 1e-10),
        ResidualRequest(9, "diagonal", KroneckerBasis(()), 1e-6),
        ResidualRequest(5, "diagonal", None, 1e-10),
        ResidualRequest(9, "trace", None, 0.3),
    ]
    for name, route in (("MLP", "gram"), ("partly frozen", "dense")):
        batch = batch_of("GGN", name, "regression", samples)
        pairs = find_directions(batch, rank=9, solver="gram", seed=0)
        assert pairs.outcome.solver == route

        def basis_of(fold: Fold, batch: SubBatchCurvature = batch) -> KroneckerBasis:
            return basis_from(batch.part(fold.others), options())

        together = cross_fitted_moments(batch, folds, pairs, requests, basis_of=basis_of)
        for request, found in zip(requests, together, strict=True):
            alone = cross_fitted_moments(batch, folds, pairs, [request], basis_of=basis_of)[0]
            assert len(found.means) == request.rank
            close(found.means, alone.means, 1e-12)
            close(found.standard_deviations, alone.standard_deviations, 1e-9)
            if request.residual == "diagonal":
                close(found.residual_diagonal, alone.residual_diagonal, 1e-12)
        # a higher threshold leaves fewer directions of the other folds, and the tail replaces the rest
        assert float((together[1].means - together[3].means).abs().max()) > 1e-3 * float(together[1].means[-1])


def test_folds_of_rows_kept_in_memory_or_not_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    folds = dealt(26, 5)
    samples = ORDER[:26].sort().values
    kept = estimate(
        SplitCurvature(batch_of("GGN", "partly frozen", "regression", samples), None, folds, N_DATA), options(rank=9)
    )
    monkeypatch.setattr(RowCurvature, "keep_rows", lambda _: None)
    formed_again = estimate(
        SplitCurvature(batch_of("GGN", "partly frozen", "regression", samples), None, folds, N_DATA), options(rank=9)
    )
    close(formed_again.magnitudes.values, kept.magnitudes.values)
    close(formed_again.magnitudes.standard_errors, kept.magnitudes.standard_errors)


def test_by_rows_every_row_is_computed_once() -> None:
    """Folds are sub-blocks of one Gram matrix and need no further network passes."""
    network, X, y = small_network("MLP")
    passes = {}
    for magnitudes, folds in (("same_batch", None), ("cross_fitted", dealt(20, 5))):
        batch = rows_of(network, X, y, ORDER[:20])
        computed = batch._rows_of
        count = passes[magnitudes] = []

        def counted(chosen: range | None, computed: Callable[..., list] = computed, count: list[int] = count) -> list:
            count.append(1)
            return computed(chosen)

        batch._rows_of = counted
        estimate(SplitCurvature(batch, None, folds, N_DATA), options(magnitudes=magnitudes))
    assert passes["cross_fitted"] == passes["same_batch"] == [1]


# --- what folds say, put together ---


def of_values(values: Tensor) -> DirectionalMoments:
    """Return the moments of per-sample values (n, k)."""
    spread = values.std(0, correction=1) if len(values) > 1 else torch.zeros_like(values[0])
    return DirectionalMoments(len(values), values.mean(0), spread, values.sum(), values.mean(0) ** 2)


SIZES = {"equal folds": [5, 5, 5], "unequal folds": [7, 2, 4], "a fold of one": [1, 6], "ones only": [1, 1, 1, 1]}


@pytest.mark.parametrize("case", SIZES)
def test_pooled_is_mean_and_spread_of_all_samples(case: str) -> None:
    sizes = SIZES[case]
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(sum(sizes), 4, dtype=torch.float64, generator=generator).exp()
    found = pooled([of_values(part) for part in values.split(sizes)])
    assert found.n_samples == sum(sizes)
    close(found.means, values.mean(0), 1e-12)
    close(found.standard_deviations, values.std(0, correction=1), 1e-12)
    weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    close(found.trace, sum(w * part.sum() for w, part in zip(weights, values.split(sizes), strict=True)), 1e-12)
    diagonal = sum(w * part.mean(0) ** 2 for w, part in zip(weights, values.split(sizes), strict=True))
    close(found.residual_diagonal, diagonal, 1e-12)


def test_pooled_of_folds_without_a_residual_has_none() -> None:
    found = pooled(
        [DirectionalMoments(3, torch.ones(2), torch.zeros(2)), DirectionalMoments(1, torch.zeros(2), torch.zeros(2))]
    )
    assert found.trace is None
    assert found.residual_diagonal is None
    torch.testing.assert_close(found.means, torch.full((2,), 0.75))


# given values, their required number, the missing values
TAILS = {
    "none missing": ([4.0, 2.0, 1.0], 3, None),
    "few known: the last one": ([4.0, 2.0, 1.0], 5, 1.0),
    "twenty known: the last one": ([float(v) for v in range(20, 0, -1)], 22, 1.0),
    "twenty-one known: the mean of the last two": ([float(v) for v in range(21, 0, -1)], 30, 1.5),
    "sixty known: the mean of the last three": ([float(v) for v in range(60, 0, -1)], 61, 2.0),
    "none known: nothing": ([], 3, 0.0),
}


@pytest.mark.parametrize("case", TAILS)
def test_missing_directions_take_the_mean_of_the_trailing_ones(case: str) -> None:
    known, k, missing = TAILS[case]
    values = torch.tensor(known, dtype=torch.float64)
    fold = DirectionalMoments(4, values, 3 * values, torch.tensor(7.0), torch.ones(2))
    found = extended(fold, k)
    assert torch.equal(found.means[: len(known)], values)
    assert found.means[len(known) :].tolist() == [missing] * (k - len(known))
    assert found.standard_deviations[len(known) :].tolist() == [3 * (missing or 0.0)] * (k - len(known))
    assert (found.n_samples, found.trace, found.residual_diagonal) == (4, fold.trace, fold.residual_diagonal)


def test_each_fold_is_held_once_against_all_others() -> None:
    folds = torch.tensor([2, 0, 1, 0, 2, 2, 1])
    found = list(each_fold(folds))
    assert [fold.held.tolist() for fold in found] == [[1, 3], [2, 6], [0, 4, 5]]
    assert [fold.others.tolist() for fold in found] == [[0, 2, 4, 5, 6], [0, 1, 3, 4, 5], [1, 2, 3, 6]]


# --- all directions, all data, no curvature, drawn targets ---


@pytest.mark.parametrize("name", ["MLP", "partly frozen"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_full_has_all_directions_and_one_average_curvature_in_the_null_space(name: str, likelihood: str) -> None:
    per_sample = curvatures_of("GGN", name, likelihood)
    samples, folds = ORDER[:24].sort().values, dealt(24, 5)
    split = SplitCurvature(batch_of("GGN", name, likelihood, samples), None, folds, N_DATA)
    found = estimate(split, options(structure="full"))
    expected = dense_cross_fitted_posterior(
        per_sample, samples, folds, n_data=N_DATA, complement="isotropic", threshold=1e-10, **HYPER
    )
    close(found.magnitudes.values, expected.magnitudes, 1e-6)
    close(dense_precision(found), expected.posterior_precision, 1e-6)


@pytest.mark.parametrize("complement", COMPLEMENTS)
def test_all_the_data_give_the_full_batch(complement: str) -> None:
    samples, folds = torch.arange(40), dealt(40, 8)
    for structure, also in (("lowrank", {"complement": complement}), ("full", {}), ("kron", {})):
        both = []
        for magnitudes, dealt_out in (("cross_fitted", folds), ("same_batch", None)):
            batch = batch_of("GGN", "MLP", "classification", samples)
            chosen = options(structure=structure, magnitudes=magnitudes, **also)
            both.append(estimate(SplitCurvature(batch, None, dealt_out, 40), chosen))
        found, same = both
        close(dense_precision(found, 40), dense_precision(same, 40), 1e-10)
        assert not found.magnitudes.standard_errors.any()
        close(found.magnitudes.values, found.magnitudes.in_sample, 1e-10)


@pytest.mark.parametrize(("complement", "solver"), [*((c, "gram") for c in COMPLEMENTS), ("diagonal", "lanczos")])
def test_zero_curvature(complement: str, solver: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    X, y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)).double(), torch.zeros(12, 1).double()
    batch = rows_of(network_of(model, X, y, "regression"), X, y, root=EmpiricalFisher)
    found = estimate(SplitCurvature(batch, None, dealt(12, 3), N_DATA), options(complement=complement, solver=solver))
    assert found.magnitudes.values.shape == (0,)
    assert not dense_precision(found).sub(0.37 * torch.eye(21, dtype=torch.float64)).any()


@pytest.mark.parametrize("held", ["in memory", "formed again"])
@pytest.mark.parametrize("name", ["MLP", "partly frozen"])
@pytest.mark.parametrize("complement", ["none", "isotropic", "diagonal"])
def test_monte_carlo_has_fresh_draws_for_the_share_of_all_samples(
    complement: str, name: str, held: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, X, y = small_network(name)
    samples, folds = ORDER[:20].sort().values, dealt(20, 4)
    if held == "formed again":
        monkeypatch.setattr(RowCurvature, "keep_rows", lambda _: None)
    batch = rows_of(network, X, y, samples, lambda kind: MonteCarloGaussNewton(kind, 5 if name != "MLP" else 2), seed=6)
    again = batch.redrawn()
    drawn = [[rows.T @ rows for rows in torch.cat(list(c.rows()))] for c in (batch, again)]
    found = estimate(SplitCurvature(batch, None, folds, N_DATA), options(rank=6, complement=complement))
    assert found.outcome.solver == ("gram" if name == "MLP" else "dense")
    f, positions = 20 / N_DATA, torch.arange(20)
    H, H_again = (mean_of(curvature, positions) for curvature in drawn)
    assert float((H - H_again).abs().max()) > 0.05 * float(H.abs().max())
    folded = dense_folds(drawn[0], positions, folds, 6, threshold=1e-10)
    _, U = eigenpairs_above(H, 1e-10, 6)
    m = f * torch.diagonal(U.T @ H_again @ U) + (1 - f) * non_increasing(folded.values)
    close(found.magnitudes.values, m, 1e-7)
    close(found.magnitudes.standard_errors, folded.deviations / 20**0.5, 1e-7)
    outside = torch.eye(len(H), dtype=H.dtype) - U @ U.T
    if complement == "diagonal":
        own = torch.diagonal(outside @ H_again @ outside)
        close(found.curvature.diagonal, f * own + (1 - f) * folded.residual, 1e-7)
    if complement == "isotropic":
        left = f * torch.trace(H_again) + (1 - f) * torch.trace(H) - m.sum()
        assert float(found.curvature.diagonal) == pytest.approx(float(left) / (len(H) - 6), rel=1e-8)


# --- Kronecker ---


@pytest.mark.parametrize("kron_basis", ["row_matrices", "kfac"])
@pytest.mark.parametrize("name", ["MLP", "convolutions and pooling", "LayerNorm and raw parameters", "partly frozen"])
def test_kronecker_matches_pairs_of_indices_and_averages_over_null_blocks(name: str, kron_basis: str) -> None:
    per_sample = curvatures_of("GGN", name, "classification")
    model = MODELS[name]()[0]
    n, n_folds = (4, 2) if kron_basis == "row_matrices" else (22, 4)  # few samples leave null blocks of several vectors
    samples, folds = ORDER[:n].sort().values, dealt(n, n_folds)
    batch = batch_of("GGN", name, "classification", samples)
    chosen = options(structure="kron", kron_basis=kron_basis)
    found = estimate(SplitCurvature(batch, None, folds, N_DATA), chosen)

    def basis_of(positions: Tensor) -> Tensor:
        # null vectors are arbitrary, and so are single samples' variances along them: use the very same vectors
        if len(positions) == n:
            return basis_from(batch, chosen).to_dense()
        others = torch.searchsorted(samples, positions)
        held = torch.arange(n)[~torch.isin(torch.arange(n), others)]
        return basis_without(batch, factors_of(batch, chosen)[0], Fold(0, held, others), chosen).to_dense()

    def averaged(H: Tensor, values: Tensor) -> Tensor:
        return averaged_over_null_blocks(model, H, values) if kron_basis == "row_matrices" else values

    magnitudes, errors, own = dense_cross_fitted_kronecker(
        per_sample, samples, folds, n_data=N_DATA, basis_of=basis_of, averaged=averaged
    )
    close(found.magnitudes.values, magnitudes)
    close(found.magnitudes.standard_errors, errors, 1e-6)
    close(found.magnitudes.in_sample, own)
    # the trace is preserved: the basis spans the whole space, and averages preserve sums
    expected = torch.trace(mean_of(per_sample, samples))
    assert float(found.magnitudes.values.sum()) == pytest.approx(float(expected), rel=1e-9)
    if kron_basis == "row_matrices":
        plain = dense_cross_fitted_kronecker(
            per_sample, samples, folds, n_data=N_DATA, basis_of=basis_of, averaged=lambda _, values: values
        )[0]
        assert float((plain - magnitudes).abs().max()) > 1e-4 * float(magnitudes.max())


def test_each_fold_has_its_own_basis() -> None:
    """Compare with bases computed by the oracle, for simple eigenvalues."""
    model = MODELS["MLP"]()[0]
    per_sample = curvatures_of("GGN", "MLP", "classification")
    samples, folds = ORDER[:24].sort().values, dealt(24, 4)
    batch = batch_of("GGN", "MLP", "classification", samples)
    f = 24 / N_DATA

    def basis_of(positions: Tensor) -> Tensor:
        return dense_kronecker_basis(model, mean_of(per_sample, positions))

    exact = estimate(SplitCurvature(batch, None, folds, N_DATA), options(structure="kron"))
    magnitudes, errors, _ = dense_cross_fitted_kronecker(
        per_sample, samples, folds, n_data=N_DATA, basis_of=basis_of, averaged=lambda _, values: values
    )
    close(exact.magnitudes.values, magnitudes, 1e-7)
    close(exact.magnitudes.standard_errors, errors, 1e-6)

    products = estimate(
        SplitCurvature(batch, None, folds, N_DATA), options(structure="kron", kron_magnitudes="kronecker")
    )
    c = torch.zeros(93, dtype=torch.float64)
    for held, others in fold_sets(samples, folds):
        c += len(held) / 24 * dense_kronecker_values(model, mean_of(per_sample, held), basis_of(others))
    own = dense_kronecker_values(model, mean_of(per_sample, samples), basis_of(samples))
    close(products.magnitudes.values, f * own + (1 - f) * c, 1e-7)
    close(products.magnitudes.in_sample, own, 1e-7)
    assert products.magnitudes.standard_errors is None


@pytest.mark.parametrize("kron_magnitudes", ["exact", "kronecker"])
@pytest.mark.parametrize("kron_basis", ["row_matrices", "kfac"])
def test_draws_of_a_kronecker_posterior_are_never_used_twice(kron_basis: str, kron_magnitudes: str) -> None:
    network, X, y = small_network("MLP")
    samples, folds = ORDER[:20].sort().values, dealt(20, 4)
    batch = rows_of(network, X, y, samples, lambda kind: MonteCarloGaussNewton(kind, 2), seed=6)
    chosen = options(structure="kron", kron_basis=kron_basis, kron_magnitudes=kron_magnitudes)
    found = estimate(SplitCurvature(batch, None, folds, N_DATA), chosen)
    again, f = batch.redrawn(), 20 / N_DATA
    basis = basis_from(batch, chosen)
    c = torch.zeros(93, dtype=torch.float64)
    for fold in each_fold(folds):
        of_others = basis_from(batch.part(fold.others), chosen)
        held = batch.part(fold.held)
        c += len(fold.held) / 20 * along(held, of_others, chosen)
    # rows of all samples, whose draws the parts must have
    rows = torch.cat(list(batch.rows()))
    torch.testing.assert_close(torch.cat(list(batch.part(torch.tensor([3, 7])).rows())), rows[[3, 7]])
    close(found.magnitudes.values, f * along(again, basis, chosen) + (1 - f) * c, 1e-8)


def along(curvature: RowCurvature, basis: KroneckerBasis, chosen: EstimatorOptions) -> Tensor:
    if chosen.kron_magnitudes == "exact":
        return curvature.coordinate_moments(basis).means
    factors = factors_of(curvature, chosen)[0]
    return torch.cat([f.diagonal_in(block) for f, block in zip(factors, basis.blocks, strict=True)])
