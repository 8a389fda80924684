from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from oracles import block_diagonal, dense_kl, dense_kronecker_product
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from debiased_laplace.linalg.kronecker_basis import BasisBlock, KroneckerBasis
from debiased_laplace.linalg.low_rank_plus_diagonal import (
    LowRankPlusDiagonal,
    differentiable_log_det,
    kl_divergence,
)
from debiased_laplace.linalg.row_matrix import OuterRows, RowMatrix

P = 23
RTOL = {torch.float64: 1e-9, torch.float32: 2e-4}


@dataclass
class Case:
    diagonal: Tensor
    magnitudes: Tensor
    in_basis: bool = False


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(k: int, seed: int = 0, n: int = P) -> Tensor:
    return torch.linalg.qr(draw(n, k, seed=seed))[0]


def uneven(n: int = P) -> Tensor:
    return draw(n, seed=1).mul(0.8).exp()


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


CASES: dict[str, Callable[[], Case]] = {
    "isotropic": lambda: Case(tensor(0.3)[0], tensor(40.0, 3.0, 0.7, 0.02)),
    "isotropic, one entry in one dimension": lambda: Case(tensor(0.3), tensor(40.0, 3.0, 0.7, 0.02)),
    "full diagonal": lambda: Case(uneven(), tensor(40.0, 3.0, 0.7, 0.02)),
    "rank 0, isotropic": lambda: Case(tensor(2.5)[0], tensor()),
    "rank 0, full diagonal": lambda: Case(uneven(), tensor()),
    "rank 1": lambda: Case(uneven(), tensor(5.0)),
    "as many directions as parameters, isotropic": lambda: Case(tensor(0.3)[0], draw(P, seed=2).exp()),
    "as many directions as parameters, full diagonal": lambda: Case(uneven(), draw(P, seed=2).exp()),
    "some magnitudes zero, isotropic": lambda: Case(tensor(0.3)[0], tensor(40.0, 0.0, 0.7, 0.0)),
    "all magnitudes zero, full diagonal": lambda: Case(uneven(), tensor(0.0, 0.0, 0.0)),
    "negative magnitudes, isotropic": lambda: Case(tensor(2.0)[0], tensor(5.0, -1.0, -1.8)),
    "negative magnitudes, full diagonal": lambda: Case(uneven() + 1, tensor(5.0, -0.9, -0.3)),
    "repeated magnitudes": lambda: Case(uneven(), tensor(3.0, 3.0, 3.0)),
    "basis, rank 0, full diagonal": lambda: Case(uneven(), tensor(), in_basis=True),
    "basis, rank 0, isotropic": lambda: Case(tensor(2.5)[0], tensor(), in_basis=True),
    "basis, rank 4, full diagonal": lambda: Case(uneven(), tensor(40.0, 3.0, 0.7, 0.02), in_basis=True),
    "basis, rank 4, isotropic": lambda: Case(tensor(0.3)[0], tensor(40.0, 3.0, 0.7, 0.02), in_basis=True),
    "basis, zero and negative magnitudes": lambda: Case(uneven() + 1, tensor(5.0, 0.0, -0.9), in_basis=True),
    "basis, as many directions as parameters": lambda: Case(uneven(), draw(P, seed=2).exp(), in_basis=True),
}
WITHOUT_BASIS = [name for name in CASES if not name.startswith("basis")]


