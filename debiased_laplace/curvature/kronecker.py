r"""Kronecker factors of a curvature, one pair per parameter, from the parameters' row matrices.

The rows of a curvature's root, reshaped per parameter to matrices M, give $L = \sum M M^\top$ and
$R = \sum M^\top M$, the partial traces of the parameter's block. They need no hooks and no supported layers: every
parameter of two or more dimensions has them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from debiased_laplace.curvature.kfac_layers import kfac_layers
from debiased_laplace.curvature.linear_layer import LinearLayer
from debiased_laplace.curvature.memory import CHUNK_BYTES, LARGEST_SIDE
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.eigenpairs import numerical_rank
from debiased_laplace.linalg.kronecker_basis import BasisBlock, KroneckerBasis
from debiased_laplace.linalg.outer_products import outer_factors
from debiased_laplace.linalg.row_matrix import OuterRows, flat

_LARGE = 512
"""Side from which on eigenvectors are computed from the range of a factor of low rank, or in another precision."""

_SUPPORTED = {torch.float64: 1e-10, torch.float32: 2e-6}
"""Fraction of a factor's largest eigenvalue below which eigenvalues in a precision may be rounding errors."""


@dataclass(frozen=True)
class Side:
    """One side of a parameter as a matrix: its length, and whether it gets an eigenbasis."""

    size: int
    full: bool


@dataclass(frozen=True)
class MatrixShape:
    """A parameter as a matrix: its first dimension against all others."""

    rows: Side
    columns: Side

    @property
    def n_entries(self) -> int:
        """Number of entries."""
        return self.rows.size * self.columns.size


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """The curvature of one parameter as left ⊗ right.

    Attributes:
        left: factor of the rows, (o, o); only its diagonal, (o,), if that side keeps its axes.
        right: factor of the columns, (i, i) or (i,).
        rank: largest possible rank of both; None: not known.
        eigenvector_dtype: precision that eigenvectors of large factors are computed in; None: that of the factors.
    """

    left: Tensor
    right: Tensor
    rank: int | None = None
    eigenvector_dtype: torch.dtype | None = None

    def scaled(self, weight: float) -> "KroneckerFactors":
        """Multiply the curvature by a number."""
        return replace(self, left=self.left * weight)

    def without(self, part: "KroneckerFactors", share: float, dtype: torch.dtype) -> "KroneckerFactors":
        """Return the factors of the other samples, given those of a part; for factors of row matrices only.

        Args:
            part: factors of the part.
            share: its share of the samples.
            dtype: precision that eigenvectors of large factors are computed in.
        """
        left = (self.left - share * part.left) / (1 - share)
        # right factors are divided by their traces, which equal those of the left factors
        right = _trace(self.left) * self.right - share * _trace(part.left) * part.right
        return replace(_trace_preserving(left, right, self.rank), eigenvector_dtype=dtype)

    def basis(self, dtype: torch.dtype) -> BasisBlock:
        """Return the eigenvectors of both sides, by decreasing eigenvalue."""
        # rows are taken from them; decompositions return columns
        left, right = (None if pairs is None else pairs[1].to(dtype).contiguous() for pairs in self._eigenpairs)
        return BasisBlock(len(self.left), len(self.right), left, right)

    @property
    def ranks(self) -> tuple[int, int]:
        """Number of eigenvectors of each side that the samples support; all for a side that keeps its axes."""
        sides = zip((self.left, self.right), self._eigenpairs, strict=True)
        left, right = (
            len(side) if pairs is None else numerical_rank(pairs[0], _SUPPORTED[pairs[0].dtype])
            for side, pairs in sides
        )
        return left, right

    def averaged_over_null(self, values: Tensor) -> Tensor:
        """Average values along the basis, (o · i,), over the eigenvectors that the samples do not support."""
        left, right = self.ranks
        M = values.reshape(len(self.left), len(self.right)).clone()
        if left < len(M):
            M[left:] = M[left:].mean(0)
        if right < M.shape[1]:
            M[:, right:] = M[:, right:].mean(1, keepdim=True)
        return M.flatten()

    @cached_property
    def _eigenpairs(self) -> list[tuple[Tensor, Tensor] | None]:
        dtype = self.eigenvector_dtype or self.left.dtype
        return [None if side.ndim == 1 else _decreasing(side, self.rank, dtype) for side in (self.left, self.right)]

    def diagonal_in(self, block: BasisBlock) -> Tensor:
        """Return the curvature along the vectors of a basis, (o · i,)."""
        return torch.outer(_diagonal_in(self.left, block.left), _diagonal_in(self.right, block.right)).flatten()


