from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from debiased_laplace.linalg import lanczos as module
from debiased_laplace.linalg.eigenpairs import Eigenpairs
from debiased_laplace.linalg.lanczos import lanczos


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(values: list[float] | Tensor, seed: int = 0) -> Tensor:
    """Return a symmetric matrix with these eigenvalues."""
    spectrum = torch.as_tensor(values, dtype=torch.float64)
    Q = torch.linalg.qr(draw(len(spectrum), len(spectrum), seed=seed))[0]
    H = (Q * spectrum) @ Q.T
    return (H + H.T) / 2


class Counted:
    """Matrix-vector product that counts the vectors it was applied to."""

    def __init__(self, H: Tensor):
        self.H, self.products, self.widest = H, 0, 0

    def __call__(self, X: Tensor) -> Tensor:
        self.products += X.shape[1]
        self.widest = max(self.widest, X.shape[1])
        return self.H @ X


def assert_eigenpairs(H: Tensor, pairs: Eigenpairs, k: int, *, rtol: float, atol: float = 0.0) -> None:
    """Check values and true residuals, relative to the largest eigenvalue, and orthonormality."""
    expected = torch.linalg.eigvalsh(H.double()).flip(0)[:k]
    scale = max(float(expected.abs().max()), atol)
    values, U = pairs.values.double(), pairs.vectors.double()
    assert pairs.vectors.shape == (len(H), k)
    assert float((values - expected).abs().max()) <= rtol * scale + atol
    eps = torch.finfo(pairs.vectors.dtype).eps
    assert float((U.T @ U - torch.eye(k, dtype=torch.float64)).abs().max()) <= 20 * eps * k**0.5
    true = (H.double() @ U - U * values).norm(dim=0)
    assert float(true.max()) <= rtol * scale + atol
    # reported residuals are the true ones, up to rounding and the restarts in the complement
    assert bool((true <= 1.5 * pairs.residuals.double() + 100 * eps * scale).all())
    assert float(pairs.residuals.max()) <= rtol * scale + atol


DECAYING = torch.logspace(1, -6, 200, dtype=torch.float64)

# spectrum, k, block size
MATRICES: dict[str, tuple[Tensor | list[float], int, int]] = {
    "well separated": (DECAYING, 10, 1),
    "well separated, blocks of 4": (DECAYING, 10, 4),
    "block larger than k": (DECAYING, 3, 8),
    "one pair": (DECAYING, 1, 1),
    "clustered at the top": (torch.cat([10 + 1e-4 * torch.arange(12.0), torch.linspace(0, 5, 188)]), 12, 1),
    "multiplicity equal to the block": ([7.0] * 3 + [4.0] * 3 + [1.0] * 3 + [0.01 * i for i in range(141)], 9, 3),
    "multiplicity above the block": ([7.0] * 5 + [4.0] * 2 + [0.01 * i for i in range(143)], 7, 2),
    "multiplicity 6, one vector at a time": ([7.0] * 6 + [0.01 * i for i in range(144)], 6, 1),
    "a repeated value cut off by k": ([7.0] * 6 + [0.01 * i for i in range(144)], 4, 1),
    "the identity": ([2.0] * 60, 5, 1),
    "rank deficient, k within the rank": ([5.0, 4.0, 3.0, 2.0, 1.0] + [0.0] * 95, 5, 1),
    "rank deficient, k above the rank": ([5.0, 4.0, 3.0, 2.0, 1.0] + [0.0] * 95, 12, 1),
    "rank 1": ([3.0] + [0.0] * 79, 1, 4),
    "P smaller than the block": ([3.0, 2.0, 1.0], 2, 8),
    "k = P": (torch.linspace(0, 5, 30), 30, 1),
    "k = P, blocks that do not divide it": (torch.linspace(0, 5, 31), 31, 4),
    "k above P": ([3.0, 2.0, 1.0], 100, 2),
    "P = 1": ([3.0], 1, 1),
    "P = 1, k above it": ([3.0], 4, 3),
    "indefinite: algebraically largest, not largest in magnitude": (torch.linspace(-20, 4, 150), 5, 2),
    "negative definite": (torch.linspace(-9, -1, 60), 3, 1),
    "tiny numbers": (1e-9 * DECAYING, 8, 2),
    "huge numbers": (1e9 * DECAYING, 8, 2),
}


