"""The estimator for full and low-rank structures, and for drawn or indefinite curvatures."""

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from models import MODELS
from oracles import (
    dense_empirical_fisher,
    dense_ggn,
    dense_hessian,
    dense_low_rank_posterior,
    dense_posterior_precision,
    mean_of,
)
from sub_batches import network_of, rows_of, samples_of, small_network, two_sets
from torch import Tensor, nn

from debiased_laplace.curvature.contexts import differentiable_kernels
from debiased_laplace.curvature.hessian_curvature import HessianCurvature
from debiased_laplace.curvature.roots import EmpiricalFisher, MonteCarloGaussNewton
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.data.batches import Batch
from debiased_laplace.debiasing.directions import REQUESTED
from debiased_laplace.debiasing.estimate import estimate, estimate_variants
from debiased_laplace.debiasing.options import EstimatorOptions
from debiased_laplace.debiasing.split_curvature import CurvatureEstimate, SplitCurvature
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal

ORDER = torch.randperm(40, generator=torch.Generator().manual_seed(2))
A, B = ORDER[:11], ORDER[11:24]
N_DATA = 70
HYPER = {"n_data": N_DATA, "prior_precision": 0.37, "sigma_noise": 0.6, "temperature": 1.3}
LIKELIHOODS = ["classification", "regression"]
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with differentiable_kernels(nn.LSTM(1, 1)):
        yield


@cache
def oracle(name: str, likelihood: str) -> list[Tensor]:
    model, X = MODELS[name]()
    return dense_ggn(model, X, likelihood)[0]


def options(**chosen: object) -> EstimatorOptions:
    held_out = {"rank": None, "magnitudes": "held_out", "complement": "none", "solver": "auto", "seed": 0}
    return EstimatorOptions(**{**held_out, **chosen})


def close(found: Tensor, expected: Tensor, rtol: float = 1e-8) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= rtol * float(expected.abs().max())


def dense_precision(found: CurvatureEstimate, n_data: int = N_DATA) -> Tensor:
    c, scale = found.curvature, n_data / (0.6**2 * 1.3)
    return LowRankPlusDiagonal(scale * c.diagonal + 0.37, c.directions, scale * c.weights, c.basis).to_dense()


# --- all directions ---


@every_model
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_full_has_all_directions_and_one_average_curvature_in_the_null_space(name: str, likelihood: str) -> None:
    network, X, y = small_network(name, likelihood)
    per_sample = oracle(name, likelihood)
    found = estimate(two_sets(rows_of(network, X, y, A), rows_of(network, X, y, B), N_DATA), options(structure="full"))
    expected = dense_low_rank_posterior(
        network.selection.model, X, likelihood, A, B, complement="isotropic", threshold=REQUESTED,
        per_sample=per_sample, **HYPER,
    )  # fmt: skip
    close(dense_precision(found), expected.posterior_precision)
    close(found.magnitudes.values, expected.magnitudes)
    close(found.magnitudes.in_sample, expected.in_sample)
    close(found.magnitudes.standard_errors, expected.standard_errors, 1e-6)
    f = len(A) / N_DATA
    H = f * mean_of(per_sample, A) + (1 - f) * mean_of(per_sample, B)
    c, P = found.curvature, len(H)
    total = P * c.diagonal + c.weights.sum()
    assert float(total) == pytest.approx(float(torch.trace(H)), rel=1e-9)
    k = len(found.magnitudes.values)
    if k < P:  # the null space of H_a is not that of H_b
        U = c.directions
        left = torch.trace(H) - (U * (H @ U)).sum()
        assert float(c.diagonal) == pytest.approx(float(left) / (P - k), rel=1e-7)
        assert float(c.diagonal) > 1e-6 * float(torch.trace(H)) / P


