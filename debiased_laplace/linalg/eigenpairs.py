"""What an eigensolver returns, whichever it was."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class SolverOutcome:
    """How an eigensolver ended.

    Attributes:
        solver: which one ran.
        converged: whether every residual is below the tolerance.
        products: matrix-vector products used (0 for a direct solver).
        reason: one sentence that says why it stopped.
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
        outcome: how the solver ended.
        dropped: the largest eigenvalue that was left out; 0 where none was.
        projections: $V U$, where the matrix is $V^\top V / n$ and the solver had it at no cost.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "P k"]
    residuals: Float[Tensor, " k"]
    outcome: SolverOutcome
    dropped: float = 0.0
    projections: Float[Tensor, "R k"] | None = None

    def __post_init__(self) -> None:
        if bool((self.values.diff() > 0).any()):
            raise ValueError("Eigenvalues must be in decreasing order.")

    def leading(self, k: int) -> "Eigenpairs":
        """The k leading ones."""
        projections = None if self.projections is None else self.projections[:, :k]
        dropped = float(self.values[k]) if k < len(self.values) else self.dropped
        return Eigenpairs(self.values[:k], self.vectors[:, :k], self.residuals[:k], self.outcome, dropped, projections)


def supported(values: Float[Tensor, " k"], threshold: float) -> int:
    """How many leading eigenvalues (in decreasing order) exceed the threshold relative to the largest."""
    if values.numel() == 0 or not bool(values[0] > 0):
        return 0
    return int((values > threshold * values[0]).sum())
