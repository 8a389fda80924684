from collections.abc import Callable

import pytest
import torch
from oracles import block_diagonal, dense_kronecker_product
from torch import Tensor

from debiased_laplace.linalg.kronecker_basis import BasisBlock, KroneckerBasis


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw(n, n, seed=seed))[0]


BLOCKS: dict[str, Callable[[], list[BasisBlock]]] = {
    "both sides": lambda: [BasisBlock(3, 4, orthogonal(3, 1), orthogonal(4, 2))],
    "the same size on both sides": lambda: [BasisBlock(4, 4, orthogonal(4, 1), orthogonal(4, 2))],
    "rows only": lambda: [BasisBlock(3, 4, orthogonal(3, 1), None)],
    "columns only": lambda: [BasisBlock(3, 4, None, orthogonal(4, 2))],
    "a bias": lambda: [BasisBlock(5, 1, orthogonal(5, 3), None)],
    "one row": lambda: [BasisBlock(1, 4, None, orthogonal(4, 2))],
    "a scalar with its sign flipped": lambda: [BasisBlock(1, 1, -torch.ones(1, 1, dtype=torch.float64), None)],
    "several, with identities and a scalar": lambda: [
        BasisBlock(2, 3, None, None),
        BasisBlock(3, 4, orthogonal(3, 1), orthogonal(4, 2)),
        BasisBlock(1, 1, None, None),
        BasisBlock(2, 3, None, orthogonal(3, 4)),
        BasisBlock(5, 1, orthogonal(5, 3), None),
        BasisBlock(4, 2, orthogonal(4, 5), None),
    ],
    "no parameter in a block": lambda: [BasisBlock(2, 3, orthogonal(2, 6), None), BasisBlock(0, 1, None, None)],
}
every_block = pytest.mark.parametrize("name", BLOCKS)


def make(name: str) -> tuple[KroneckerBasis, Tensor]:
    """Return a basis, and its dense matrix assembled from the blocks."""
    blocks = BLOCKS[name]()
    axes = torch.eye(9, dtype=torch.float64)
    K = block_diagonal(
        [
            dense_kronecker_product(
                axes[: b.rows, : b.rows] if b.left is None else b.left,
                axes[: b.columns, : b.columns] if b.right is None else b.right,
            )
            for b in blocks
            if b.size
        ]
    )
    return KroneckerBasis(tuple(blocks)), K


@every_block
def test_the_matrix_is_block_diagonal_and_orthogonal(name: str) -> None:
    basis, K = make(name)
    assert basis.n_parameters == len(K)
    torch.testing.assert_close(basis.to_dense(), K, rtol=0, atol=1e-15)
    torch.testing.assert_close(K.T @ K, torch.eye(len(K), dtype=K.dtype), rtol=0, atol=1e-13)


@every_block
@pytest.mark.parametrize("lead", [(), (7,), (2, 3)], ids=["one vector", "rows", "a stack of rows"])
def test_rows_to_coordinates_and_back(name: str, lead: tuple[int, ...]) -> None:
    basis, K = make(name)
    x = draw(*lead, len(K), seed=8)
    torch.testing.assert_close(basis.coordinates(x), x @ K, rtol=0, atol=1e-13)
    torch.testing.assert_close(basis.vectors(x), x @ K.T, rtol=0, atol=1e-13)
    torch.testing.assert_close(basis.vectors(basis.coordinates(x)), x, rtol=0, atol=1e-13)
    U = draw(len(K), 3, seed=12)
    torch.testing.assert_close(basis.coordinates_of_columns(U), K.T @ U, rtol=0, atol=1e-13)
    torch.testing.assert_close(basis.coordinates_of_columns(U[:, :0]), U[:, :0])


@every_block
def test_columns_to_coordinates_in_their_own_place_and_few_at_a_time(name: str, monkeypatch) -> None:
    basis, K = make(name)
    U = draw(len(K), 5, seed=12)
    expected = K.T @ U
    monkeypatch.setattr("debiased_laplace.linalg.kronecker_basis._ROTATED", 2 * max(b.size for b in basis.blocks))
    coordinates = basis.coordinates_of_columns(U, out=U)
    assert coordinates is U
    torch.testing.assert_close(U, expected, rtol=0, atol=1e-13)


@every_block
def test_diagonal_of_a_diagonal_in_coordinates(name: str) -> None:
    basis, K = make(name)
    d = draw(len(K), seed=9).exp()
    torch.testing.assert_close(basis.diagonal_of(d), (K @ torch.diag(d) @ K.T).diagonal(), rtol=1e-13, atol=0)
    # the cached squares do not replace the basis
    torch.testing.assert_close(basis.to_dense(), K, rtol=0, atol=1e-15)
    torch.testing.assert_close(basis.diagonal_of(d), (K @ torch.diag(d) @ K.T).diagonal(), rtol=1e-13, atol=0)


def test_a_block_is_of_the_matrix_flattened_row_by_row() -> None:
    left, right = orthogonal(3, 1), orthogonal(4, 2)
    basis = KroneckerBasis((BasisBlock(3, 4, left, right),))
    M = draw(3, 4, seed=10)
    coordinates = basis.coordinates(M.flatten()).reshape(3, 4)
    for o in range(3):
        for i in range(4):
            assert float(coordinates[o, i]) == pytest.approx(float(left[:, o] @ M @ right[:, i]), rel=1e-12)


def test_blocks_without_a_basis_change_nothing() -> None:
    basis = KroneckerBasis((BasisBlock(2, 3, None, None), BasisBlock(1, 1, None, None)))
    x = draw(4, 7, seed=11)
    assert torch.equal(basis.coordinates(x), x)
    assert torch.equal(basis.vectors(x), x)
    assert torch.equal(basis.diagonal_of(x[0]), x[0])
    assert torch.equal(basis.to_dense().double(), torch.eye(7, dtype=torch.float64))


def test_single_precision_stays_single() -> None:
    basis, K = make("several, with identities and a scalar")
    single = KroneckerBasis(
        tuple(
            BasisBlock(b.rows, b.columns, *(None if side is None else side.float() for side in (b.left, b.right)))
            for b in basis.blocks
        )
    )
    x = draw(2, len(K), seed=12)
    for found, expected in (
        (single.coordinates(x.float()), x @ K),
        (single.vectors(x.float()), x @ K.T),
        (single.diagonal_of(x[0].float()), (K * K) @ x[0]),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert single.to_dense().dtype == torch.float32
