r"""Block Lanczos with full reorthogonalization for the leading eigenpairs of a symmetric matrix.

It differs from the textbook method in two ways. Convergence is tested by residuals, as Ritz values converge long before
Ritz vectors. Repeated eigenvalues are found, by blocks and by restarts with new random vectors in the complement of the
converged ones.

References:
    Golub & Van Loan (2013), Matrix Computations, Section 10.3 (block Lanczos); Wu & Simon (2000), SIAM J. Matrix Anal.
    Appl. 22(2), doi 10.1137/S0895479898334605 (thick restart).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.eigenpairs import Eigenpairs, SolverOutcome

Matmat = Callable[[Tensor], Tensor]

SPARE = 30  # vectors of the basis beyond those asked for
_KEPT = 10  # of these, kept by a restart
_CHUNK = 2**21  # numbers of the basis that are combined at a time


class _KrylovBasis:
    """Orthonormal basis Q of a block Krylov space, the projection T = Q H Q', and the next block.

    Vectors are rows, so that a product with all of them reads memory in order, and memory that is not needed yet is not
    touched.
    """

    def __init__(self, matmat: Matmat, like: Tensor, capacity: int, block_size: int, seed: int):
        self.matmat = matmat
        self.generator = torch.Generator().manual_seed(seed)
        self.Q = like.new_empty(capacity, like.numel())
        self.T = like.new_zeros(capacity, capacity, dtype=accumulation_dtype(like))
        self.block_size = block_size
        self.size = 0
        self.products = 0
        self.inherited = 0.0  # largest residual of the vectors kept by a fresh restart
        self.block = self.complete(like.new_empty(0, like.numel()))
        self.coupling = self.T[:0, :0]

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.size == self.Q.shape[1]

    @property
    def full(self) -> bool:
        """Whether the next block does not fit."""
        return self.size + self.block.shape[0] > self.Q.shape[0]

    def grow(self) -> None:
        """Take one Lanczos step: multiply the block, orthogonalize twice, and store the remainder as the next block."""
        old, new = self.size, self.size + self.block.shape[0]
        self.Q[old:new] = self.block
        W = self.matmat(self.block.T).T.contiguous()
        if not bool(W.isfinite().all()):
            raise ValueError("Expected a finite matrix-vector product; got NaN or infinity.")
        self.products += new - old
        Q = self.Q[:new]
        h = Q @ W.T
        W.addmm_(h.T, Q, alpha=-1)
        correction = Q @ W.T
        W.addmm_(correction.T, Q, alpha=-1)
        h = (h + correction).to(self.T.dtype)
        h[old:new] = (h[old:new] + h[old:new].T) / 2
        self.T[:new, old:new] = h
        self.T[old:new, :new] = h.T
        self.size = new
        self.block = self.complete(W, noise_floor=float(self.T.abs().max()))
        self.coupling = (self.block @ W.T).to(self.T.dtype)

    def complete(self, W: Tensor, noise_floor: float = 0.0) -> Tensor:
        """Return an orthonormal block, orthogonal to the basis, that spans W, completed by random vectors."""
        P = self.Q.shape[1]
        width = min(self.block_size, P - self.size)
        basis = self.Q[: self.size]
        Q, R = torch.linalg.qr(W[:width].T)
        Q, sizes = Q.T, R.diagonal().abs()
        nonzero = sizes > 100 * torch.finfo(W.dtype).eps * noise_floor
        if len(Q) == width and bool((sizes > 1e-3 * noise_floor).all()):
            return Q.contiguous()
        # small vectors are mostly rounding, which is not orthogonal to the basis
        Q = _orthonormalize(Q[nonzero], [basis])
        noise = torch.randn(P, width - len(Q), generator=self.generator, dtype=self.Q.dtype).to(self.Q.device)
        return torch.cat([Q, _orthonormalize(noise.T, [basis, Q])])

    def ritz(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the leading k Ritz values, their coefficients in the basis, and their residual norms."""
        values, Y = torch.linalg.eigh(self.T[: self.size, : self.size])
        values, Y = values.flip(0)[:k], Y.flip(1)[:, :k]
        last = Y[self.size - self.coupling.shape[1] :]
        return values, Y, torch.linalg.vector_norm(self.coupling @ last, dim=0)

    def combine(self, Y: Tensor, out: Tensor) -> None:
        """Write the combinations of the basis with coefficients Y (size, k) to `out` (k, P), which may be the basis."""
        Y = Y.to(self.Q.dtype).T.contiguous()
        width = max(1, _CHUNK // len(self.Q))
        for start in range(0, self.Q.shape[1], width):
            columns = slice(start, start + width)
            out[:, columns] = Y @ self.Q[: self.size, columns]

    def restart(self, keep: int, *, fresh: bool) -> None:
        """Shrink the basis to the leading Ritz vectors; with `fresh`, replace the next block by a random one."""
        values, Y, residuals = self.ritz(keep)
        keep = len(values)
        self.combine(Y, self.Q[:keep])
        self.T.zero_()
        self.T[:keep, :keep] = torch.diag(values)
        self.size = keep
        if fresh:
            self.inherited = max(self.inherited, float(residuals.max()))
            self.block = self.complete(self.block[:0])


def lanczos(
    matmat: Matmat,
    like: Float[Tensor, " P"],
    k: int,
    *,
    block_size: int = 1,
    tolerance: float | None = None,
    max_products: int | None = None,
    seed: int = 0,
) -> Eigenpairs:
    r"""Compute the k algebraically largest eigenpairs of a symmetric matrix.

    Cost: about 2k to 4k products; memory: about $P (2k + 30)$ numbers, of which $P k$ are the result. Repeated
    eigenvalues are found up to multiplicity `block_size` directly, and further copies by restarts in the complement.

    Args:
        matmat: maps X (P, b) to H X.
        like: vector with the length, dtype and device of the problem.
        k: number of pairs, at least 1; at most P are returned.
        block_size: vectors multiplied at a time.
        tolerance: largest residual $\|Hu - \lambda u\|$ relative to the largest eigenvalue; default
            1e-5 in single and 1e-9 in double precision.
        max_products: maximal number of matrix-vector products; default 30 k + 500.
        seed: seed of the start vectors.

    Returns:
        The pairs with their residuals; `outcome.converged` tells whether all are below the tolerance.

    Raises:
        ValueError: if k or block_size is below 1, or a product is not finite.
    """
    if k < 1 or block_size < 1:
        raise ValueError(f"Expected k and block_size to be at least 1; got {k} and {block_size}.")
    P = like.numel()
    k, block_size = min(k, P), min(block_size, P)
    tolerance = tolerance or (1e-9 if like.dtype == torch.float64 else 1e-5)
    max_products = max_products or 30 * k + 500
    capacity = min(P, k + max(SPARE, 6 * block_size))
    basis = _KrylovBasis(matmat, like, capacity, block_size, seed)
    converged = _converge(basis, k, tolerance, max_products)
    while converged and not basis.exhausted:
        before = basis.ritz(k)[0]
        basis.restart(k, fresh=True)
        for _ in range(max(2, 12 // block_size)):
            if not basis.exhausted and not basis.full:
                basis.grow()
        converged = _converge(basis, k, tolerance, max_products)
        after = basis.ritz(k)[0]
        if bool((after - before <= 10 * tolerance * after[0].abs()).all()):
            break
    values, Y, residuals = basis.ritz(k)
    vectors = like.new_empty(len(values), P)
    basis.combine(Y, vectors)
    # max_products may have been reached in the search for further copies of converged eigenvalues
    converged = converged or bool((residuals <= tolerance * values[0].abs()).all())
    reason = "the basis spans the whole space" if basis.exhausted else "all residuals are small"
    if not converged:
        reason = (
            f"{basis.products} products did not bring every residual below {tolerance:g} of the "
            f"largest eigenvalue; the largest is {float(residuals.max() / values[0].abs()):.1g}"
        )
    outcome = SolverOutcome("lanczos", converged, basis.products, reason)
    residuals = residuals.square().add(basis.inherited**2).sqrt()
    return Eigenpairs(values.to(like.dtype), vectors.T, residuals.to(like.dtype), outcome)


def _converge(basis: _KrylovBasis, k: int, tolerance: float, max_products: int) -> bool:
    """Grow the basis, with a restart whenever it is full, until the k leading residuals are small."""
    while True:
        due = basis.size >= k and (basis.full or basis.exhausted or _every_fifth(basis))
        if due:
            values, _, residuals = basis.ritz(k)
            if basis.exhausted or bool((residuals <= tolerance * values[0].abs()).all()):
                return True
        if basis.products >= max_products and basis.size >= k:
            return False
        if basis.full:
            basis.restart(min(k + _KEPT, len(basis.Q) - len(basis.block)), fresh=False)
        basis.grow()


def _orthonormalize(block: Tensor, bases: list[Tensor]) -> Tensor:
    """Return the rows of a block made orthonormal, and orthogonal to the orthonormal rows of some bases."""
    for _ in range(2):
        for basis in bases:
            block = block - (block @ basis.T) @ basis
        block = torch.linalg.qr(block.T)[0].T
    return block


def _every_fifth(basis: _KrylovBasis) -> bool:
    # the projected eigenproblem of a large basis costs as much as a product
    return (basis.size // basis.block_size) % 5 == 0
