import pytest
import torch
from torch import Tensor

from debiased_laplace.linalg.eigenpairs import Eigenpairs, SolverOutcome, numerical_rank
from debiased_laplace.linalg.gram import GramFactor, dense_curvature, dense_eigenpairs, polish
from debiased_laplace.linalg.row_matrix import RowMatrix


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor(rows: Tensor, n_samples: int) -> GramFactor:
    return GramFactor(RowMatrix((rows.reshape(n_samples, -1, rows.shape[1]),)))


def rows_with(spectrum: Tensor, *, n_rows: int, n_parameters: int, n_samples: int, seed: int = 0) -> Tensor:
    """Return rows V such that V'V/n has these eigenvalues."""
    k = len(spectrum)
    left = torch.linalg.qr(draw(n_rows, k, seed=seed))[0]
    right = torch.linalg.qr(draw(n_parameters, k, seed=seed + 1))[0]
    return (left * (n_samples * spectrum).sqrt()) @ right.T


def spread(U: Tensor) -> float:
    """Return the largest deviation of U'U from the identity."""
    eye = torch.eye(U.shape[1], dtype=torch.float64)
    return float((U.double().T @ U.double() - eye).abs().max()) if U.shape[1] else 0.0


SHAPES = {
    "fewer rows than parameters": (6, 2, 30),
    "one row a sample": (9, 1, 30),
    "one sample": (1, 4, 30),
    "one row": (1, 1, 5),
    "as many rows as parameters": (10, 3, 30),
    "more rows than parameters": (20, 3, 30),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_gram_solver_against_the_dense_eigendecomposition(shape: str) -> None:
    n, r, P = SHAPES[shape]
    V = draw(n * r, P, seed=1)
    H = V.T @ V / n
    expected = torch.linalg.eigvalsh(H).flip(0)[: min(n * r, P)]
    pairs = factor(V, n).eigenpairs(threshold=1e-10)
    assert torch.allclose(pairs.values, expected, rtol=1e-10, atol=0)
    assert spread(pairs.vectors) <= 1e-12
    assert float((H @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0).max()) <= 1e-12 * float(expected[0]) * P
    assert pairs.projections is not None
    assert torch.allclose(pairs.projections, V @ pairs.vectors, rtol=1e-9, atol=1e-9)
    assert pairs.outcome == SolverOutcome("gram", True, 0, pairs.outcome.reason)


@pytest.mark.parametrize("rank", [1, 5, 12, 1000])
def test_rank_keeps_the_leading_pairs(rank: int) -> None:
    V = draw(12, 30, seed=2)
    full = torch.linalg.eigvalsh(V.T @ V / 4).flip(0)
    pairs = factor(V, 4).eigenpairs(1e-10, rank)
    assert pairs.vectors.shape == (30, min(rank, 12))
    assert torch.allclose(pairs.values, full[: min(rank, 12)], rtol=1e-10)
    assert pairs.projections is not None
    assert pairs.projections.shape == (12, min(rank, 12))


@pytest.mark.parametrize(("threshold", "kept"), [(1e-3, 3), (1e-6, 5), (1e-9, 6), (1e-13, 7)])
def test_the_threshold_is_relative_to_the_largest_and_exclusive(threshold: float, kept: int) -> None:
    spectrum = 7.3 * torch.tensor([1.0, 0.1, 0.01, 1e-4, 2e-6, 1e-8, 1e-12], dtype=torch.float64)
    V = rows_with(spectrum, n_rows=8, n_parameters=30, n_samples=8)
    assert len(factor(V, 8).eigenpairs(threshold).values) == kept
    H = V.T @ V / 8
    assert len(dense_eigenpairs(H, threshold, dtype=torch.float64).values) == kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_zero_curvature_is_rank_0(dtype: torch.dtype) -> None:
    for pairs in (
        factor(torch.zeros(6, 10, dtype=dtype), 2).eigenpairs(1e-6),
        dense_eigenpairs(torch.zeros(10, 10, dtype=torch.float64), 1e-6, dtype=dtype),
    ):
        assert pairs.vectors.shape == (10, 0)
        assert pairs.values.shape == pairs.residuals.shape == (0,)
        assert pairs.vectors.dtype == pairs.values.dtype == dtype


def test_repeated_rows_give_each_eigenvalue_once() -> None:
    half = draw(6, 20, seed=3)
    pairs = factor(torch.cat([half, half]), 4).eigenpairs(1e-10)
    assert torch.allclose(pairs.values, torch.linalg.eigvalsh(half @ half.T / 2).flip(0), rtol=1e-10)


@pytest.mark.parametrize("smallest", [1e-2, 1e-6, 1e-10])
def test_single_precision_directions_are_orthonormal_to_rounding(smallest: float) -> None:
    spectrum = torch.logspace(0, torch.tensor(smallest).log10(), 60, dtype=torch.float64)
    V = rows_with(spectrum, n_rows=60, n_parameters=500, n_samples=20).float()
    pairs = factor(V, 20).eigenpairs(threshold=smallest / 10)
    assert len(pairs.values) >= 59
    assert pairs.vectors.dtype == torch.float32
    assert spread(pairs.vectors) <= 1e-6


@pytest.mark.parametrize(("smallest", "rtol"), [(1e-2, 1e-5), (1e-6, 1e-5), (1e-10, 1e-4)])
def test_single_precision_directions_have_the_reported_curvature(smallest: float, rtol: float) -> None:
    spectrum = torch.logspace(0, torch.tensor(smallest).log10(), 60, dtype=torch.float64)
    V = rows_with(spectrum, n_rows=60, n_parameters=500, n_samples=20).float()
    pairs = factor(V, 20).eigenpairs(threshold=smallest / 10)
    along = (V.double() @ pairs.vectors.double()).square().sum(0) / 20
    assert torch.allclose(along, pairs.values.double(), rtol=rtol, atol=0)


def test_the_gram_matrix_is_assembled_from_panels_of_rows_and_columns() -> None:
    # 530 rows: three panels; 33,000 columns: two panels
    V = draw(530, 33_000, seed=4).float()
    V[:, 32_000:] *= 10
    G = factor(V, 53).gram
    assert G.dtype == torch.float64
    assert torch.equal(G, G.T)
    for i, j in ((0, 0), (3, 300), (300, 3), (529, 0), (0, 529), (520, 257), (255, 256)):
        expected = float(V[i].double() @ V[j].double()) / 53
        assert float(G[i, j]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_dense_solver_against_the_eigendecomposition() -> None:
    V = draw(50, 12, seed=5)
    H = V.T @ V / 10
    values, vectors = torch.linalg.eigh(H)
    pairs = dense_eigenpairs(H, 1e-10, rank=4, dtype=torch.float64)
    assert torch.allclose(pairs.values, values.flip(0)[:4], rtol=1e-12)
    assert torch.allclose((pairs.vectors.T @ vectors.flip(1)[:, :4]).abs(), torch.eye(4).double(), atol=1e-10)
    assert pairs.outcome.solver == "dense"
    assert pairs.projections is None
    assert dense_eigenpairs(H, 1e-10, dtype=torch.float32).vectors.dtype == torch.float32


@pytest.mark.parametrize("sizes", [[10], [3, 3, 3, 1], [1] * 10], ids=["one chunk", "uneven last chunk", "single"])
def test_dense_curvature_of_a_stream_is_a_sum_over_rows(sizes: list[int]) -> None:
    V = draw(10, 3, 7, seed=6)
    expected = sum(v.T @ v for v in V)
    found = dense_curvature(iter(V.float().split(sizes)), 7, V.float())
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(dense_curvature(iter(V.split(sizes)), 7, V), expected, rtol=1e-12)


NEARLY = {
    "exactly orthonormal": 0.0,
    "rounding": 1e-9,
    "a little off": 1e-4,
    "further off": 4e-3,
    "too far for Cholesky: QR": 0.3,
}


@pytest.mark.parametrize("case", NEARLY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_polish_makes_columns_orthonormal_and_keeps_their_span(case: str, dtype: torch.dtype) -> None:
    exact = torch.linalg.qr(draw(80, 6, seed=7))[0]
    U = (exact + NEARLY[case] * draw(80, 6, seed=8) / 80**0.5).to(dtype)
    polished = polish(U)
    assert polished.dtype == dtype
    assert spread(polished) <= (1e-7 if dtype == torch.float64 else 1e-6)
    span = torch.linalg.qr(U.double())[0]
    residual = polished.double() - span @ (span.T @ polished.double())
    assert float(residual.abs().max()) <= (1e-12 if dtype == torch.float64 else 1e-6)
    # no column changes its sign
    assert bool(((polished * U).sum(0) > 0.5).all())


def test_polish_of_no_columns_and_of_one() -> None:
    assert polish(torch.zeros(5, 0)).shape == (5, 0)
    assert torch.allclose(polish(3 * torch.ones(4, 1, dtype=torch.float64)), torch.full((4, 1), 0.5).double())


def test_polish_replaces_a_column_of_zeros_by_a_direction() -> None:
    U = torch.cat([torch.linalg.qr(draw(9, 2, seed=9))[0], torch.zeros(9, 1, dtype=torch.float64)], dim=1)
    assert spread(polish(U)) <= 1e-12


RANKS = {
    "none": ([], 1e-6, 0),
    "all zero": ([0.0, 0.0], 1e-6, 0),
    "negative": ([-1.0, -2.0], 1e-6, 0),
    "negative tail": ([2.0, 1.0, -1e-9], 1e-6, 2),
    "at the threshold": ([2.0, 1.0, 0.5], 0.25, 2),
    "all": ([2.0, 1.0, 0.5], 0.2, 3),
}


@pytest.mark.parametrize("case", RANKS)
def test_numerical_rank(case: str) -> None:
    values, threshold, expected = RANKS[case]
    assert numerical_rank(torch.tensor(values), threshold) == expected


def test_eigenpairs_must_be_in_decreasing_order() -> None:
    outcome = SolverOutcome("dense", True, 0, "")
    with pytest.raises(ValueError, match="decreasing"):
        Eigenpairs(torch.tensor([1.0, 2.0]), torch.eye(2), torch.zeros(2), outcome)
    assert len(Eigenpairs(torch.tensor([2.0, 2.0]), torch.eye(2), torch.zeros(2), outcome).values) == 2
