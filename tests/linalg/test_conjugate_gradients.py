"""Conjugate gradients against SciPy and a naive transcription, and the cases that end without a solution."""

import math

import jaxtyping
import numpy as np
import pytest
import torch
from oracles import naive_conjugate_gradients
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from debiased_laplace import conjugate_gradients


def problem(P: int = 40, condition: float = 1e3, seed: int = 3, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(P, P, generator=generator, dtype=torch.float64))[0]
    A = (Q * torch.logspace(0, -math.log10(condition), P, dtype=torch.float64)) @ Q.T * 2.7
    return ((A + A.T) / 2).to(dtype), torch.randn(P, generator=generator, dtype=torch.float64).to(dtype)


def jacobi(A: Tensor) -> Tensor:
    return torch.diag(1 / A.diagonal())


PROBLEMS = {
    "plain": {},
    "well conditioned": {"condition": 3.0},
    "stiff": {"condition": 1e6},
    "one unknown": {"P": 1, "condition": 1.0},
    "float32": {"dtype": torch.float32, "condition": 30.0},
}


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("start", ["zero", "elsewhere"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_agrees_with_scipy_at_every_number_of_iterations(name: str, start: str, preconditioned: bool) -> None:
    A, b = problem(**PROBLEMS[name])
    x0 = None if start == "zero" else torch.linspace(-1, 1, len(b), dtype=b.dtype)
    M = jacobi(A) if preconditioned else None
    for iterations in (0, 1, 2, 5, 12):
        theirs, info = cg(
            A.numpy(),
            b.numpy(),
            x0=None if x0 is None else x0.numpy(),
            rtol=1e-5,
            maxiter=iterations,
            M=None if M is None else M.numpy(),
        )
        ours = conjugate_gradients(
            lambda v: A @ v,
            b,
            preconditioner=None if M is None else lambda v: M @ v,
            max_iterations=iterations,
            tolerance=1e-5,
            x0=x0,
        )
        tolerance = 1e-4 if b.dtype == torch.float32 else 1e-8
        scale = float(np.abs(theirs).max()) + 1e-12
        assert np.abs(ours.solution.numpy() - theirs).max() <= tolerance * scale
        assert ours.solution.dtype == b.dtype
        # SciPy reports the limit also if its last iteration converged
        assert ours.outcome.converged or info == iterations


def test_converges_where_scipy_does_and_after_as_many_products() -> None:
    A, b = problem(condition=6.0)
    counted = []

    def product(v):
        counted.append(1)
        return A.numpy() @ v

    theirs, info = cg(LinearOperator(A.shape, product, dtype=np.float64), b.numpy(), rtol=1e-4, maxiter=500)
    ours = conjugate_gradients(lambda v: A @ v, b, max_iterations=500, tolerance=1e-4)
    assert info == 0
    assert ours.outcome.converged
    assert ours.outcome.products == len(counted) == len(ours.step_lengths)
    torch.testing.assert_close(ours.solution, torch.from_numpy(theirs), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ours.solution, torch.linalg.solve(A, b), rtol=1e-2, atol=1e-2)
    assert float((b - A @ ours.solution).norm()) <= 1.01e-4 * float(b.norm())


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("start", ["zero", "elsewhere"])
def test_directions_steps_and_residuals_are_those_of_the_textbook(preconditioned: bool, start: str) -> None:
    A, b = problem(condition=50.0)
    x0 = None if start == "zero" else torch.linspace(-1, 1, len(b), dtype=b.dtype)
    M = jacobi(A) if preconditioned else None
    x, directions, steps = naive_conjugate_gradients(A, b, 8, M, x0)
    ours = conjugate_gradients(
        lambda v: A @ v,
        b,
        preconditioner=None if M is None else lambda v: M @ v,
        max_iterations=8,
        tolerance=0.0,
        x0=x0,
        keep_directions=True,
    )
    assert ours.directions is not None
    torch.testing.assert_close(ours.solution, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.directions, torch.stack(directions, 1), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(ours.step_lengths, torch.tensor(steps, dtype=b.dtype), rtol=1e-9, atol=0)
    U = ours.directions
    torch.testing.assert_close(ours.curvatures, (U * (A @ U)).sum(0), rtol=1e-10, atol=0)
    conjugate = U.T @ A @ U
    scale = conjugate.diagonal().sqrt()
    assert float((conjugate / scale / scale[:, None] - torch.eye(8, dtype=b.dtype)).abs().max()) < 1e-9
    starts = torch.zeros_like(b) if x0 is None else x0
    iterates = [starts + U[:, :i] @ ours.step_lengths[:i] for i in range(9)]
    true_residuals = torch.stack([(b - A @ at).norm() for at in iterates])
    torch.testing.assert_close(ours.residual_norms, true_residuals, rtol=1e-9, atol=0)
    assert ours.outcome.status == "iteration limit"
    assert ours.outcome.products == 8 + (x0 is not None)


def test_inner_products_are_accumulated_in_double_precision() -> None:
    """A sum of a million equal squares in single precision has only two or three correct digits."""
    P = 1_000_000
    b = torch.full((P,), 0.1)
    found = conjugate_gradients(lambda v: 3.0 * v, b, max_iterations=1, tolerance=0.0)
    assert float(found.residual_norms[0]) == pytest.approx(float(b[0].double()) * P**0.5, rel=1e-10)
    assert float(found.step_lengths[0]) == pytest.approx(1 / 3, rel=1e-7)


def test_no_directions_unless_asked_for() -> None:
    A, b = problem()
    assert conjugate_gradients(lambda v: A @ v, b, max_iterations=3, tolerance=0.0).directions is None


def test_a_right_hand_side_of_zero() -> None:
    A, b = problem()
    for x0 in (None, b):
        found = conjugate_gradients(
            lambda v: A @ v, 0 * b, max_iterations=5, tolerance=1e-3, x0=x0, keep_directions=True
        )
        assert found.outcome.converged
        assert found.outcome.products == 0
        assert float(found.solution.abs().max()) == 0
        assert found.directions is not None
        assert found.directions.shape == (len(b), 0)


def test_a_start_at_the_solution() -> None:
    A, b = problem(condition=2.0)
    x = torch.linalg.solve(A, b)
    found = conjugate_gradients(lambda v: A @ v, b, max_iterations=5, tolerance=1e-9, x0=x)
    assert found.outcome.converged
    assert len(found.step_lengths) == 0
    assert found.outcome.products == 1


def test_negative_curvature_stops_at_the_last_iterate() -> None:
    A, b = problem(condition=3.0)
    v = b / b.norm()
    # the first direction is b itself
    first = conjugate_gradients(lambda x: A @ x - 9 * v * (v @ x), b, max_iterations=5, tolerance=1e-9)
    assert first.outcome.status == "negative curvature"
    assert "direction 0" in first.outcome.reason
    assert float(first.solution.abs().max()) == 0
    H = A - 2.0 * torch.eye(len(b), dtype=b.dtype)
    later = conjugate_gradients(lambda x: H @ x, b, max_iterations=50, tolerance=1e-12)
    assert later.outcome.status == "negative curvature"
    k = len(later.step_lengths)
    assert len(later.residual_norms) == k + 1
    assert later.outcome.products == k + 1
    torch.testing.assert_close(later.solution, naive_conjugate_gradients(H, b, k)[0], rtol=1e-8, atol=1e-8)
    assert bool((later.curvatures > 0).all())


BREAKDOWNS = {
    "a product is NaN": ({"matvec": lambda v: v * float("nan")}, "NaN or infinity"),
    "a product is infinite": ({"matvec": lambda v: v * float("inf")}, "NaN or infinity"),
    "a preconditioner is negative": ({"preconditioner": lambda v: -v}, "not positive definite"),
    "a preconditioner is zero": ({"preconditioner": lambda v: 0 * v}, "not positive definite"),
    "a preconditioner is NaN": ({"preconditioner": lambda v: v * float("nan")}, "not positive definite"),
    "a step overflows": ({"matvec": lambda v: 1e-308 * v}, "not finite"),
}


@pytest.mark.parametrize("name", BREAKDOWNS)
def test_breakdown_is_reported_and_leaves_a_finite_solution(name: str) -> None:
    change, message = BREAKDOWNS[name]
    b = torch.tensor([1e10, -2e10, 5.0], dtype=torch.float64)
    found = conjugate_gradients(**{"matvec": lambda v: 2 * v, "b": b, "max_iterations": 5, "tolerance": 1e-9, **change})
    assert found.outcome.status == "breakdown"
    assert message in found.outcome.reason
    assert bool(found.solution.isfinite().all())
    assert not found.outcome.converged


def test_a_singular_matrix_with_the_right_hand_side_in_its_range() -> None:
    A, b = problem(condition=10.0)
    A[:, 0] = A[0, :] = 0
    b = A @ b
    found = conjugate_gradients(lambda v: A @ v, b, max_iterations=100, tolerance=1e-9)
    assert found.outcome.converged
    torch.testing.assert_close(A @ found.solution, b, rtol=1e-7, atol=1e-8)


WRONG = {
    "b is a matrix": ({"b": torch.ones(2, 2)}, "b"),
    "b holds integers": ({"b": torch.ones(2, dtype=torch.int64)}, "b"),
    "b is infinite": ({"b": torch.tensor([1.0, float("inf")])}, "finite"),
    "x0 has another length": ({"x0": torch.ones(3)}, "x0"),
    "x0 has another dtype": ({"x0": torch.ones(2, dtype=torch.float64)}, "x0 like b"),
    "x0 is NaN": ({"x0": torch.tensor([1.0, float("nan")])}, "finite"),
    "a negative number of iterations": ({"max_iterations": -1}, "max_iterations"),
    "half an iteration": ({"max_iterations": 0.5}, "max_iterations"),
    "a negative tolerance": ({"tolerance": -1e-3}, "tolerance"),
    "a NaN tolerance": ({"tolerance": float("nan")}, "tolerance"),
    "matvec returns another shape": ({"matvec": lambda v: v[:1]}, "matvec"),
    "matvec returns nothing": ({"matvec": lambda v: None}, "matvec"),
    "preconditioner returns another shape": ({"preconditioner": lambda v: v[:, None]}, "preconditioner"),
    "matvec is NaN at x0": ({"matvec": lambda v: v * float("nan"), "x0": torch.ones(2)}, "x0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_a_value_error(name: str) -> None:
    change, message = WRONG[name]
    given = {"matvec": lambda v: 2 * v, "b": torch.ones(2), "max_iterations": 4, "tolerance": 1e-3}
    # the run-time type check precedes the package's own where a shape or a type is wrong
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match=message):
        conjugate_gradients(**{**given, **change})