def matrix_shapes(
    selection: ParameterSelection, *, layers_only: bool, largest_side: int = LARGEST_SIDE
) -> list[MatrixShape]:
    """Return the shape of each parameter as a matrix, and which sides get an eigenbasis.

    Args:
        selection: the parameters; a partly selected one keeps its axes.
        layers_only: whether only weights and biases of layers that K-FAC supports get a basis. Otherwise every
            parameter of two or more dimensions does, and the biases of such layers.
        largest_side: longest side that gets an eigenbasis.
    """
    parameters = dict(selection.model.named_parameters())
    layers = kfac_layers(selection.model)
    weights = {id(layer.weight) for layer in layers.values()}
    biases = {id(layer.bias) for layer in layers.values() if layer.bias is not None}
    shapes = []
    for name, shape, entries in zip(selection.names, selection.shapes, selection.entries, strict=True):
        p = parameters[name]
        matrix = id(p) in weights if layers_only else p.ndim >= 2
        if entries is None and matrix and shape.numel():
            o, i = shape[0], shape.numel() // shape[0]
            shapes.append(MatrixShape(Side(o, 1 < o <= largest_side), Side(i, 1 < i <= largest_side)))
        else:
            full = entries is None and id(p) in biases and 1 < shape.numel() <= largest_side
            shapes.append(MatrixShape(Side(shape.numel(), full), Side(1, False)))
    return shapes


def kronecker_basis(factors: Iterable[KroneckerFactors], dtype: torch.dtype) -> KroneckerBasis:
    """Return the eigenbasis of every pair of factors."""
    return KroneckerBasis(tuple(f.basis(dtype) for f in factors))