def kronecker_basis(dtype: torch.dtype = torch.float64) -> tuple[KroneckerBasis, Tensor]:
    """Return a basis with blocks of both sides, either and none, and its dense matrix."""
    left, right, rows, columns = (orthonormal(n, seed=30 + n, n=n) for n in (3, 4, 2, 5))
    axes = torch.eye(5, dtype=torch.float64)
    blocks = [(3, 4, left, right), (2, 2, rows, None), (1, 5, None, columns), (2, 1, None, None)]
    basis = KroneckerBasis(
        tuple(
            BasisBlock(o, i, *(None if side is None else side.to(dtype) for side in sides)) for o, i, *sides in blocks
        )
    )
    products = [
        dense_kronecker_product(axes[:o, :o] if le is None else le, axes[:i, :i] if ri is None else ri)
        for o, i, le, ri in blocks
    ]
    return basis, block_diagonal(products)


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[LowRankPlusDiagonal, Tensor]:
    """Return the operator in the given precision and its matrix, summed over directions in double precision."""
    case = CASES[name]()
    U = orthonormal(len(case.magnitudes))
    basis, K = kronecker_basis(dtype) if case.in_basis else (None, None)
    operator = LowRankPlusDiagonal(case.diagonal.to(dtype), U.to(dtype), case.magnitudes.to(dtype), basis)
    matrix = torch.diag(operator.diagonal.double().expand(P)).clone()
    for u, m in zip(operator.directions.double().T, operator.magnitudes.double(), strict=True):
        matrix += m * torch.outer(u, u)
    return operator, matrix if K is None else K @ matrix @ K.T


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype, *, scale: float | None = None) -> None:
    """Check equality relative to the largest entry, as rounding of a product is."""
    assert found.dtype == dtype
    assert found.shape == expected.shape
    scale = float(expected.abs().max()) if scale is None else scale
    assert float((found.double() - expected).abs().max()) <= RTOL[dtype] * scale


@pytest.mark.parametrize("isotropic", [False, True])
def test_directions_in_a_shorter_format_are_taken_as_they_are(isotropic: bool) -> None:
    n, k = 600, 6
    basis = KroneckerBasis((BasisBlock(20, 15, orthonormal(20, n=20)), BasisBlock(300, 1)))
    diagonal = tensor(0.7)[0] if isotropic else draw(n, seed=3).mul(0.5).exp()
    m, U = tensor(3e5, 40.0, 9.0, 3.0, 0.5, 0.1), orthonormal(k, n=n).bfloat16()
    short = LowRankPlusDiagonal(diagonal, U, m, basis)
    assert short.directions.element_size() == 2
    # rounded directions are not orthonormal
    matrix = LowRankPlusDiagonal(diagonal, U.double(), m, basis).to_dense()
    covariance = torch.linalg.inv(matrix)
    X = basis.vectors(U.double()[:, :4].T.reshape(2, 2, n) + 0.1 * draw(2, 2, n, seed=5))
    rows = RowMatrix((X[..., :300], X[..., 300:]))
    variance = X @ covariance @ X.mT
    root = short.root(torch.eye(n).double())
    for name, found, expected in [
        ("to_dense", short.to_dense(), matrix),
        ("matmat", short.matmat(X[0].T), matrix @ X[0].T),
        ("quadratic", short.quadratic(X[0]), (X[0] @ matrix @ X[0].T).diagonal()),
        ("variance", short.variance(X), variance),
        ("variances", short.variances(X), variance.diagonal(dim1=1, dim2=2)),
        ("variance_of", short.variance_of(rows), variance),
        ("root", root.T @ root, covariance),
        ("log_det", short.log_det, torch.logdet(matrix)),
        ("covariance_diagonal", short.covariance_diagonal, covariance.diagonal()),
    ]:
        assert found.dtype == torch.float64, name
        assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-9, name


contract = pytest.mark.parametrize("name", CASES)
both_precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@contract
@both_precisions
def test_to_dense_is_diagonal_plus_outer_products(name: str, dtype: torch.dtype) -> None:
    operator, matrix = make(name, dtype)
    assert_close(operator.to_dense(), matrix, dtype)
    assert operator.n_parameters == P
    assert operator.rank == len(operator.magnitudes)
    assert operator.n_floored == 0


@contract
@both_precisions
def test_matmat_is_the_matrix_product(name: str, dtype: torch.dtype) -> None:
    operator, matrix = make(name, dtype)
    X = draw(P, 5, seed=3).to(dtype)
    assert_close(operator.matmat(X), matrix @ X.double(), dtype)