def test_full_includes_smaller_eigenvalues_than_rank_none() -> None:
    network, X, y = small_network("MLP", "regression")
    a, b = rows_of(network, X, y, ORDER[:36]), rows_of(network, X, y, ORDER[36:])
    ranks = {s: len(estimate(two_sets(a, b, 40), options(structure=s)).magnitudes.values) for s in ("full", "lowrank")}
    values = torch.linalg.eigvalsh(mean_of(oracle("MLP", "regression"), ORDER[:36]))
    assert ranks["full"] == int((values > 1e-10 * values[-1]).sum())
    assert ranks["lowrank"] == int((values > 1e-6 * values[-1]).sum()) < ranks["full"]


@every_model
def test_full_on_all_the_data_is_the_full_batch(name: str) -> None:
    network, X, y = small_network(name)
    H = mean_of(oracle(name, "classification"), torch.arange(40))
    expected = dense_posterior_precision(H, n_data=40, prior_precision=0.37, sigma_noise=0.6, temperature=1.3)
    whole = estimate(two_sets(rows_of(network, X, y), None, 40), options(structure="full", magnitudes="same_batch"))
    close(dense_precision(whole, 40), expected)
    assert not whole.magnitudes.standard_errors.any()


def test_full_on_a_split_of_all_the_data_has_its_trace() -> None:
    network, X, y = small_network("MLP")
    H = mean_of(oracle("MLP", "classification"), torch.arange(40))
    a, b = rows_of(network, X, y, ORDER[:15]), rows_of(network, X, y, ORDER[15:])
    found = estimate(two_sets(a, b, 40), options(structure="full"))
    U = found.curvature.directions
    close(found.magnitudes.values, (U * (H @ U)).sum(0))
    assert float(torch.trace(dense_precision(found, 40))) == pytest.approx(
        40 / (0.6**2 * 1.3) * float(torch.trace(H)) + 93 * 0.37, rel=1e-9
    )
    assert not found.magnitudes.standard_errors.any()


# --- low rank, of every root ---


@pytest.mark.parametrize("complement", ["none", "isotropic", "diagonal"])
@pytest.mark.parametrize("magnitudes", ["held_out", "same_batch"])
@pytest.mark.parametrize("root", ["GGN", "EF"])
def test_low_rank(complement: str, magnitudes: str, root: str) -> None:
    network, X, y = small_network("convolutions and pooling", "regression")
    model = network.selection.model
    if root == "GGN":
        per_sample, how = oracle("convolutions and pooling", "regression"), {}
    else:
        per_sample, how = dense_empirical_fisher(model, X, y, "regression")[0], {"root": EmpiricalFisher}
    biased = magnitudes == "same_batch"
    a = rows_of(network, X, y, torch.cat([A, B]).sort().values if biased else A, **how)
    b = None if biased else rows_of(network, X, y, B, **how)
    found = estimate(two_sets(a, b, N_DATA), options(rank=4, complement=complement, magnitudes=magnitudes))
    expected = dense_low_rank_posterior(
        model, X, "regression", A, B, rank=4, complement=complement, magnitudes=magnitudes,
        per_sample=per_sample, **HYPER,
    )  # fmt: skip
    close(dense_precision(found), expected.posterior_precision)
    close(found.magnitudes.values, expected.magnitudes)
    close(found.magnitudes.in_sample, expected.in_sample)
    close(found.magnitudes.standard_errors, expected.standard_errors, 1e-6)
    # for few directions alone, products are cheaper than rows
    assert found.source == ("torch.func products" if complement == "none" and not biased else "torch.func rows")


# --- an indefinite curvature ---


def hessians(indices: tuple[Tensor, Tensor]) -> tuple[list[HessianCurvature], list[Tensor]]:
    network, X, y = small_network("MLP")
    derivatives = SecondDerivatives(network.selection, network.parameters, network.likelihood, Batch(X[:2], y[:2]))
    used = int(torch.cat(indices).max()) + 1
    per_sample = dense_hessian(network.selection.model, X[:used], y[:used], "classification")[0]
    return [HessianCurvature(network, samples_of(X, y, i), derivatives) for i in indices], per_sample