def row_matrix_factors(curvature: RowCurvature, shapes: list[MatrixShape]) -> list[KroneckerFactors]:
    r"""Compute $L = \frac1n \sum M M^\top$ and $R = \sum M^\top M / \sum \|M\|^2$ of every parameter.

    Their Kronecker product has the trace of the parameter's block.
    """
    if curvature.linear_layer is not None:
        return _outer_product_factors(curvature, curvature.linear_layer, shapes)
    like = curvature.network.like
    exact = accumulation_dtype(like)
    sizes = [shape.n_entries for shape in shapes]
    sums = [
        tuple(like.new_zeros((side.size,) * (2 if side.full else 1), dtype=exact) for side in (s.rows, s.columns))
        for s in shapes
    ]
    held = curvature.rows_by_parameter
    groups = curvature.rows("[Kronecker factors]") if held is None else ()
    for block in groups:
        for part, shape, both in zip(block.split(sizes, dim=-1), shapes, sums, strict=True):
            _add_matrices(part, shape, both)
    ranks = [] if held is not None else [_largest_rank(curvature.n_rows, shape) for shape in shapes]
    for part, shape, both in zip(held.parts, shapes, sums, strict=True) if held is not None else ():
        # a parameter without a basis of its own is a vector
        if isinstance(part, OuterRows) and part.matrix_shape == (shape.rows.size, shape.columns.size):
            ranks.append(_largest_rank(curvature.n_rows, shape, part.positions))
            _add_outer_products(part, shape, both)
            continue
        ranks.append(_largest_rank(curvature.n_rows, shape))
        size = max(1, CHUNK_BYTES // (8 * max(1, part.shape[1] * part.shape[2])))
        for start in range(0, part.shape[0], size):
            chosen = slice(start, start + size)
            _add_matrices(flat(part.at(chosen)) if isinstance(part, OuterRows) else part[chosen], shape, both)
    return [
        _trace_preserving(left / curvature.n_samples, right, k) for (left, right), k in zip(sums, ranks, strict=True)
    ]


def _largest_rank(n_rows: int, shape: MatrixShape, positions: int | None = None) -> int:
    """Return a bound on the rank of both factors: the number of outer products, each row being a matrix."""
    shorter = min(shape.rows.size, shape.columns.size)
    return n_rows * (shorter if positions is None else min(shorter, positions))


def _add_matrices(rows: Tensor, shape: MatrixShape, sums: tuple[Tensor, ...]) -> None:
    """Add the sums of rows (n, r, p) of a parameter."""
    left, right = sums
    # no -1 in the shape, because a parameter may be empty
    M = rows.reshape(rows.shape[0] * rows.shape[1], shape.rows.size, shape.columns.size)
    factors = outer_factors(M)
    if factors is not None:
        g, a = factors
        left += _weighted_gram(g, a.square().sum(1), full=shape.rows.full)
        right += _weighted_gram(a, g.square().sum(1), full=shape.columns.full)
        return
    left += torch.einsum("nop,nqp->oq", M, M) if shape.rows.full else M.square().sum((0, 2))
    right += torch.einsum("nop,noq->pq", M, M) if shape.columns.full else M.square().sum((0, 1))


def _add_outer_products(rows: OuterRows, shape: MatrixShape, sums: tuple[Tensor, ...]) -> None:
    r"""Add the sums of $M = G^\top A$, which are $\sum G^\top (A A^\top) G$ and $\sum A^\top (G G^\top) A$."""
    left, right = sums
    r = rows.shape[1]
    size = max(1, CHUNK_BYTES // (16 * r * rows.left.shape[2] * (rows.left.shape[3] + rows.right.shape[3])))
    for G, A in zip(rows.left.split(size), rows.right.split(size), strict=True):
        G, A = (x.expand(-1, r, -1, -1).flatten(0, 1) for x in (G, A))
        for x, other, total, full in ((G, A, left, shape.rows.full), (A, G, right, shape.columns.full)):
            weighted = (other @ other.mT) @ x
            x, weighted = x.flatten(0, 1).to(total.dtype), weighted.flatten(0, 1).to(total.dtype)
            total += x.mT @ weighted if full else (x * weighted).sum(0)


def _outer_product_factors(
    curvature: RowCurvature, layer: LinearLayer, shapes: list[MatrixShape]
) -> list[KroneckerFactors]:
    r"""Compute `row_matrix_factors` of a last linear layer, where M is $s \varphi^\top$ (bias: s)."""
    exact = accumulation_dtype(curvature.network.like)
    zeros = partial(curvature.network.like.new_zeros, dtype=exact)
    sums = [[zeros((side.size,) * (2 if side.full else 1)) for side in (shape.rows, shape.columns)] for shape in shapes]
    for features, outputs, batch in curvature.features("[Kronecker factors]"):
        part = batch.targets
        sizes = batch.scaled(curvature.root.quadratics(outputs, part, None))
        for name, shape, (left, right) in zip(layer.parts, shapes, sums, strict=True):
            y = features.to(exact) if name == "weight" else zeros(len(features), 1) + 1
            lengths = y.square().sum(1)
            if shape.rows.full:
                left += curvature.root.weighted_sum(outputs, part, batch.scaled(lengths))
            else:
                left += lengths @ sizes
            right += _weighted_gram(y, sizes.sum(1), full=shape.columns.full)
    return [_trace_preserving(left / curvature.n_samples, right) for left, right in sums]


def _weighted_gram(x: Tensor, weights: Tensor, *, full: bool) -> Tensor:
    """Return the sum over rows of w x x' (its diagonal only, unless full)."""
    weighted = x * weights[:, None]
    return x.T @ weighted if full else (x * weighted).sum(0)


def partial_trace_factors(H: Tensor, shapes: list[MatrixShape]) -> list[KroneckerFactors]:
    """Compute the factors from a dense curvature (P, P), as partial traces of every parameter's block."""
    factors, start = [], 0
    for shape in shapes:
        o, i = shape.rows.size, shape.columns.size
        block = H[start : start + o * i, start : start + o * i].reshape(o, i, o, i)
        start += o * i
        left, right = torch.einsum("oiqi->oq", block), torch.einsum("oioj->ij", block)
        factors.append(
            _trace_preserving(
                left if shape.rows.full else left.diagonal(), right if shape.columns.full else right.diagonal()
            )
        )
    return factors


def _trace_preserving(left: Tensor, right: Tensor, rank: int | None = None) -> KroneckerFactors:
    total = _trace(right)
    return KroneckerFactors(left, right / total if bool(total != 0) else right, rank)


def _trace(factor: Tensor) -> Tensor:
    return (factor.diagonal() if factor.ndim == 2 else factor).sum()


def _decreasing(factor: Tensor, rank: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return all eigenpairs up to a scale; of a large factor of low rank, from its range, completed by any vectors.

    References:
        Halko, Martinsson & Tropp (2011), doi 10.1137/090771806, Algorithm 4.4 (the range, by random vectors).
    """
    n = len(factor)
    if n >= _LARGE and dtype != factor.dtype:
        # without a scale that the precision could not hold
        scale = factor.diagonal().mean().clamp_min(torch.finfo(factor.dtype).tiny)
        factor = (factor / scale).to(dtype)
    if n < _LARGE or rank is None or 4 * rank > n:
        values, vectors = torch.linalg.eigh(factor)
        return values.flip(0), vectors.flip(1)
    k = rank + 8
    Q = torch.randn(n, k, generator=torch.Generator().manual_seed(0), dtype=factor.dtype).to(factor.device)
    for _ in range(2):
        Q = torch.linalg.qr(factor @ Q)[0]
    Q = torch.linalg.qr(Q, mode="complete")[0]
    values, V = torch.linalg.eigh(Q[:, :k].mT @ factor @ Q[:, :k])
    vectors = torch.cat([Q[:, :k] @ V.flip(1), Q[:, k:]], dim=1)
    return torch.cat([values.flip(0).clamp_min(0), values.new_zeros(n - k)]), vectors


def _diagonal_in(factor: Tensor, basis: Tensor | None) -> Tensor:
    if factor.ndim == 1:
        return factor
    if basis is None:
        return factor.diagonal()
    Q = basis.to(factor.dtype)
    return (Q * (factor @ Q)).sum(0)
