r"""Eigenvectors of $H = V^\top V / n$ from the smaller of its two sides.

The Gram side works with $V V^\top$ (rows x rows) and never forms $H$; the dense side works with $H$ (P x P) and never
keeps $V$. Both are accumulated in double precision: a single-precision Gram matrix loses the orthogonality of every
direction whose eigenvalue is a million times below the largest.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.eigenpairs import Eigenpairs, SolverOutcome, supported

_PANEL = 160  # rows of a block of the Gram matrix: large enough for a fast product
_PANEL_BYTES = 20 * 2**20  # of the columns that are converted at a time


@dataclass(frozen=True, eq=False)
class GramFactor:
    r"""Stacked rows of a curvature's root, with the sample that each row came from.

    Attributes:
        rows: $V$, so that the curvature is $V^\top V / n$.
        sample_of_row: position of each row's sample in its sub-batch; folds are sub-blocks by it.
        n_samples: $n$.
    """

    rows: Float[Tensor, "R P"]
    sample_of_row: Int64[Tensor, " R"]
    n_samples: int

    @cached_property
    def gram(self) -> Float[Tensor, "R R"]:
        r"""$V V^\top / n$ in double precision; kept, because folds are sub-blocks of it."""
        return row_products(self.rows, accumulation_dtype(self.rows)) / self.n_samples

    def eigenpairs(self, threshold: float, rank: int | None = None) -> Eigenpairs:
        r"""$H = U \Lambda U^\top$ through $V V^\top / n = W \Lambda W^\top$, $U = V^\top W \Lambda^{-1/2} / \sqrt n$.

        Args:
            threshold: eigenvalues below this fraction of the largest are dropped.
            rank: at most so many pairs; None keeps all above the threshold.

        Returns:
            The leading pairs; residuals are rounding, estimated from the Gram side.
        """
        values, W = torch.linalg.eigh(self.gram)
        values, W = values.flip(0), W.flip(1)
        k = supported(values, threshold)
        dropped = _largest_after(values, k)
        k = k if rank is None else min(k, rank)
        values, W = values[:k], W[:, :k]
        scaled = (W / (values * self.n_samples).sqrt()).to(self.rows.dtype)
        U = polish(self.rows.T @ scaled)
        rounding = torch.finfo(self.rows.dtype).eps * values[:1].expand(k)
        outcome = SolverOutcome("gram", True, 0, "all eigenpairs of the Gram matrix")
        projections = W * (values * self.n_samples).sqrt()
        return Eigenpairs(values.to(U.dtype), U, rounding.to(U.dtype), outcome, dropped, projections)


def row_products(rows: Float[Tensor, "R P"], dtype: torch.dtype) -> Float[Tensor, "R R"]:
    """The products of all pairs of rows, computed for one triangle only and in the given precision."""
    R, P = rows.shape
    lower = rows.new_zeros(R, R, dtype=dtype)
    width = max(1, min(P, _PANEL_BYTES // (8 * max(R, 1))))
    for columns in rows.split(width, dim=1):
        V = columns.to(dtype)
        for i in range(0, R, _PANEL):
            stop = min(i + _PANEL, R)
            lower[i:stop, :stop] += V[i:stop] @ V[:stop].T
    return lower.tril() + lower.tril(-1).T


def dense_eigenpairs(
    H: Float[Tensor, "P P"], threshold: float, *, rank: int | None = None, dtype: torch.dtype
) -> Eigenpairs:
    """Eigenpairs of a curvature that has been summed up densely in double precision.

    Args:
        H: the curvature, a mean over samples.
        threshold: eigenvalues below this fraction of the largest are dropped.
        rank: at most so many pairs; None keeps all above the threshold.
        dtype: of the result.

    Returns:
        The leading pairs.
    """
    values, U = torch.linalg.eigh(H)
    values, U = values.flip(0), U.flip(1)
    k = supported(values, threshold)
    dropped = _largest_after(values, k)
    k = k if rank is None else min(k, rank)
    rounding = torch.finfo(H.dtype).eps * values[:1].expand(k)
    outcome = SolverOutcome("dense", True, 0, "all eigenpairs of the dense curvature")
    return Eigenpairs(values[:k].to(dtype), U[:, :k].to(dtype), rounding.to(dtype), outcome, dropped)


def _largest_after(values: Tensor, k: int) -> float:
    """The largest of the eigenvalues from the k-th on, without what is rounding."""
    if k == len(values):
        return 0.0
    rounding = len(values) * torch.finfo(values.dtype).eps * float(values[0])
    return float(values[k]) if float(values[k]) > rounding else 0.0


def dense_curvature(rows: Iterable[Float[Tensor, "_n _r P"]], n_parameters: int, like: Tensor) -> Float[Tensor, "P P"]:
    r"""$\sum V^\top V$ from a stream of rows, in double precision."""
    H = like.new_zeros(n_parameters, n_parameters, dtype=accumulation_dtype(like))
    for block in rows:
        V = block.flatten(0, 1).to(H.dtype)
        H += V.T @ V
    return H


def polish(U: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
    r"""Nearly orthonormal columns made orthonormal, $U L^{-\top}$ with $U^\top U = L L^\top$, the first ones kept.

    Rounding puts some of the leading directions into the trailing ones. Only the trailing ones may pay for that: shared
    out evenly, what is left would be many times the curvature of a direction far below the largest. It costs two
    matrix products, where a QR decomposition of a tall matrix costs several times as much; where the columns are too
    far from orthonormal for it, QR it is.
    """
    k = U.shape[1]
    if k == 0:
        return U
    gram = row_products(U.T, U.dtype)
    size = float(torch.linalg.matrix_norm(gram - torch.eye(k, dtype=U.dtype, device=U.device)))
    if size < 8 * k**0.5 * torch.finfo(U.dtype).eps:
        return U
    if size > 0.05:
        Q, R = torch.linalg.qr(U)
        return torch.where(R.diagonal() < 0, -Q, Q)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(gram).mT, U, upper=True, left=False)