@contract
def test_matmat_is_linear_symmetric_and_repeatable(name: str) -> None:
    operator, matrix = make(name)
    X, Y = draw(P, 4, seed=3), draw(P, 4, seed=4)
    assert_close(operator.matmat(2 * X - 3 * Y), 2 * operator.matmat(X) - 3 * operator.matmat(Y), torch.float64)
    assert_close(X.T @ operator.matmat(Y), operator.matmat(X).T @ Y, torch.float64, scale=float(matrix.norm()) * P)
    assert torch.equal(operator.matmat(X), operator.matmat(X))
    for j in range(P):
        unit = torch.eye(P, dtype=torch.float64)[:, j : j + 1]
        assert_close(operator.matmat(unit)[:, 0], matrix[:, j], torch.float64)
    assert_close(operator.matmat(X)[:, 1:2], operator.matmat(X[:, 1:2]), torch.float64)


@contract
@both_precisions
def test_quadratic_of_a_stack_of_vectors(name: str, dtype: torch.dtype) -> None:
    operator, matrix = make(name, dtype)
    x = draw(2, 3, P, seed=5).to(dtype)
    expected = torch.tensor([[float(v @ matrix @ v) for v in row.double()] for row in x], dtype=torch.float64)
    assert_close(operator.quadratic(x), expected, dtype)
    assert_close(operator.quadratic(x[0, 0]), expected[0, 0], dtype)


@contract
@both_precisions
def test_variance_and_its_trace(name: str, dtype: torch.dtype) -> None:
    operator, matrix = make(name, dtype)
    rows = draw(4, 3, P, seed=6).to(dtype)
    covariance = torch.linalg.inv(matrix)
    expected = torch.stack([X @ covariance @ X.T for X in rows.double()])
    variance = operator.variance(rows)
    assert_close(variance, expected, dtype)
    assert torch.equal(variance, operator.variance(rows))
    assert float((variance - variance.mT).abs().max()) <= RTOL[dtype] * float(expected.abs().max())
    traces = torch.stack([torch.trace(V) for V in expected])
    assert_close(operator.variance_trace(rows), traces, dtype)
    assert_close(operator.variance(rows[0]), expected[0], dtype)


@contract
@both_precisions
def test_covariance_diagonal_is_that_of_the_inverse(name: str, dtype: torch.dtype) -> None:
    operator, matrix = make(name, dtype)
    assert_close(operator.covariance_diagonal, torch.linalg.inv(matrix).diagonal(), dtype)


@contract
@both_precisions
def test_coordinate_variances_are_those_along_the_vectors_of_the_basis(name: str, dtype: torch.dtype) -> None:
    operator, matrix = make(name, dtype)
    K = torch.eye(P, dtype=torch.float64) if operator.basis is None else kronecker_basis()[1]
    expected = torch.stack([k @ torch.linalg.inv(matrix) @ k for k in K.T])
    assert_close(operator.coordinate_variances, expected, dtype)


@contract
@both_precisions
def test_direction_variances_and_the_trace_of_the_inverse(name: str, dtype: torch.dtype) -> None:
    operator, matrix = make(name, dtype)
    covariance = torch.linalg.inv(matrix)
    U = operator.directions.double()
    U = U if operator.basis is None else kronecker_basis()[1] @ U
    expected = (U * (covariance @ U)).sum(0)
    assert operator.direction_variances.dtype == dtype
    assert torch.allclose(operator.direction_variances.double(), expected, rtol=RTOL[dtype], atol=RTOL[dtype])
    assert_close(operator.variance_sum, covariance.trace(), dtype)


@contract
@both_precisions
def test_the_root_map_times_its_transpose_is_the_covariance(name: str, dtype: torch.dtype) -> None:
    operator, matrix = make(name, dtype)
    # a map on rows: applied to the unit vectors it gives its transposed matrix
    A = operator.root(torch.eye(P, dtype=dtype)).T.double()
    assert_close((A @ A.T).to(dtype), torch.linalg.inv(matrix), dtype)
    noise = draw(2, 3, P, seed=7).to(dtype)
    assert_close(operator.root(noise), noise.double() @ A.T, dtype)


