r"""Conjugate gradients for $A x = b$, A symmetric and positive definite, given products with A only.

Directions, step lengths and curvatures are part of the answer: debiasing keeps the first and replaces the others. The
method ends where it must and says why; it never returns a NaN.

References:
    Hestenes & Stiefel (1952), J. Res. Nat. Bur. Standards 49(6), doi 10.6028/jres.049.044; Nocedal & Wright (2006),
    Numerical Optimization, Algorithms 5.2 and 5.3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.linalg.accumulation import accumulation_dtype

LinearMap = Callable[[Tensor], Tensor]
Status = Literal["converged", "iteration limit", "negative curvature", "breakdown"]


@dataclass(frozen=True)
class ConjugateGradientOutcome:
    r"""How conjugate gradients ended.

    Attributes:
        status: "converged"; "iteration limit"; "negative curvature", where a direction p has $p^\top A p \le 0$; or
            "breakdown", where a product or a step is not finite or the preconditioner is not positive definite.
        products: with A.
        reason: one sentence that says why it stopped.
    """

    status: Status
    products: int
    reason: str

    @property
    def converged(self) -> bool:
        """Whether the residual is below the tolerance."""
        return self.status == "converged"


@dataclass(frozen=True, eq=False)
class ConjugateGradients:
    r"""What conjugate gradients found.

    Attributes:
        solution: x, the last iterate that is finite.
        step_lengths: $\alpha_i$ of each iteration.
        curvatures: $p_i^\top A p_i$ along each direction.
        residual_norms: $\|b - A x\|$ before the first and after each iteration, as the recursion has it.
        directions: $p_i$ as columns, where they were asked for.
        outcome: how it ended.
    """

    solution: Float[Tensor, " P"]
    step_lengths: Float[Tensor, " k"]
    curvatures: Float[Tensor, " k"]
    residual_norms: Float[Tensor, " k1"]
    directions: Float[Tensor, "P k"] | None
    outcome: ConjugateGradientOutcome


@dataclass(frozen=True, eq=False)
class ConjugateDirection:
    """A direction, A times it, and the step that conjugate gradients take along it."""

    vector: Float[Tensor, " P"]
    product: Float[Tensor, " P"]
    curvature: float
    step_length: float


def inner_product(u: Float[Tensor, " P"], v: Float[Tensor, " P"]) -> float:
    """Of two vectors, accumulated in double precision."""
    exact = accumulation_dtype(u)
    return float(torch.dot(u.to(exact), v.to(exact)))


class ConjugateGradientIterations:
    """Conjugate gradients one direction at a time, for callers that look at each before they want the next.

    Attributes:
        solution: x so far.
        residual_norms: so far.
        products: so far.
        outcome: how it ended; None while it goes on.
    """

    def __init__(
        self,
        matvec: LinearMap,
        b: Float[Tensor, " P"],
        *,
        preconditioner: LinearMap | None,
        max_iterations: int,
        tolerance: float,
        x0: Float[Tensor, " P"] | None = None,
    ):
        self._matvec, self._preconditioner, self._limit = matvec, preconditioner, max_iterations
        self.products = self._iterations = 0
        self._threshold = tolerance * sqrt(inner_product(b, b))
        self._direction: Tensor | None = None
        self._rho = 0.0
        self.outcome: ConjugateGradientOutcome | None = None
        self.solution = torch.zeros_like(b) if x0 is None else x0.clone()
        self._residual = b.clone()
        if inner_product(b, b) == 0:
            self.solution = torch.zeros_like(b)
        elif x0 is not None and bool((x0 != 0).any()):
            self._residual = b - self._product(x0)
        self.residual_norms = [sqrt(inner_product(self._residual, self._residual))]
        if not isfinite(self.residual_norms[0]):
            raise ValueError("A matrix-vector product with x0 gave NaN or infinity.")

    def advance(self) -> ConjugateDirection | None:
        """The next direction, and a step along it; None where there is none, with `outcome` saying why."""
        if self.outcome is not None or self._is_over():
            return None
        z = self._residual
        if self._preconditioner is not None:
            z = _applied(self._preconditioner, z, "preconditioner")
        rho = inner_product(self._residual, z)
        if not (isfinite(rho) and rho > 0):
            return self._end("breakdown", f"the preconditioner is not positive definite: r'M r = {rho:.3g}")
        p = z.clone() if self._direction is None else z + (rho / self._rho) * self._direction
        q = self._product(p)
        curvature = inner_product(p, q)
        if not isfinite(curvature):
            return self._end("breakdown", "a matrix-vector product gave NaN or infinity")
        if curvature <= 0:
            return self._end("negative curvature", f"direction {self._iterations} has curvature {curvature:.3g}")
        step = rho / curvature
        solution, residual = self.solution + step * p, self._residual - step * q
        norm = sqrt(inner_product(residual, residual)) if bool(solution.isfinite().all()) else float("nan")
        if not isfinite(norm):
            return self._end("breakdown", f"the step along direction {self._iterations} is not finite")
        self.solution, self._residual, self._direction, self._rho = solution, residual, p, rho
        self.residual_norms.append(norm)
        self._iterations += 1
        return ConjugateDirection(p, q, curvature, step)

    def _is_over(self) -> bool:
        norm = self.residual_norms[-1]
        if norm <= self._threshold:
            self._end("converged", f"the residual's norm {norm:.3g} is at most {self._threshold:.3g}")
        elif self._iterations >= self._limit:
            self._end(
                "iteration limit",
                f"after {self._limit} iterations the residual's norm {norm:.3g} is above the tolerance",
            )
        return self.outcome is not None

    def _end(self, status: Status, reason: str) -> ConjugateDirection | None:
        self.outcome = ConjugateGradientOutcome(status, self.products, reason)
        return None

    def _product(self, x: Tensor) -> Tensor:
        self.products += 1
        return _applied(self._matvec, x, "matvec")


def conjugate_gradients(
    matvec: LinearMap,
    b: Float[Tensor, " P"],
    *,
    preconditioner: LinearMap | None = None,
    max_iterations: int,
    tolerance: float,
    x0: Float[Tensor, " P"] | None = None,
    keep_directions: bool = False,
) -> ConjugateGradients:
    r"""Solve $A x = b$ for a symmetric positive definite A, or say why not.

    Vectors stay in the dtype and on the device of b, inner products are accumulated in double precision. Cost: one
    product an iteration, and one for an x0 that is not zero; memory five vectors, and k more where directions are kept.

    Args:
        matvec: maps x to A x.
        b: right-hand side.
        preconditioner: maps r to $M r$, M positive definite and close to the inverse of A; None: the identity.
        max_iterations: at least 0.
        tolerance: converged once $\|b - A x\| \le$ tolerance $\cdot \|b\|$; at least 0.
        x0: where to start; None: at zero.
        keep_directions: return the directions too.

    Returns:
        The solution, or the last iterate before the reason that `outcome` gives. A right-hand side of zero has the
        solution zero, wherever the start.

    Raises:
        ValueError: if arguments are out of range or not finite, or `matvec` or `preconditioner` returns another shape.

    References:
        Nocedal & Wright (2006), Algorithm 5.3.
    """
    _check(b, x0, max_iterations, tolerance)
    process = ConjugateGradientIterations(
        matvec, b, preconditioner=preconditioner, max_iterations=max_iterations, tolerance=tolerance, x0=x0
    )
    steps, curvatures, directions = [], [], []
    while (found := process.advance()) is not None:
        steps.append(found.step_length)
        curvatures.append(found.curvature)
        if keep_directions:
            directions.append(found.vector)
    exact = accumulation_dtype(b)
    outcome = process.outcome
    assert outcome is not None
    return ConjugateGradients(
        process.solution,
        b.new_tensor(steps, dtype=exact),
        b.new_tensor(curvatures, dtype=exact),
        b.new_tensor(process.residual_norms, dtype=exact),
        _columns(directions, b) if keep_directions else None,
        outcome,
    )


def _columns(vectors: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(vectors, dim=1) if vectors else like.new_empty(len(like), 0)


def _applied(function: LinearMap, x: Tensor, name: str) -> Tensor:
    found = function(x)
    if not isinstance(found, Tensor) or found.shape != x.shape:
        came = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"Expected {name} to return a tensor of shape {tuple(x.shape)}; got {came}.")
    return found.to(x.dtype)


def _check(b: Tensor, x0: Tensor | None, max_iterations: int, tolerance: float) -> None:
    if b.ndim != 1 or not b.is_floating_point():
        raise ValueError(f"Expected b as a vector of floats; got {b.dtype} of shape {tuple(b.shape)}.")
    if x0 is not None and (x0.shape != b.shape or x0.dtype != b.dtype):
        raise ValueError(
            f"Expected x0 like b, {b.dtype} of shape {tuple(b.shape)}; got {x0.dtype} of shape {tuple(x0.shape)}."
        )
    if not bool(b.isfinite().all()) or (x0 is not None and not bool(x0.isfinite().all())):
        raise ValueError("Expected a finite right-hand side and start; got NaN or infinity.")
    if isinstance(max_iterations, bool) or not isinstance(max_iterations, int) or max_iterations < 0:
        raise ValueError(f"max_iterations must be a whole number of at least 0; got {max_iterations!r}.")
    if not (isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance must be a finite number of at least 0; got {tolerance!r}.")
