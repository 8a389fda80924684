import pytest
import torch
from torch import Tensor

from debiased_laplace.linalg.gram import GramFactor
from debiased_laplace.linalg.held_out_rows import HeldOutRows
from debiased_laplace.linalg.row_matrix import RowMatrix


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor(V: Tensor, n_samples: int) -> GramFactor:
    return GramFactor(RowMatrix((V.reshape(n_samples, -1, V.shape[1]),)))


def eigenvectors_of_others(V: Tensor, held: Tensor, threshold: float, rank: int) -> Tensor:
    """Return the leading eigenvectors of the other rows' curvature, by decreasing eigenvalue."""
    values, U = torch.linalg.eigh(V[~held].T @ V[~held])
    values, U = values.flip(0), U.flip(1)
    k = min(rank, sum(1 for value in values if value > threshold * values[0]))
    return U[:, :k]


# samples, rows of each, parameters, held-out samples, threshold, rank
CASES = {
    "fewer rows than parameters": (8, 2, 30, [1, 4], 1e-8, 100),
    "rank 5": (8, 2, 30, [0, 7], 1e-8, 5),
    "one row a sample": (9, 1, 20, [2, 3, 8], 1e-8, 100),
    "all samples but one are held out": (6, 3, 30, [0, 1, 2, 4, 5], 1e-8, 100),
    "one sample is held out": (6, 3, 30, [5], 1e-8, 100),
    "more rows than parameters": (12, 3, 7, [0, 2, 5], 1e-8, 100),
    "some directions below the threshold": (8, 2, 30, [1, 4], 0.3, 100),
}


@pytest.mark.parametrize("case", CASES)
def test_projections_and_residuals(case: str) -> None:
    n, r, P, samples, threshold, rank = CASES[case]
    V = draw(n * r, P, seed=1) * torch.linspace(2, 0.5, P, dtype=torch.float64)
    all_rows = factor(V, n)
    held = torch.isin(all_rows.sample_of_row, torch.tensor(samples))
    U = eigenvectors_of_others(V, held, threshold, rank)
    found = HeldOutRows.of(all_rows, held, threshold, rank)
    k = U.shape[1]
    assert found.projections.shape == (len(samples) * r, k)
    if case == "some directions below the threshold":
        assert 0 < k < 12
    # eigenvectors are unique up to their sign
    torch.testing.assert_close(found.projections.abs(), (V[held] @ U).abs(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(V[~held].T @ found.coefficients, U * signs(V[~held].T @ found.coefficients, U))
    expected = torch.linalg.eigvalsh(V[~held].T @ V[~held]).flip(0)[:k]
    torch.testing.assert_close(found.values, expected, rtol=1e-9, atol=0)
    for m in {0, 1, k}:
        residual = V[held] - V[held] @ U[:, :m] @ U[:, :m].T
        torch.testing.assert_close(found.residual(all_rows, m), residual, rtol=1e-8, atol=1e-9)


def signs(found: Tensor, expected: Tensor) -> Tensor:
    return (found * expected).sum(0).sign()


def test_null_rows_of_the_others_are_no_directions() -> None:
    """Softmax rows of a sample are linearly dependent; the null vectors of their Gram matrix must be dropped."""
    V = draw(6, 3, 25, seed=2)
    V[:, 2] = -V[:, 0] - V[:, 1]
    V = V.flatten(0, 1)
    held = torch.zeros(18, dtype=torch.bool)
    held[6:9] = True
    found = HeldOutRows.of(factor(V, 6), held, 1e-10, 100)
    assert found.projections.shape == (3, 10)
    U = eigenvectors_of_others(V, held, 1e-10, 100)
    torch.testing.assert_close(found.projections.square().sum(1), (V[held] @ U).square().sum(1))


def test_others_without_curvature_have_no_directions() -> None:
    V = torch.zeros(6, 4, dtype=torch.float64)
    V[:2] = draw(2, 4, seed=3)
    held = torch.tensor([True, True, False, False, False, False])
    found = HeldOutRows.of(factor(V, 3), held, 1e-6, 5)
    assert found.projections.shape == (2, 0)
    assert torch.equal(found.residual(factor(V, 3), 0), V[:2])


def test_rows_in_single_precision_keep_small_projections() -> None:
    """The Gram matrix in double precision resolves eigenvalues a million times below the largest."""
    scales = torch.logspace(0, -3, 12, dtype=torch.float64)  # eigenvalues over a factor of a million
    V = (torch.linalg.qr(draw(12, 12, seed=4))[0] * scales) @ torch.linalg.qr(draw(40, 12, seed=5))[0].T
    V = torch.cat([V, 1e-3 * draw(3, 40, seed=6)]).float()
    held = torch.arange(15) >= 12
    found = HeldOutRows.of(factor(V, 15), held, 1e-10, 100)
    U = eigenvectors_of_others(V.double(), held, 1e-10, 12)
    expected = (V[held].double() @ U).abs()
    assert found.projections.dtype == torch.float64
    assert float((found.projections.abs() - expected).abs().max()) <= 1e-6 * float(expected.max())
    residual = found.residual(factor(V, 15), 12)
    assert residual.dtype == torch.float32
    exact = V[held].double() - V[held].double() @ U @ U.T
    assert float((residual.double() - exact).abs().max()) <= 1e-5 * float(exact.abs().max())