@contract
@both_precisions
def test_log_det(name: str, dtype: torch.dtype) -> None:
    operator, matrix = make(name, dtype)
    expected = torch.linalg.slogdet(matrix)[1]
    assert_close(operator.log_det, expected, dtype, scale=max(1.0, float(expected.abs())))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("stiffness", [1e6, 1e8, 1e10])
@pytest.mark.parametrize("kind", ["isotropic", "full diagonal"])
def test_stiff_precisions_keep_their_log_det_and_their_variances(
    kind: str, stiffness: float, dtype: torch.dtype
) -> None:
    n, k = 400, 40
    diagonal = tensor(1e-3)[0] if kind == "isotropic" else 1e-3 * uneven(n)
    magnitudes = 1e-3 * torch.logspace(0, 1, k, base=stiffness, dtype=torch.float64).flip(0)
    U = orthonormal(k, seed=8, n=n)
    exact = torch.diag(diagonal.expand(n)) + (U * magnitudes) @ U.T
    operator = LowRankPlusDiagonal(diagonal.to(dtype), U.to(dtype), magnitudes.to(dtype))
    tolerance = 1e-6 if dtype == torch.float64 else 0.05  # nats; the textbook form is off by 3,000 to 5,000
    if kind == "isotropic":
        expected = (n - k) * diagonal.log() + (diagonal + magnitudes).log().sum()
    else:
        # Sylvester's identity in its well-conditioned form
        inner = torch.diag(1 / magnitudes) + (U / diagonal[:, None]).T @ U
        expected = diagonal.log().sum() + magnitudes.log().sum() + torch.linalg.slogdet(inner)[1]
    assert abs(float(operator.log_det.double() - expected)) <= tolerance
    rows = draw(16, 1, n, seed=9)
    covariance = torch.linalg.inv(exact)
    variances = torch.stack([X @ covariance @ X.T for X in rows]).flatten()
    found = operator.variance(rows.to(dtype)).flatten().double()
    assert bool((found > 0).all())
    assert float((found / variances - 1).abs().max()) <= (1e-5 if dtype == torch.float64 else 1e-3)


# number of directions out of 23, ratio of the stiffest to the diagonal
STIFF = {"some directions": (6, 1e6), "all directions but one": (P - 1, 1e6), "all directions": (P, 1e6)}


@both_precisions
@pytest.mark.parametrize("in_basis", [False, True], ids=["axes", "basis"])
@pytest.mark.parametrize("case", STIFF)
def test_every_entry_of_the_covariance_s_diagonal_is_exact_and_positive(
    case: str, in_basis: bool, dtype: torch.dtype
) -> None:
    k, stiffness = STIFF[case]
    basis, K = kronecker_basis(dtype) if in_basis else (None, torch.eye(P, dtype=torch.float64))
    U, m = orthonormal(k, seed=12), stiffness * torch.logspace(0, -1, k, dtype=torch.float64)
    operator = LowRankPlusDiagonal(0.1 * uneven().to(dtype), U.to(dtype), m.to(dtype), basis)
    # of the exact matrix: rounding of U moves the directions, not the curvature along them
    matrix = K @ (torch.diag(0.1 * uneven()) + (U * m) @ U.T) @ K.T
    expected = torch.linalg.inv(matrix).diagonal()
    if k == P:
        assert float(expected.max()) < 1e-4  # against 1 to 100 without the directions
    found = operator.covariance_diagonal
    assert found.dtype == dtype
    assert bool((found > 0).all())
    assert float((found.double() / expected - 1).abs().max()) <= (1e-6 if dtype == torch.float64 else 1e-3)