@pytest.mark.parametrize("structure", ["lowrank", "full"])
def test_negative_magnitudes_of_a_hessian_are_floored_and_counted(structure: str) -> None:
    first, second = torch.arange(4), torch.arange(4, 7)
    (a, b), per_sample = hessians((first, second))
    f = 4 / N_DATA
    H_a = mean_of(per_sample, first)
    H = f * H_a + (1 - f) * mean_of(per_sample, second)
    found = estimate(two_sets(a, b, N_DATA), options(structure=structure))
    U, threshold = found.curvature.directions, 1e-10 if structure == "full" else 1e-6
    eigenvalues = torch.linalg.eigvalsh(H_a).flip(0)
    # leading means algebraically largest: no directions of negative curvature
    k = int((eigenvalues > threshold * eigenvalues[0]).sum())
    assert U.shape == (93, k)
    assert k < int((eigenvalues.abs() > 1e-8 * eigenvalues[0]).sum())
    close(found.magnitudes.in_sample, eigenvalues[:k])
    along = (U * (H @ U)).sum(0)
    close(found.magnitudes.values, along.clamp_min(0))
    assert found.magnitudes.n_floored == int((along < 0).sum()) > 0
    assert bool((torch.linalg.eigvalsh(dense_precision(found)) > 0.36).all())
    if structure == "full":
        left = (torch.trace(H) - along.clamp_min(0).sum()).clamp_min(0)
        assert float(found.curvature.diagonal) == pytest.approx(float(left) / (93 - k), rel=1e-8)


# --- Monte Carlo ---

DRAWS = 100


class Drawn:
    """Return estimates with one drawn target per sample along their own directions, and the truth there."""

    def __init__(self, magnitudes: str, first: Tensor, second: Tensor, n_data: int):
        with torch.random.fork_rng():
            torch.manual_seed(4)
            model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
            X = torch.randn(14, 3).double()
        y = torch.randint(3, (14,), generator=torch.Generator().manual_seed(1))
        network = network_of(model, X, y, "classification")
        per_sample = dense_ggn(model, X, "classification")[0]
        f = len(first) / n_data if len(second) else 1.0
        H = mean_of(per_sample, first) * f
        if len(second):
            H = H + (1 - f) * mean_of(per_sample, second)

        def drawn(part: Tensor, seed: int) -> RowCurvature:
            curvature = rows_of(network, X, y, part, lambda kind: MonteCarloGaussNewton(kind, 1), seed, 14)
            curvature.stacked_rows()
            return curvature

        errors, without, stated = [], [], []
        for seed in range(DRAWS):
            b = drawn(second, seed + 1000) if len(second) else None
            found = estimate(two_sets(drawn(first, 2 * seed), b, n_data), options(rank=3, magnitudes=magnitudes))
            U = found.curvature.directions
            truth = (U * (H @ U)).sum(0)
            errors.append(found.magnitudes.values - truth)
            of_b = 0.0 if b is None else b.moments(U).means
            without.append(f * found.magnitudes.in_sample + (1 - f) * of_b - truth)
            stated.append(found.magnitudes.standard_errors)
        self.errors, self.without, self.stated = torch.stack(errors), torch.stack(without), torch.stack(stated)


def z_scores(errors: Tensor) -> Tensor:
    return errors.mean(0) / (errors.std(0) / len(errors) ** 0.5)


SPLITS = {
    "some of the data": (torch.arange(6), torch.arange(6, 14), 25),
    "all the data": (torch.arange(6), torch.arange(6, 14), 14),
}


@pytest.mark.parametrize("case", SPLITS)
def test_monte_carlo_magnitudes_are_right_on_average_with_the_share_of_the_direction_samples(case: str) -> None:
    drawn = Drawn("held_out", *SPLITS[case])
    assert float(z_scores(drawn.errors).abs().max()) < 4
    # power: with the draws that the directions were computed from, it would fail
    assert float(z_scores(drawn.without)[0]) > 5
    ratio = drawn.stated.square().mean(0).sqrt() / drawn.errors.std(0)
    # drawn curvatures are never exact: no error is 0 or below the noise of the draws
    assert bool((drawn.stated > 0).all())
    assert bool((ratio > 0.85).all())
    assert bool((ratio < 2.5).all())