@pytest.mark.parametrize("name", MATRICES)
def test_leading_pairs_of_a_matrix(name: str) -> None:
    spectrum, k, block_size = MATRICES[name]
    H = with_spectrum(spectrum)
    matmat = Counted(H)
    pairs = lanczos(matmat, H[0], k, block_size=block_size)
    assert_eigenpairs(H, pairs, min(k, len(H)), rtol=2e-9)
    assert pairs.outcome.converged, pairs.outcome.reason
    assert pairs.outcome.solver == "lanczos"
    assert pairs.outcome.products == matmat.products
    assert matmat.widest <= block_size
    assert pairs.projections is None


@pytest.mark.parametrize("name", MATRICES)
def test_leading_pairs_in_single_precision(name: str) -> None:
    spectrum, k, block_size = MATRICES[name]
    H = with_spectrum(spectrum).float()
    pairs = lanczos(lambda X: H @ X, H[0], k, block_size=block_size)
    assert pairs.vectors.dtype == pairs.values.dtype == pairs.residuals.dtype == torch.float32
    assert pairs.outcome.converged, pairs.outcome.reason
    assert_eigenpairs(H, pairs, min(k, len(H)), rtol=3e-5)


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_zero_matrix(block_size: int, dtype: torch.dtype) -> None:
    pairs = lanczos(torch.zeros_like, torch.zeros(50, dtype=dtype), 4, block_size=block_size)
    assert torch.equal(pairs.values, torch.zeros(4, dtype=dtype))
    assert torch.equal(pairs.residuals, torch.zeros(4, dtype=dtype))
    assert pairs.outcome.converged
    U = pairs.vectors.double()
    assert torch.allclose(U.T @ U, torch.eye(4, dtype=torch.float64), atol=1e-6)


def test_the_same_as_scipy() -> None:
    V = draw(60, 300, seed=3) * torch.logspace(0, -3, 300, dtype=torch.float64)
    H = V.T @ V / 60
    k = 12
    operator = LinearOperator(H.shape, matvec=lambda x: H.numpy() @ x, dtype=np.float64)
    values, vectors = eigsh(operator, k, which="LA", v0=np.ones(300))
    pairs = lanczos(lambda X: H @ X, H[0], k)
    assert np.allclose(pairs.values.numpy(), values[::-1], rtol=1e-12)
    overlaps = np.abs(pairs.vectors.numpy().T @ vectors[:, ::-1])
    assert np.allclose(overlaps, np.eye(k), atol=1e-6)


def test_copies_of_a_regressions_last_layer_span_the_whole_eigenspace() -> None:
    features = draw(50, 12, seed=4)
    inner = features.T @ features / 50
    H = torch.block_diag(*[inner] * 4)  # every eigenvalue four times
    pairs = lanczos(lambda X: H @ X, H[0], 8, block_size=4)
    values, vectors = torch.linalg.eigh(inner)
    assert torch.allclose(pairs.values, values.flip(0)[:2].repeat_interleave(4), rtol=1e-9)
    for i in range(2):
        space = torch.block_diag(*[vectors[:, -1 - i : len(values) - i]] * 4)
        mine = pairs.vectors[:, 4 * i : 4 * i + 4]
        assert float((mine - space @ (space.T @ mine)).abs().max()) <= 1e-8


def test_a_basis_that_needs_many_restarts() -> None:
    # a slowly decaying spectrum in a capacity of k + 30
    H = with_spectrum(torch.linspace(0, 1, 500).square())
    pairs = lanczos(lambda X: H @ X, H[0], 5)
    assert pairs.outcome.converged
    assert pairs.outcome.products > 2 * (5 + 30)
    assert_eigenpairs(H, pairs, 5, rtol=2e-9)


def test_restarts_cost_few_products_beyond_those_of_a_large_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    spectra = [torch.arange(1.0, 501).pow(-1.5), torch.linspace(1, 0, 500).square(), 0.98 ** torch.arange(500.0)]
    for spectrum in spectra:
        H = with_spectrum(spectrum).float()
        with monkeypatch.context() as patched:
            patched.setattr(module, "SPARE", 400)
            large = lanczos(lambda X, H=H: H @ X, H[0], 40).outcome
        small = lanczos(lambda X, H=H: H @ X, H[0], 40).outcome
        assert small.converged
        assert large.converged
        assert small.products <= 1.15 * large.products