def test_kl_divergence_of_a_stiff_precision_in_a_basis() -> None:
    """A reference with a large diagonal multiplies the small residual variances by it."""
    basis, K = kronecker_basis(torch.float32)
    U, m = orthonormal(P, seed=12), 1e6 * torch.logspace(0, -1, P, dtype=torch.float64)
    precision = LowRankPlusDiagonal(0.1 * uneven().float(), U.float(), m.float(), basis)
    reference = LowRankPlusDiagonal(3e5 * uneven().float(), orthonormal(2).float(), tensor(4e5, 2e5).float())
    dense = K @ (torch.diag(0.1 * uneven()) + (U * m) @ U.T) @ K.T
    expected = dense_kl(dense, reference.to_dense().double())
    assert expected > 1
    assert float(kl_divergence(precision, reference)) == pytest.approx(expected, rel=1e-3)


UNEVEN = {
    "by inner products": (torch.logspace(0, 2, 300, dtype=torch.float64), 1e6),
    "by QR, whitened directions nearly dependent": (torch.tensor([1e-6] * 4 + [1e6] * 296, dtype=torch.float64), 1e-5),
}


@both_precisions
@pytest.mark.parametrize("case", UNEVEN)
def test_log_det_and_its_gradients_with_an_uneven_diagonal(case: str, dtype: torch.dtype) -> None:
    k, (D, largest) = 12, UNEVEN[case]
    U, D = orthonormal(k, seed=13, n=300).to(dtype), D.to(dtype)
    m = (largest * torch.logspace(0, -4, k, dtype=torch.float64)).to(dtype)
    operator = LowRankPlusDiagonal(D, U, m)
    assert (operator._inner.orthonormal is not None) == case.startswith("by QR")
    W, roots = U.double() / D.double().sqrt()[:, None], D.double().sqrt()
    whitened = torch.eye(300, dtype=torch.float64) + (W * m.double()) @ W.T
    inverse = torch.linalg.inv(whitened)
    assert float(operator.log_det.double()) == pytest.approx(
        float(torch.linalg.slogdet(whitened)[1] + 2 * roots.log().sum()), rel=1e-9 if dtype == torch.float64 else 1e-6
    )
    rtol = 1e-7 if dtype == torch.float64 else 1e-4
    assert torch.allclose(operator.direction_variances.double(), (W * (inverse @ W)).sum(0), rtol=rtol)
    found = operator.coordinate_variances.double() * roots.square()
    assert float((found - inverse.diagonal()).abs().max()) <= rtol
    V, s = operator._spectrum
    assert float((V.T.double() @ V.double() - torch.eye(k)).abs().max()) <= 100 * torch.finfo(dtype).eps
    rebuilt = torch.eye(300, dtype=torch.float64) + (V.double() * s.double()) @ V.T.double()
    assert float((rebuilt - whitened).abs().max()) <= rtol * float(whitened.abs().max())


