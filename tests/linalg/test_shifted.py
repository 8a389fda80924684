"""Variances under A + shift, for many shifts, against dense inverses."""

import pytest
import torch

from debiased_laplace.linalg.kronecker_basis import BasisBlock, KroneckerBasis
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal
from debiased_laplace.linalg.shifted import Shifted

P, K = 26, 6
SHIFTS = (1e-3, 0.4, 70.0)


def orthogonal(n, seed):
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def basis():
    return KroneckerBasis(
        (BasisBlock(4, 5, orthogonal(4, 1), orthogonal(5, 2)), BasisBlock(6, 1, orthogonal(6, 3), None))
    )


D = torch.linspace(0.0, 3.0, P, dtype=torch.float64)
U = orthogonal(P, 4)[:, :K]
M = torch.tensor([900.0, 40.0, 5.0, 1.0, 0.0, -0.0], dtype=torch.float64)
C = torch.tensor(0.3, dtype=torch.float64)
CASES = {
    "low rank alone": (torch.tensor(0.0, dtype=torch.float64), U, M, None),
    "isotropic rest, and curvature below it": (C, U, M - C, None),
    "all directions": (torch.tensor(0.0, dtype=torch.float64), orthogonal(P, 5), D, None),
    "diagonal": (D, U, M, None),
    "diagonal in a basis": (D, U, M, basis()),
    "no directions": (D, U[:, :0], M[:0], None),
    "no directions, in a basis": (D, U[:, :0], M[:0], basis()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_variances_are_those_of_each_shift_on_its_own(case, dtype):
    diagonal, directions, weights, basis_ = CASES[case]
    given = [t.to(dtype) for t in (diagonal, directions, weights)]
    found = Shifted.of(*given, None if basis_ is None else basis_.to(dtype), n_rows=10**5, n_shifts=100)
    rows = torch.randn(5, 3, P, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    held = found.project(rows.to(dtype))
    for shift in SHIFTS:
        dense = LowRankPlusDiagonal(diagonal + shift, directions, weights, basis_).to_dense()
        expected = rows @ torch.linalg.inv(dense) @ rows.mT
        tolerance = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(found.variance(held, shift).double(), expected, **tolerance)
        alone = found.variances(held, shift).double()
        torch.testing.assert_close(alone, expected.diagonal(dim1=1, dim2=2), **tolerance)


def test_differences_of_rows_survive_a_large_common_variance():
    # no curvature along v, which all rows of a sample share: with a weak prior it is nearly all of their variance
    v = orthogonal(P, 7)[:, 0]
    left = torch.linalg.qr(U - torch.outer(v, v @ U))[0]
    found = Shifted.of((0 * D).float(), left.float(), M.float(), None, n_rows=10**5, n_shifts=100)
    rows = (
        torch.randn(4, 3, K, generator=torch.Generator().manual_seed(6), dtype=torch.float64) @ left.T + 9 * v
    ).float()
    dense = LowRankPlusDiagonal(torch.tensor(1e-6, dtype=torch.float64), left.float().double(), M).to_dense()
    difference = rows[:, 1:].double() - rows[:, :1].double()
    expected = difference @ torch.linalg.inv(dense) @ difference.mT
    S = found.variance(found.project(rows), 1e-6)
    of_differences = S[:, 1:, 1:] - S[:, 1:, :1] - S[:, :1, 1:] + S[:, :1, :1]
    torch.testing.assert_close(of_differences, expected, rtol=1e-3, atol=1e-3)


def test_what_is_not_positive_definite_is_floored_as_in_a_single_precision():
    weights = M - 1.5
    shift = 0.9
    found = Shifted.of(C, U, weights, None, n_rows=10**5, n_shifts=100)
    rows = torch.randn(2, 3, P, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    one = LowRankPlusDiagonal(C + shift, U, weights)
    assert one.n_floored > 0
    torch.testing.assert_close(found.variance(found.project(rows), shift), one.variance(rows))


def test_a_decomposition_is_made_where_it_pays():
    for n_shifts, pays in ((1, False), (1000, True)):
        found = Shifted.of(D, U, M, None, n_rows=300, n_shifts=n_shifts)
        assert (found is not None) == pays
    many = Shifted.of(torch.ones(20_000), torch.zeros(20_000, 1), torch.ones(1), None, n_rows=10**9, n_shifts=1000)
    assert many is None
