"""Common result type of the eigensolvers."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class SolverOutcome:
    """Outcome of an eigensolver.

    Attributes:
        solver: name of the solver.
        converged: whether every residual is below the tolerance.
        products: matrix-vector products used (0 for a direct solver).
        reason: why the solver stopped, in one sentence.
    """

    solver: Literal["gram", "dense", "lanczos"]
    converged: bool
    products: int
    reason: str


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    r"""Leading eigenpairs of a symmetric positive semi-definite matrix, by decreasing eigenvalue.

    Attributes:
        values: eigenvalues.
        vectors: orthonormal columns.
        residuals: $\|H u - \lambda u\|$, in the unit of the eigenvalues.
        outcome: outcome of the solver.
        dropped: largest eigenvalue that was left out; 0 if none was.
        projections: $V U$ for a matrix $V^\top V / n$, if the solver computed it anyway; else None.

    Raises:
        ValueError: if the eigenvalues are not in decreasing order.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "P k"]
    residuals: Float[Tensor, " k"]
    outcome: SolverOutcome
    dropped: float = 0.0
    projections: Float[Tensor, "R k"] | None = None

    def __post_init__(self) -> None:
        if bool((self.values.diff() > 0).any()):
            raise ValueError(f"Expected eigenvalues in decreasing order; got {self.values.tolist()}.")

    def leading(self, k: int) -> "Eigenpairs":
        """Return the k leading eigenpairs."""
        projections = None if self.projections is None else self.projections[:, :k]
        dropped = float(self.values[k]) if k < len(self.values) else self.dropped
        return Eigenpairs(self.values[:k], self.vectors[:, :k], self.residuals[:k], self.outcome, dropped, projections)


def numerical_rank(values: Float[Tensor, " k"], threshold: float) -> int:
    """Return how many eigenvalues, in decreasing order, exceed the threshold relative to the largest."""
    if values.numel() == 0 or not bool(values[0] > 0):
        return 0
    return int((values > threshold * values[0]).sum())