class Touched(TorchDispatchMode):
    """Operations on tensors as long as the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if any(isinstance(a, Tensor) and P in a.shape for a in args):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("in_basis", [False, True], ids=["axes", "basis"])
def test_log_det_and_gradients_of_an_isotropic_diagonal_read_no_directions(in_basis: bool) -> None:
    diagonal, m = tensor(0.4)[0].requires_grad_(), tensor(2.0, 5.0, -0.1).requires_grad_()
    basis = kronecker_basis()[0] if in_basis else None
    U = orthonormal(3)
    with Touched() as touched:
        operator = LowRankPlusDiagonal(diagonal.detach(), U, m.detach(), basis)
        torch.autograd.grad(differentiable_log_det(diagonal, m, operator), [diagonal, m])
    assert touched.names == []


def test_variances_in_single_precision_are_not_a_small_difference_of_large_numbers() -> None:
    n, k = 2000, 50
    U = orthonormal(k, seed=10, n=n)
    magnitudes = torch.logspace(6, 2, k, dtype=torch.float64)
    operator = LowRankPlusDiagonal(tensor(1e-3)[0].float(), U.float(), magnitudes.float())
    rows = (draw(64, k, seed=11) @ U.T)[:, None, :]  # inputs well determined by the data
    expected = ((rows @ U).square() / (1e-3 + magnitudes)).sum((-2, -1))
    variance = operator.variance(rows.float())[:, 0, 0].double()
    assert bool((variance > 0).all())
    # the residual consists of rounding, which the prior inflates
    rounding = 3e-13 * rows.square().sum((-2, -1)) / 1e-3
    assert bool(((variance - expected).abs() <= 1e-3 * expected + rounding).all())


@both_precisions
@pytest.mark.parametrize(
    ("diagonal", "expected"),
    [(tensor(2.0)[0], 2), (torch.full((P,), 2.0, dtype=torch.float64), 2)],
    ids=["isotropic", "full diagonal"],
)
def test_what_is_not_positive_definite_is_floored_and_counted(
    diagonal: Tensor, expected: int, dtype: torch.dtype
) -> None:
    U = orthonormal(4).to(dtype)
    magnitudes = torch.tensor([5.0, -1.0, -2.0, -7.0], dtype=dtype)
    operator = LowRankPlusDiagonal(diagonal.to(dtype), U, magnitudes)
    assert operator.n_floored == expected
    assert bool(operator.log_det.isfinite())
    assert bool((operator.covariance_diagonal > 0).all())
    assert bool(operator.root(torch.eye(P, dtype=dtype)).isfinite().all())
    # positive definite directions are unchanged
    fine = operator.variance(U[:, :2].T[:, None, :])[:, 0, 0].double()
    assert torch.allclose(fine, 1 / tensor(7.0, 1.0), rtol=RTOL[dtype])
    floored = operator.variance(U[:, 2:].T[:, None, :])[:, 0, 0].double()
    assert bool((floored > 1 / (2 * 1e-3)).all())


WRONG = {
    "diagonal with a zero": (tensor(1.0, 0.0, 1.0), tensor(1.0), "positive"),
    "negative isotropic diagonal": (tensor(-1.0)[0], tensor(1.0), "positive"),
    "diagonal with NaN": (tensor(1.0, float("nan"), 1.0), tensor(1.0), "positive and finite"),
    "infinite diagonal": (tensor(float("inf"))[0], tensor(1.0), "finite"),
    "magnitude NaN": (tensor(1.0)[0], tensor(float("nan")), "Magnitudes"),
    "magnitude infinite": (tensor(1.0)[0], tensor(float("inf")), "Magnitudes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_invalid_precisions_are_refused(case: str) -> None:
    diagonal, magnitudes, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        LowRankPlusDiagonal(diagonal, orthonormal(1, n=3), magnitudes)


@pytest.mark.parametrize("kind", ["number", "one entry", "per parameter"])
@pytest.mark.parametrize("magnitudes", ["positive", "zero and negative", "none"])
@pytest.mark.parametrize("in_basis", [False, True], ids=["axes", "basis"])
def test_gradients_of_the_log_det_are_those_of_the_dense_one(kind: str, magnitudes: str, in_basis: bool) -> None:
    diagonal = {"number": tensor(2.3)[0], "one entry": tensor(2.3), "per parameter": uneven() + 1}[
        kind
    ].requires_grad_()
    m = {
        "positive": tensor(40.0, 3.0, 0.7, 0.02),
        "zero and negative": tensor(4.0, 0.0, -0.5),
        "none": tensor(),
    }[magnitudes].requires_grad_()
    U = orthonormal(len(m))
    basis, K = kronecker_basis() if in_basis else (None, torch.eye(P, dtype=torch.float64))
    operator = LowRankPlusDiagonal(diagonal.detach(), U, m.detach(), basis)
    value = differentiable_log_det(diagonal, m, operator)
    found = torch.autograd.grad(3 * value, [diagonal, m])
    dense = torch.logdet(K @ (torch.diag(diagonal.expand(P)) + (U * m) @ U.T) @ K.T)
    assert value.item() == pytest.approx(dense.item(), rel=1e-10)
    expected = torch.autograd.grad(3 * dense, [diagonal, m])
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_gradients_of_the_log_det_of_repeated_magnitudes_are_finite() -> None:
    diagonal, m = tensor(0.4)[0].requires_grad_(), tensor(2.0, 2.0, 2.0).requires_grad_()
    operator = LowRankPlusDiagonal(diagonal.detach(), orthonormal(3), m.detach())
    by_diagonal, by_magnitude = torch.autograd.grad(differentiable_log_det(diagonal, m, operator), [diagonal, m])
    assert float(by_diagonal) == pytest.approx((P - 3) / 0.4 + 3 / 2.4, rel=1e-12)
    assert torch.allclose(by_magnitude, torch.full((3,), 1 / 2.4, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("first", CASES)
@pytest.mark.parametrize("second", ["isotropic", "full diagonal", "rank 0, full diagonal"])
def test_kl_divergence_is_the_dense_one_in_both_directions(first: str, second: str) -> None:
    p, _ = make(first)
    case = CASES[second]()
    U = orthonormal(len(case.magnitudes), seed=20)
    q = LowRankPlusDiagonal(1.7 * case.diagonal, U, case.magnitudes)
    for one, other in ((p, q), (q, p)):
        dense_one, dense_other = one.to_dense(), other.to_dense()
        if other.basis is not None:
            with pytest.raises(ValueError, match="reference without a Kronecker basis"):
                kl_divergence(one, other)
            continue
        expected = dense_kl(dense_one, dense_other)
        assert expected > 0.1
        assert float(kl_divergence(one, other)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", WITHOUT_BASIS)
@both_precisions
def test_kl_divergence_of_equal_precisions_is_zero(name: str, dtype: torch.dtype) -> None:
    operator, _ = make(name, dtype)
    again, _ = make(name, dtype)
    assert abs(float(kl_divergence(operator, again))) <= (1e-10 if dtype == torch.float64 else 1e-4)


def rows_by_parameter(n: int = 4, r: int = 3) -> RowMatrix:
    """Rows in parts of the basis' shapes: factors with few and many positions, shared or not, and plain rows."""
    few, many = (
        OuterRows(draw(n, r, T, o, seed=T), draw(n, 1, T, i, seed=9 + T)) for T, o, i in ((2, 3, 4), (5, 2, 2))
    )
    own = OuterRows(draw(n, 1, 1, 1, seed=7), draw(n, r, 1, 5, seed=8))
    assert few.contractions_are_cheaper
    assert not many.contractions_are_cheaper
    assert not own.contractions_are_cheaper
    return RowMatrix((few, many, own, draw(n, r, 2, seed=6)))


