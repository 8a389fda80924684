r"""Eigenvectors of $H = V^\top V / n$ from the Gram matrix $V V^\top$ or from $H$, whichever is smaller.

The Gram solver uses $V V^\top$ (rows x rows) and does not form $H$; the dense solver uses $H$ (P x P) and does not
store $V$. Both matrices are accumulated in double precision: with a Gram matrix in single precision, directions whose
eigenvalues are below a millionth of the largest are no longer orthogonal.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.eigenpairs import Eigenpairs, SolverOutcome, numerical_rank
from debiased_laplace.linalg.row_matrix import RowMatrix, row_products
from debiased_laplace.linalg.shard import Shard
from debiased_laplace.linalg.vector_format import AS_COMPUTED, VectorFormat

_ROWS = 2**16  # rows of the directions that are orthonormalized at a time


@dataclass(frozen=True, eq=False)
class GramFactor:
    r"""All rows of a root of the curvature of n samples, r of each.

    Attributes:
        rows: $V$, so that the curvature is $V^\top V / n$.
    """

    rows: RowMatrix

    @property
    def n_samples(self) -> int:
        """Number n of samples."""
        return len(self.rows)

    @property
    def sample_of_row(self) -> Int64[Tensor, " R"]:
        """Position of each row's sample."""
        n, r, _ = self.rows.shape
        return torch.arange(n, device=self.rows.like.device).repeat_interleave(r)

    @cached_property
    def gram(self) -> Float[Tensor, "R R"]:
        r"""Gram matrix $V V^\top / n$ in double precision."""
        # cached, as the Gram matrices of folds are sub-blocks of it
        return self.rows.products() / self.n_samples

    def eigenpairs(
        self, threshold: float, rank: int | None = None, vector_format: VectorFormat = AS_COMPUTED
    ) -> Eigenpairs:
        r"""Return the eigenpairs of H from those of the Gram matrix.

        $V V^\top / n = W \Lambda W^\top$ gives $H = U \Lambda U^\top$ with $U = V^\top W \Lambda^{-1/2} / \sqrt n$.

        Args:
            threshold: eigenvalues below this fraction of the largest are dropped.
            rank: maximal number of pairs; None: all above the threshold.
            vector_format: of the vectors.

        Returns:
            The leading pairs; the residuals are an estimate of the rounding errors.
        """
        values, W = torch.linalg.eigh(self.gram)
        shard = self.rows.shard
        if shard is not None:
            values, W = shard.same((values, W), W.device)
        values, W = values.flip(0), W.flip(1)
        k = numerical_rank(values, threshold)
        dropped = _largest_after(values, k)
        k = k if rank is None else min(k, rank)
        values, W = values[:k], W[:, :k]
        dtype = self.rows.like.dtype
        W_scaled = (W / (values * self.n_samples).sqrt()).to(dtype)
        U = self.rows.combined(W_scaled, out=vector_format.empty(W_scaled, self.rows.shape[2], k))
        U = polish(U, out=U, device=W.device, shard=shard)
        rounding = torch.finfo(dtype).eps * values[:1].expand(k)
        outcome = SolverOutcome("gram", True, 0, "all eigenpairs of the Gram matrix")
        projections = W * (values * self.n_samples).sqrt()
        return Eigenpairs(values.to(dtype), U, rounding.to(dtype), outcome, dropped, projections)


def dense_eigenpairs(
    H: Float[Tensor, "P P"], threshold: float, *, rank: int | None = None, dtype: torch.dtype
) -> Eigenpairs:
    """Return the eigenpairs of a dense curvature in double precision.

    Args:
        H: the curvature, a mean over samples.
        threshold: eigenvalues below this fraction of the largest are dropped.
        rank: maximal number of pairs; None: all above the threshold.
        dtype: dtype of the result.

    Returns:
        The leading pairs.
    """
    values, U = torch.linalg.eigh(H)
    values, U = values.flip(0), U.flip(1)
    k = numerical_rank(values, threshold)
    dropped = _largest_after(values, k)
    k = k if rank is None else min(k, rank)
    rounding = torch.finfo(H.dtype).eps * values[:1].expand(k)
    outcome = SolverOutcome("dense", True, 0, "all eigenpairs of the dense curvature")
    return Eigenpairs(values[:k].to(dtype), U[:, :k].to(dtype), rounding.to(dtype), outcome, dropped)


def _largest_after(values: Tensor, k: int) -> float:
    """Return the largest eigenvalue after the first k; 0 if it is within rounding."""
    if k == len(values):
        return 0.0
    rounding = len(values) * torch.finfo(values.dtype).eps * float(values[0])
    return float(values[k]) if float(values[k]) > rounding else 0.0


def dense_curvature(rows: Iterable[Float[Tensor, "_n _r P"]], n_parameters: int, like: Tensor) -> Float[Tensor, "P P"]:
    r"""Return $\sum V^\top V$ over a stream of blocks of rows, in double precision."""
    H = like.new_zeros(n_parameters, n_parameters, dtype=accumulation_dtype(like))
    for block in rows:
        V = block.flatten(0, 1).to(H.dtype)
        H += V.T @ V
    return H


def polish(
    U: Float[Tensor, "P k"],
    *,
    out: Float[Tensor, "P k"] | None = None,
    device: torch.device | None = None,
    shard: Shard | None = None,
) -> Float[Tensor, "P k"]:
    r"""Orthonormalize nearly orthonormal columns: return $U L^{-\top}$, where $U^\top U = L L^\top$.

    Each column is corrected by the columns before it. Cost: two matrix products, a fraction of a QR decomposition of a
    tall matrix; QR is the fallback for columns that are far from orthonormal.

    Args:
        U: the columns; returned if they are orthonormal to rounding.
        out: where to write, which may be U; None: a new tensor.
        device: of the computation; None: that of U.
        shard: of the parameters, where the columns have the entries of these alone.

    Raises:
        ValueError: if columns of which each process holds some entries are far from orthonormal.
    """
    # Rounding leaves components of the leading directions in the trailing ones. A symmetric correction would leave
    # half of each there: with a leading curvature many orders larger, that is many times the trailing one.
    k = U.shape[1]
    if k == 0:
        return U
    dtype = torch.promote_types(U.dtype, torch.float32)
    gram = row_products(U.T, dtype, device=device)
    gram = gram if shard is None else shard.summed(gram)
    identity = torch.eye(k, dtype=dtype, device=gram.device)
    size = float(torch.linalg.matrix_norm(gram - identity))
    if size < 8 * k**0.5 * torch.finfo(U.dtype).eps:
        return U
    if size > 0.05 and shard is not None:
        raise ValueError("Directions are far from orthonormal, which shard_directions=True is not built for.")
    if size > 0.05:
        Q, R = torch.linalg.qr(U.to(dtype))
        return torch.where(R.diagonal() < 0, -Q, Q).to(U.dtype)
    T = torch.linalg.solve_triangular(torch.linalg.cholesky(gram).mT, identity, upper=True)
    out = torch.empty_like(U) if out is None else out
    for block, polished in zip(U.split(_ROWS), out.split(_ROWS), strict=True):
        polished.copy_(block.to(T) @ T)
    return out
