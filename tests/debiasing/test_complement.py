"""Complements of the directions, and floors of the magnitudes."""

import pytest
import torch

from debiased_laplace.curvature.sub_batch import DirectionalMoments
from debiased_laplace.debiasing.complement import LowRankCurvature, diagonal, isotropic, without_complement
from debiased_laplace.debiasing.magnitudes import held_out, moments_from_projections, same_batch
from debiased_laplace.linalg.kronecker_basis import BasisBlock, KroneckerBasis


def problem(P=9, k=4):
    generator = torch.Generator().manual_seed(1)
    V = torch.randn(30, P, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 2, P)
    H = V.T @ V / 30
    U = torch.linalg.qr(torch.randn(P, k, generator=generator, dtype=torch.float64))[0]
    return H, U, (U * (H @ U)).sum(0)


def dense(curvature, P):
    U = curvature.directions
    return torch.diag(curvature.diagonal.expand(P)) + (U * curvature.weights) @ U.T


def test_none_is_the_span_alone():
    _, U, m = problem()
    torch.testing.assert_close(dense(without_complement(U, m), 9), (U * m) @ U.T)


def test_isotropic_keeps_the_trace_and_the_magnitudes():
    H, U, m = problem()
    C = dense(isotropic(U, m, torch.trace(H), 9), 9)
    torch.testing.assert_close(torch.trace(C), torch.trace(H))
    torch.testing.assert_close((U * (C @ U)).sum(0), m)
    outside = torch.linalg.qr(torch.eye(9, dtype=U.dtype) - U @ U.T)[0][:, :5]
    values = (outside * (C @ outside)).sum(0)
    torch.testing.assert_close(values, values[:1].expand(5))


def test_isotropic_without_a_complement_or_with_too_little_trace():
    H, U, m = problem(P=4, k=4)
    assert isotropic(U, m, torch.trace(H), 9).diagonal == 0
    H, U, m = problem()
    assert isotropic(U, m, 0.5 * m.sum(), 9).diagonal == 0


def test_diagonal_keeps_the_trace_and_is_not_negative():
    H, U, m = problem()
    outside = torch.eye(9, dtype=U.dtype) - U @ U.T
    curvature = diagonal(U, m, torch.diagonal(outside @ H @ outside))
    assert bool((curvature.diagonal >= 0).all())
    torch.testing.assert_close(torch.trace(dense(curvature, 9)), torch.trace(H))


MEANS = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(("n_data", "unseen"), [(10, 0.0), (40, 1 - 6 / 36)])
def test_finite_population(n_data, unseen):
    in_sample = torch.tensor([5.0, 2.0, 0.1], dtype=torch.float64)
    b = DirectionalMoments(6, MEANS, torch.tensor([0.6, 0.3, 0.2], dtype=torch.float64))
    found = held_out(in_sample, b, n_a=4, n_data=n_data)
    f = 4 / n_data
    torch.testing.assert_close(found.values, f * in_sample + (1 - f) * MEANS)
    torch.testing.assert_close(found.standard_errors, (1 - f) * b.standard_deviations * (unseen / 6) ** 0.5)
    assert torch.equal(found.in_sample, in_sample)
    assert found.n_floored == 0


def test_entries_whose_products_underflow_are_zero_in_a_basis():
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(3, 3, generator=generator))[0] for _ in range(2))
    basis = KroneckerBasis((BasisBlock(3, 3, left, right),))
    coordinates = torch.tensor([[1.0, 1e-30, 1e-10, 0, 1e-40, -1e-25, 0, 0, -1e-3]])
    axes = KroneckerBasis((BasisBlock(3, 3, None, None),))
    residual = torch.ones(9)
    found = diagonal(coordinates.T, torch.ones(1), residual, axes).directions[:, 0]
    assert found.tolist() == torch.tensor([1.0, 0, 1e-10, 0, 0, 0, 0, 0, -1e-3]).tolist()
    # nothing else changes
    U = torch.linalg.qr(torch.randn(9, 2, generator=generator))[0]
    found = diagonal(U, torch.ones(2), residual, basis).directions
    torch.testing.assert_close(found, basis.coordinates(U.T).T, rtol=1e-5, atol=1e-6)


def test_negative_values_are_floored_and_counted():
    in_sample = torch.tensor([5.0, 2.0, 0.1], dtype=torch.float64)
    means = torch.tensor([3.0, -4.0, -0.5], dtype=torch.float64)
    found = held_out(in_sample, DirectionalMoments(6, means, MEANS), n_a=4, n_data=40)
    assert found.n_floored == 2
    assert found.values[1:].tolist() == [0.0, 0.0]


def test_spread_of_the_same_batch():
    V = torch.randn(7 * 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    per_sample = torch.stack([sum(V[3 * n + r] ** 2 for r in range(3)) for n in range(7)])
    own = moments_from_projections(V, 7)
    torch.testing.assert_close(own.means, per_sample.mean(0))
    torch.testing.assert_close(own.standard_deviations, per_sample.std(0))
    torch.testing.assert_close(own.third_moments, (per_sample - per_sample.mean(0)).pow(3).mean(0))
    values = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    found = same_batch(values, own, n_data=50)
    torch.testing.assert_close(found.standard_errors, ((1 - 7 / 50) / 7) ** 0.5 * per_sample.std(0))
    assert torch.equal(found.values, values)
    assert not moments_from_projections(V[:3], 1).standard_deviations.any()


@pytest.mark.parametrize("isotropic_rest", [True, False])
def test_the_correction_of_a_low_rank_counts_the_diagonal_along_each_direction(isotropic_rest):
    _, U, m = problem()
    D = torch.tensor(0.7, dtype=U.dtype) if isotropic_rest else torch.linspace(0.3, 2, 9, dtype=U.dtype)
    variances = 0.01 * m.square()
    curvature = LowRankCurvature(D, U, m, error_variances=variances)
    diagonal, weights = curvature.diagonal_and_weights(20, torch.tensor(2.5, dtype=U.dtype))
    rest = torch.stack([1 / (u @ torch.diag(1 / (20 * D + 2.5).expand(9)) @ u) for u in U.T])
    v = 20 * m + rest
    torch.testing.assert_close(diagonal, 20 * D + 2.5)
    torch.testing.assert_close(weights, 20 * m + torch.minimum(400 * variances / v, v))