def test_monte_carlo_of_the_same_batch_is_biased_even_on_all_the_data() -> None:
    drawn = Drawn("same_batch", torch.arange(14), torch.arange(0), 14)
    assert float(z_scores(drawn.errors)[0]) > 6
    assert bool((drawn.stated > 0).all())


@pytest.mark.parametrize("complement", ["none", "isotropic", "diagonal"])
def test_monte_carlo_estimates_are_made_of_three_sets_of_draws(complement: str) -> None:
    """Exact partner of the statistical tests: draws for directions, fresh ones of the same samples, and those of b."""
    network, X, y = small_network("MLP")

    def drawn(part: Tensor, seed: int) -> RowCurvature:
        return rows_of(network, X, y, part, lambda kind: MonteCarloGaussNewton(kind, 2), seed)

    a, b = drawn(A, 5), drawn(B, 9)
    found = estimate(two_sets(a, b, N_DATA), options(rank=4, complement=complement))
    again = a.redrawn()
    assert again.is_random
    f = len(A) / N_DATA
    dense = {"a": a.dense(), "again": again.dense(), "b": b.dense()}
    assert float((dense["a"] - dense["again"]).abs().max()) > 0.01 * float(dense["a"].abs().max())
    U = found.curvature.directions
    close(found.magnitudes.in_sample, torch.linalg.eigvalsh(dense["a"]).flip(0)[:4])
    H = f * dense["again"] + (1 - f) * dense["b"]
    close(found.magnitudes.values, (U * (H @ U)).sum(0))
    errors = []
    for u in U.T:
        of_samples = [
            torch.cat([(rows @ u).square().sum(1) for rows in c.rows()]).var() / c.n_samples for c in (again, b)
        ]
        errors.append((f**2 * of_samples[0] + (1 - f) ** 2 * of_samples[1]).sqrt())
    close(found.magnitudes.standard_errors, torch.stack(errors), 1e-6)
    if complement == "none":
        assert float(found.curvature.diagonal) == 0
    elif complement == "isotropic":
        outside = torch.trace(H) - (U * (H @ U)).sum()
        assert float(found.curvature.diagonal) == pytest.approx(float(outside) / 89, rel=1e-9)
    else:
        outside = torch.eye(93, dtype=torch.float64) - U @ U.T
        close(found.curvature.diagonal, (outside @ H @ outside).diagonal())


# --- the biased estimate beside another one, from the same directions ---

BESIDE = {
    "cross-fitted, every direction": ("cross_fitted", None, "none"),
    "cross-fitted, few directions and the trace": ("cross_fitted", 5, "isotropic"),
    "cross-fitted, a diagonal": ("cross_fitted", 5, "diagonal"),
    "cross-fitted, a Kronecker basis": ("cross_fitted", 5, "kron"),
    "held out, a Kronecker basis": ("held_out", 5, "kron"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_a_same_batch_variant_is_the_biased_estimate_and_changes_no_other(case: str) -> None:
    magnitudes, rank, complement = BESIDE[case]
    network, X, y = small_network("convolutions and pooling")
    b = rows_of(network, X, y, B) if magnitudes == "held_out" else None
    folds = None if b is not None else torch.arange(len(A)) % 3

    def split(*, with_others: bool) -> SplitCurvature:
        others = (b, folds) if with_others else (None, None)
        return SplitCurvature(rows_of(network, X, y, A), *others, N_DATA)

    chosen = options(magnitudes=magnitudes, rank=rank, complement=complement)
    same_batch = options(magnitudes="same_batch", rank=rank, complement=complement)
    biased, other = estimate_variants(split(with_others=True), [same_batch, chosen])
    alone = estimate(split(with_others=False), same_batch)
    close(dense_precision(biased), dense_precision(alone), 1e-10)
    close(dense_precision(other), dense_precision(estimate(split(with_others=True), chosen)), 1e-10)
    assert not torch.equal(biased.magnitudes.values, other.magnitudes.values)
    # alone, it needs no moments of other samples
    only = estimate_variants(split(with_others=True), [same_batch])[0]
    assert torch.equal(only.magnitudes.values, biased.magnitudes.values)
