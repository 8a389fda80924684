r"""Block-diagonal orthogonal bases, one Kronecker product per parameter.

For a parameter reshaped to a matrix (rows, columns) and flattened row by row, a block is $Q_L \otimes Q_R$; the
coordinates of a vector with matrix form M are $Q_L^\top M Q_R$. A side without a basis has the identity.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.linalg.outer_products import outer_factors

_ROTATED = 2**24  # entries of column vectors that are rotated at a time


@dataclass(frozen=True, eq=False)
class BasisBlock:
    """Kronecker basis of one parameter.

    Attributes:
        rows: number of rows of the parameter as a matrix.
        columns: number of columns.
        left: orthogonal matrix $Q_L$; None: the identity.
        right: orthogonal matrix $Q_R$; None: the identity.
    """

    rows: int
    columns: int
    left: Float[Tensor, "o o"] | None = None
    right: Float[Tensor, "i i"] | None = None

    @property
    def size(self) -> int:
        """Number of entries of the parameter."""
        return self.rows * self.columns

    def rotated(self, x: Float[Tensor, "*batch p"], *, back: bool) -> Float[Tensor, "*batch p"]:
        """Return the coordinates of vectors, or, with `back`, the vectors of coordinates."""
        if self.left is None and self.right is None:
            return x
        M = x.reshape(*x.shape[:-1], self.rows, self.columns)
        # bases multiply contiguous matrices from the right; from the left, matmul would copy them for every vector
        if self.right is not None:
            M = M @ (self.right.mT if back else self.right)
        if self.left is not None:
            M = (M.mT.contiguous() @ (self.left.mT if back else self.left)).mT
        return M.reshape(x.shape)

    def rotated_columns(self, U: Float[Tensor, "p k"], *, out: Float[Tensor, "p k"] | None = None) -> Tensor:
        """Return the coordinates of column vectors, some of them at a time, without a transposed copy of them.

        Args:
            U: the vectors.
            out: where to write, which may be U; None: a new tensor.
        """
        out = torch.empty_like(U) if out is None else out
        width = max(1, _ROTATED // max(1, self.size))
        for vectors, coordinates in zip(U.split(width, dim=1), out.split(width, dim=1), strict=True):
            coordinates.copy_(self._rotated_columns(vectors))
        return out

    def _rotated_columns(self, U: Float[Tensor, "p k"]) -> Float[Tensor, "p k"]:
        o, i, k = self.rows, self.columns, U.shape[1]
        sides = [side for side in (self.left, self.right) if side is not None]
        U = U.to(sides[0]) if sides else U
        if self.left is not None:
            U = self.left.mT @ U.reshape(o, i * k)
        if self.right is not None:
            U = torch.bmm(self.right.mT.expand(o, -1, -1), U.reshape(o, i, k))
        return U.reshape(o * i, k)

    def summed_squares(self, x: Float[Tensor, "n r p"]) -> Float[Tensor, "n p"]:
        """Return the squared coordinates of vectors, summed over the second dimension."""
        if self.left is None and self.right is None:
            return x.square().sum(1)
        n, r = x.shape[:2]
        factors = outer_factors(x.reshape(n * r, self.rows, self.columns))
        if factors is None:
            return self.rotated(x, back=False).square().sum(1)
        g, a = (
            (v if side is None else v @ side).square().unflatten(0, (n, r))
            for v, side in zip(factors, (self.left, self.right), strict=True)
        )
        return (g.mT @ a).flatten(1)

    def squared(self) -> "BasisBlock":
        """Return the block with squared entries; it maps a diagonal in coordinates to the diagonal of the matrix."""
        left = None if self.left is None else self.left.square()
        right = None if self.right is None else self.right.square()
        return BasisBlock(self.rows, self.columns, left, right)


@dataclass(frozen=True, eq=False)
class KroneckerBasis:
    """Orthogonal matrix K (P, P), block-diagonal with Kronecker products as blocks; K is not formed.

    Attributes:
        blocks: one for each parameter, in the order of the flat vector.
    """

    blocks: tuple[BasisBlock, ...]

    @property
    def n_parameters(self) -> int:
        """Number of parameters P."""
        return sum(block.size for block in self.blocks)

    def coordinates(self, x: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch P"]:
        r"""Return $x K$, the coordinates of row vectors."""
        return self._mapped(self.blocks, x, back=False)

    def coordinates_of_columns(
        self, U: Float[Tensor, "P k"], *, out: Float[Tensor, "P k"] | None = None
    ) -> Float[Tensor, "P k"]:
        r"""Return $K^\top U$, the coordinates of column vectors.

        Args:
            U: the vectors.
            out: where to write, which may be U; None: a new tensor.
        """
        out = torch.empty_like(U) if out is None else out
        sizes = [block.size for block in self.blocks]
        for block, vectors, coordinates in zip(self.blocks, U.split(sizes), out.split(sizes), strict=True):
            block.rotated_columns(vectors, out=coordinates)
        return out

    def vectors(self, coordinates: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch P"]:
        r"""Return $x K^\top$, the row vectors of coordinates."""
        return self._mapped(self.blocks, coordinates, back=True)

    def summed_squares(self, rows: Float[Tensor, "n r P"]) -> Float[Tensor, "n P"]:
        """Return the squared coordinates of rows, summed over the r rows of each of the n groups."""
        parts = rows.split([block.size for block in self.blocks], dim=-1)
        return torch.cat([block.summed_squares(part) for block, part in zip(self.blocks, parts, strict=True)], dim=-1)

    def diagonal_of(self, d: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        r"""Return the diagonal of $K \mathrm{diag}(d) K^\top$."""
        return self._mapped(self._squared, d, back=True)

    def to(self, dtype: torch.dtype) -> "KroneckerBasis":
        """Return the basis in another dtype."""
        return KroneckerBasis(
            tuple(
                BasisBlock(b.rows, b.columns, *(None if side is None else side.to(dtype) for side in (b.left, b.right)))
                for b in self.blocks
            )
        )

    def to_dense(self) -> Float[Tensor, "P P"]:
        """Return K as a dense matrix, for tests and small problems."""
        return torch.block_diag(
            *(
                torch.kron(_or_identity(b.left, b.rows, self._like), _or_identity(b.right, b.columns, self._like))
                for b in self.blocks
            )
        )

    @cached_property
    def _squared(self) -> tuple[BasisBlock, ...]:
        return tuple(block.squared() for block in self.blocks)

    @property
    def _like(self) -> Tensor:
        sides = [side for b in self.blocks for side in (b.left, b.right) if side is not None]
        return sides[0] if sides else torch.zeros(())

    @staticmethod
    def _mapped(blocks: tuple[BasisBlock, ...], x: Tensor, *, back: bool) -> Tensor:
        parts = x.split([block.size for block in blocks], dim=-1)
        return torch.cat([block.rotated(part, back=back) for block, part in zip(blocks, parts, strict=True)], dim=-1)


def _or_identity(side: Tensor | None, n: int, like: Tensor) -> Tensor:
    # torch.kron rejects some column-major matrices, which decompositions return
    return torch.eye(n, dtype=like.dtype, device=like.device) if side is None else side.contiguous()