@contract
@both_precisions
@pytest.mark.parametrize("in_span", [False, True], ids=["any rows", "rows in the span of the directions"])
def test_variances_of_rows_by_parameter(name: str, dtype: torch.dtype, in_span: bool, monkeypatch) -> None:
    monkeypatch.setattr("debiased_laplace.linalg.row_matrix._CHUNK_BYTES", 300)
    operator, matrix = make(name, dtype)
    rows = rows_by_parameter()
    if in_span and operator.rank:
        # nothing is left outside the directions: no difference of nearly equal numbers
        K = torch.eye(P, dtype=torch.float64) if operator.basis is None else operator.basis.to(torch.float64).to_dense()
        V = rows.dense() @ K @ operator.directions.double() @ operator.directions.double().T @ K.T
        rows = RowMatrix(V.split([12, 4, 5, 2], dim=-1))
    V = rows.dense()
    rows = RowMatrix(
        tuple(
            OuterRows(part.left.to(dtype), part.right.to(dtype)) if isinstance(part, OuterRows) else part.to(dtype)
            for part in rows.parts
        )
    )
    expected = V @ torch.linalg.inv(matrix) @ V.mT
    for sample, found in zip(expected, operator.variance_of(rows), strict=True):
        assert_close(found, sample, dtype)
    variances = operator.variance_of(rows, covariances=False)
    for sample, found in zip(expected.diagonal(dim1=1, dim2=2), variances, strict=True):
        assert_close(found, sample, dtype)
