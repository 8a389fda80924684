r"""Conjugate gradients for $A x = b$, A symmetric and positive definite, given products with A only.

The result includes the directions, step lengths and curvatures: debiasing keeps the directions and replaces the step
lengths and curvatures. The iteration stops before a value becomes NaN or infinite, and the outcome states the reason.

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

from debiased_laplace.checks import boolean, function, integer, number, tensor
from debiased_laplace.linalg.accumulation import accumulation_dtype

LinearMap = Callable[[Tensor], Tensor]
Status = Literal["converged", "iteration limit", "negative curvature", "breakdown"]


@dataclass(frozen=True)
class ConjugateGradientOutcome:
    r"""Outcome of conjugate gradients.

    Attributes:
        status: "converged"; "iteration limit"; "negative curvature" if a direction p has $p^\top A p \le 0$; or
            "breakdown" if a product or a step is not finite or the preconditioner is not positive definite.
        products: number of products with A.
        reason: why the iteration stopped, in one sentence.
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
    r"""Result of conjugate gradients.

    Attributes:
        solution: x, the last finite iterate.
        step_lengths: $\alpha_i$ of each iteration.
        curvatures: $p_i^\top A p_i$ along each direction.
        residual_norms: $\|b - A x\|$ before the first and after each iteration, from the recursion.
        directions: $p_i$ as columns; None unless `keep_directions`.
        outcome: why the iteration stopped.
    """

    solution: Float[Tensor, " P"]
    step_lengths: Float[Tensor, " k"]
    curvatures: Float[Tensor, " k"]
    residual_norms: Float[Tensor, " k1"]
    directions: Float[Tensor, "P k"] | None
    outcome: ConjugateGradientOutcome


@dataclass(frozen=True, eq=False)
class ConjugateDirection:
    """A search direction p, its product A p, its curvature, and the step length along it."""

    vector: Float[Tensor, " P"]
    product: Float[Tensor, " P"]
    curvature: float
    step_length: float


def inner_product(u: Float[Tensor, " P"], v: Float[Tensor, " P"]) -> float:
    """Return the inner product of two vectors, accumulated in double precision."""
    exact = accumulation_dtype(u)
    return float(torch.dot(u.to(exact), v.to(exact)))


class ConjugateGradientIterations:
    """Conjugate gradients one direction at a time, for callers that decide after each whether to continue.

    Attributes:
        solution: current iterate x.
        residual_norms: one for each iterate so far.
        products: number of products with A so far.
        outcome: why the iteration stopped; None while it runs.

    Raises:
        ValueError: if the product with x0 is not finite.
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
            raise ValueError("Expected a finite product of the matrix with x0; got NaN or infinity.")

    def advance(self) -> ConjugateDirection | None:
        """Take the next step and return its direction; None at the end, with the reason in `outcome`."""
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
    r"""Solve $A x = b$ for a symmetric positive definite A.

    Vectors keep the dtype and device of b; inner products are accumulated in double precision. Cost: one product per
    iteration, and one for a nonzero x0; memory: five vectors, and k more if directions are kept.

    Args:
        matvec: maps x to A x.
        b: right-hand side.
        preconditioner: maps r to $M r$, M positive definite and close to the inverse of A; None: the identity.
        max_iterations: maximal number of iterations, at least 0.
        tolerance: convergence means $\|b - A x\| \le$ tolerance $\cdot \|b\|$; at least 0.
        x0: start; None: zero.
        keep_directions: also return the directions.

    Returns:
        The solution, or the last finite iterate if the method stopped early. For b = 0 the solution is zero,
        whatever x0.

    Raises:
        ValueError: if an argument is out of range or not finite, `matvec` or `preconditioner` returns another shape, or
            the product with x0 is not finite.

    References:
        Nocedal & Wright (2006), Algorithm 5.3.
    """
    _check(b, x0, max_iterations, tolerance)
    function(matvec, "matvec")
    if preconditioner is not None:
        function(preconditioner, "preconditioner")
    boolean(keep_directions, "keep_directions")
    process = ConjugateGradientIterations(
        matvec, b, preconditioner=preconditioner, max_iterations=max_iterations, tolerance=tolerance, x0=x0
    )
    steps, curvatures, directions = [], [], []
    while (direction := process.advance()) is not None:
        steps.append(direction.step_length)
        curvatures.append(direction.curvature)
        if keep_directions:
            directions.append(direction.vector)
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
    product = function(x)
    if not isinstance(product, Tensor) or product.shape != x.shape:
        came = f"shape {tuple(product.shape)}" if isinstance(product, Tensor) else type(product).__name__
        raise ValueError(f"Expected {name} to return a tensor of shape {tuple(x.shape)}; got {came}.")
    return product.to(x.dtype)


def _check(b: Tensor, x0: Tensor | None, max_iterations: int, tolerance: float) -> None:
    tensor(b, "b")
    if x0 is not None:
        tensor(x0, "x0")
    if b.ndim != 1:
        raise ValueError(f"Expected b to be a floating-point vector; got {b.dtype} of shape {tuple(b.shape)}.")
    if x0 is not None and (x0.shape != b.shape or x0.dtype != b.dtype):
        raise ValueError(
            f"Expected x0 like b ({b.dtype} of shape {tuple(b.shape)}); got {x0.dtype} of shape {tuple(x0.shape)}."
        )
    if not bool(b.isfinite().all()) or (x0 is not None and not bool(x0.isfinite().all())):
        raise ValueError("Expected finite b and x0; got NaN or infinity.")
    integer(max_iterations, "max_iterations", minimum=0)
    number(tolerance, "tolerance", low=0)