def test_vectors_are_combined_in_place_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    H = with_spectrum(torch.linspace(0, 1, 500).square())
    expected = lanczos(lambda X: H @ X, H[0], 5)
    monkeypatch.setattr(module, "_CHUNK", 7 * (5 + 30))
    found = lanczos(lambda X: H @ X, H[0], 5)
    assert torch.allclose(found.values, expected.values, rtol=1e-12)
    # signs depend on rounding
    signs = (found.vectors * expected.vectors).sum(0).sign()
    assert torch.allclose(found.vectors * signs, expected.vectors, atol=1e-10)
    assert found.outcome.products == expected.outcome.products


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-7])
def test_the_tolerance_bounds_the_true_residuals(tolerance: float) -> None:
    H = with_spectrum(torch.linspace(0, 1, 500).square())
    pairs = lanczos(lambda X: H @ X, H[0], 5, tolerance=tolerance)
    true = (H @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert pairs.outcome.converged
    assert float(true.max()) <= 2 * tolerance * float(pairs.values[0])
    assert bool((true <= 1.01 * pairs.residuals + 1e-13).all())


def test_a_looser_tolerance_takes_fewer_products() -> None:
    H = with_spectrum(torch.linspace(0, 1, 500).square())
    used = [lanczos(lambda X: H @ X, H[0], 5, tolerance=t).outcome.products for t in (1e-2, 1e-5, 1e-9)]
    assert used == sorted(used)
    assert used[0] < used[-1]


@pytest.mark.parametrize("block_size", [1, 4])
def test_too_few_products_are_reported(block_size: int) -> None:
    H = with_spectrum(torch.linspace(0, 1, 500).square())
    matmat = Counted(H)
    pairs = lanczos(matmat, H[0], 5, block_size=block_size, max_products=20)
    assert not pairs.outcome.converged
    assert pairs.outcome.products == matmat.products <= 20 + block_size
    assert f"{matmat.products} products" in pairs.outcome.reason
    # the residuals are the true ones
    true = (H @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert torch.allclose(pairs.residuals, true, rtol=1e-6, atol=1e-12)
    assert float(true.max()) > 1e-3
    assert f"{float(true.max() / pairs.values[0]):.1g}" in pairs.outcome.reason


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["NaN", "infinity"])
@pytest.mark.parametrize("when", [0, 3], ids=["at once", "after some products"])
def test_a_product_that_is_not_finite_is_an_error(value: float, when: int) -> None:
    H = with_spectrum(DECAYING)
    calls = []

    def matmat(X: Tensor) -> Tensor:
        calls.append(1)
        return H @ X if len(calls) <= when else torch.full_like(X, value)

    with pytest.raises(ValueError, match="NaN or infinity"):
        lanczos(matmat, H[0], 5)


@pytest.mark.parametrize(("k", "block_size"), [(0, 1), (-3, 1), (2, 0), (2, -1)])
def test_refuses_less_than_one_pair_or_vector(k: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        lanczos(lambda X: X, torch.zeros(5), k, block_size=block_size)


def test_the_seed_decides_and_the_global_random_state_stays() -> None:
    H = with_spectrum(torch.linspace(0, 1, 300).square())

    def run(seed: int) -> Eigenpairs:
        return lanczos(lambda X: H @ X, H[0], 4, seed=seed, tolerance=1e-4)

    before = torch.get_rng_state()
    first = run(5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    again = run(5)
    assert torch.equal(first.vectors, again.vectors)
    assert torch.equal(first.values, again.values)
    assert not torch.equal(first.vectors, run(6).vectors)


ORACLE: dict[str, Callable[[], Tensor]] = {
    "decaying": lambda: with_spectrum(DECAYING[:40]),
    "a GGN's: rows of rank below P": lambda: draw(15, 40, seed=6).T @ draw(15, 40, seed=6),
}


@pytest.mark.parametrize("name", ORACLE)
def test_a_full_basis_agrees_with_textbook_lanczos(name: str) -> None:
    H = ORACLE[name]()
    n = len(H)
    # Golub & Van Loan, algorithm 10.1.1, with every vector orthogonalized against all earlier ones
    q = torch.ones(n, dtype=torch.float64) / n**0.5
    basis = [q]
    for _ in range(n - 1):
        r = H @ basis[-1]
        for _ in range(2):
            for earlier in basis:
                r = r - (earlier @ r) * earlier
        if float(r.norm()) < 1e-10:
            break
        basis.append(r / r.norm())
    Q = torch.stack(basis, dim=1)
    ritz = torch.linalg.eigvalsh(Q.T @ H @ Q).flip(0)[:6]
    assert torch.allclose(lanczos(lambda X: H @ X, H[0], 6).values, ritz, rtol=1e-9)
