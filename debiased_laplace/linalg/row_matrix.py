r"""Rows of a curvature's root by parameter, as factors where they are sums of few outer products.

The matrix of all rows (R, P) is never formed: what needs it goes over chunks of its columns. Where a parameter's rows
are $\sum_t g_t a_t^\top$ with few positions t, the factors take a fraction of its memory, and a Kronecker basis rotates
g and a instead of the rows. Rows that do not fit into memory together are computed again at every use, those of a few
parameters at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.kronecker_basis import BasisBlock, KroneckerBasis
from debiased_laplace.linalg.shard import Shard

_CHUNK_BYTES = 16 * 2**20
"""Approximate size of a chunk of columns on a CPU, whose caches and allocator make larger ones several times slower."""

_CHUNK_BYTES_OF_ACCELERATORS = 64 * 2**20

_PRODUCT_BYTES = 256 * 2**20
"""Largest array of products of pairs of positions."""

_PANEL = 160  # rows per block of a Gram matrix: large enough for a fast product
_PANEL_BYTES = 20 * 2**20  # bytes of the columns converted at a time


@dataclass(frozen=True, eq=False)
class OuterRows:
    r"""Rows $\sum_t g_t a_t^\top$ of a matrix parameter; one factor may be the same for all rows of a sample.

    Attributes:
        left: g, (n, r or 1, T, o).
        right: a, (n, r or 1, T, i).
    """

    left: Float[Tensor, "n _q T o"]
    right: Float[Tensor, "n _p T i"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """n, r and the number of entries of the parameter."""
        (n, q, _, o), (_, p, _, i) = self.left.shape, self.right.shape
        return n, max(p, q), o * i

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the parameter."""
        return self.left.shape[-1], self.right.shape[-1]

    @property
    def positions(self) -> int:
        """Number of outer products that a row sums."""
        return self.left.shape[2]

    @property
    def n_numbers(self) -> int:
        """Number of entries of the factors."""
        return self.left.numel() + self.right.numel()

    def padded(self, positions: int) -> "OuterRows":
        """Return the same rows as sums of more outer products, the others being zero."""
        missing = positions - self.positions
        return OuterRows(pad(self.left, (0, 0, 0, missing)), pad(self.right, (0, 0, 0, missing))) if missing else self

    def dense(self) -> Float[Tensor, "n r p"]:
        """Return the rows."""
        return self.columns(0, self.left.shape[-1])

    def columns(self, start: int, stop: int) -> Float[Tensor, "n r w"]:
        """Return the entries of the rows `start` to `stop` of the parameter as a matrix."""
        G = self.left[..., start:stop].mT
        # several times faster where nothing is summed
        M = G * self.right if self.positions == 1 else G @ self.right
        return M.expand(-1, self.shape[1], -1, -1).flatten(2)

    def at(self, samples: Tensor | slice) -> "OuterRows":
        """Return the rows of some samples."""
        return OuterRows(self.left[samples], self.right[samples])

    def scaled(self, factors: Float[Tensor, " n"]) -> "OuterRows":
        """Return the rows times a number for each sample; right factors stay as they are."""
        return OuterRows(self.left * factors.to(self.left)[:, None, None, None], self.right)

    @property
    def products_are_cheaper(self) -> bool:
        """Whether inner products of pairs of rows cost less by their factors, which takes all pairs of positions."""
        (n, q, T, o), (_, p, _, i) = self.left.shape, self.right.shape
        return T * T * (o + i) <= o * i and (n * max(p, q) * T) ** 2 * 8 <= _PRODUCT_BYTES

    def squared_norms(self, dtype: torch.dtype) -> Float[Tensor, " n"]:
        r"""Return $\sum_{tt'} (g_t^\top g_{t'}) (a_t^\top a_{t'})$, summed over the rows of each sample."""
        G, A = self.left.to(dtype), self.right.to(dtype)
        return ((G @ G.mT) * (A @ A.mT)).sum((1, 2, 3))

    def products(self, dtype: torch.dtype) -> Float[Tensor, "R R"]:
        r"""Return the inner products $\sum_{tt'} (g_t^\top g'_{t'}) (a_t^\top a'_{t'})$ of all pairs of rows."""
        n, r, _ = self.shape
        T = self.left.shape[2]
        G, A = (x.expand(-1, r, -1, -1).reshape(n * r * T, -1).to(dtype) for x in (self.left, self.right))
        return ((G @ G.mT) * (A @ A.mT)).unflatten(0, (-1, T)).unflatten(2, (-1, T)).sum((1, 3))

    @property
    def contractions_are_cheaper(self) -> bool:
        """Whether weighted sums cost less by the factors than by the rows: few positions, one right factor a sample."""
        return self.right.shape[1] == 1 and self.right.shape[2] <= self.shape[1]

    def weighted_products(self, weights: Float[Tensor, " p"], *, pairs: bool) -> Tensor:
        r"""Return $\sum_{ij} w_{ij} M_{ij} M'_{ij}$ of all pairs of a sample's rows, or of each row with itself.

        Needs `contractions_are_cheaper`. With several positions in double precision, because their sums may cancel.
        """
        exact = self.left.dtype if self.positions == 1 else accumulation_dtype(self.left)
        G, A = self.left.to(exact), self.right[:, 0].to(exact)
        (n, _, T, o), i = G.shape, A.shape[-1]
        G = G.expand(-1, self.shape[1], -1, -1)
        products = (A[:, :, None] * A[:, None]).flatten(0, 2) @ weights.to(exact).reshape(o, i).mT
        half = torch.einsum("nrto,ntuo->nruo", G, products.unflatten(0, (n, T, T)))
        squares = half.flatten(2) @ G.flatten(2).mT if pairs else (half * G).sum((2, 3))
        return squares.to(self.left.dtype)

    def weighted_projections(self, weights: Float[Tensor, " p"], U: Float[Tensor, "p k"]) -> Float[Tensor, "n r k"]:
        r"""Return $\sum_{ij} w_{ij} M_{ij} U_{ij}$, contracting right factors first, where that is cheaper."""
        A = self.right[:, 0]
        (n, T, i), o, r, k = A.shape, self.left.shape[-1], self.shape[1], U.shape[1]
        G = self.left.expand(-1, r, -1, -1)
        total = G.new_zeros(n, r, k)
        step = max(1, _chunk_bytes(U) // max(1, U.element_size() * k * (n * T + i)))
        for start in range(0, o if k else 0, step):
            stop = min(start + step, o)
            part = U[start * i : stop * i].to(weights) * weights[start * i : stop * i, None]
            pushed = (A.flatten(0, 1) @ part.unflatten(0, (-1, i))).unflatten(1, (n, T))
            total += torch.einsum("nrto,ontk->nrk", G[..., start:stop], pushed)
        return total

    def rotated(self, block: BasisBlock) -> "OuterRows":
        """Return the rows in the coordinates of a basis."""
        left = self.left if block.left is None else self.left @ block.left
        right = self.right if block.right is None else self.right @ block.right
        return OuterRows(left, right)


RowsOfParameter = OuterRows | Float[Tensor, "_n _r _p"]
"""Rows of one parameter, as factors or flat."""


def placed(part: RowsOfParameter, start: int, n_samples: int, into: RowsOfParameter | None = None) -> RowsOfParameter:
    """Write the rows of some samples to their place among those of all.

    Args:
        part: rows of adjacent samples.
        start: number of the first of them.
        n_samples: number of all samples.
        into: rows of all, which are written to where shapes allow that; None: new ones.

    Returns:
        The rows of all samples, undefined where nothing was written.
    """
    chosen = slice(start, start + part.shape[0])
    if not isinstance(part, OuterRows) or isinstance(into, Tensor):
        rows = flat(part)
        total = rows.new_empty(n_samples, *rows.shape[1:]) if into is None else flat(into)
        total[chosen] = rows
        return total
    if into is None:
        into = OuterRows(*(x.new_empty(n_samples, *x.shape[1:]) for x in (part.left, part.right)))
    # samples of other batches may have other numbers of positions
    T = max(part.positions, into.positions)
    part, into = part.padded(T), into.padded(T)
    into.left[chosen], into.right[chosen] = part.left, part.right
    return into


def flat(rows: RowsOfParameter) -> Float[Tensor, "n r p"]:
    """Return the rows of one parameter as a tensor."""
    return rows.dense() if isinstance(rows, OuterRows) else rows


@dataclass(frozen=True, eq=False)
class RecomputedRows:
    """Rows by parameter that are computed again at every use, those of a few parameters at a time.

    Attributes:
        shape: n, r and the number of parameters' entries, P.
        like: a tensor of the rows' dtype and device.
        sizes: number of entries of each parameter.
        groups: ranges of parameters whose rows fit into memory together, in order.
        compute: map from a range to the rows of its parameters.
    """

    shape: tuple[int, int, int]
    like: Tensor
    sizes: tuple[int, ...]
    groups: tuple[range, ...]
    compute: "Callable[[range], list[RowsOfParameter]]"

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> "Iterator[RowsOfParameter]":
        for group in self.groups:
            parts = self.compute(group)[::-1]
            # each is let go before the next
            while parts:
                yield parts.pop()

    def changed(self, change: "Callable[[int, RowsOfParameter], RowsOfParameter]") -> "RecomputedRows":
        """Return the rows with a function applied to those of each parameter, given its number."""

        def compute(group: range) -> list[RowsOfParameter]:
            parts = self.compute(group)
            for i, number in enumerate(group):
                parts[i] = change(number, parts[i])
            return parts

        return replace(self, compute=compute)


@dataclass(frozen=True, eq=False)
class RowMatrix:
    """Rows of n samples, r each, by parameter.

    Attributes:
        parts: one for each parameter, in order; or a single one for all.
        shard: of the parameters, where the rows have the entries of these alone; sums are over all parameters then.
    """

    parts: tuple[RowsOfParameter, ...] | RecomputedRows
    shard: Shard | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """n, r and the number of entries."""
        if isinstance(self.parts, RecomputedRows):
            return self.parts.shape
        n, r, _ = self.parts[0].shape
        return n, r, sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each parameter."""
        if isinstance(self.parts, RecomputedRows):
            return self.parts.sizes
        return tuple(part.shape[2] for part in self.parts)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def recomputed(self) -> bool:
        """Whether rows are computed again at every use."""
        return isinstance(self.parts, RecomputedRows)

    @property
    def by_parameter(self) -> bool:
        """Whether there is a part for each parameter, not one for all."""
        return self.recomputed or len(self.parts) > 1 or self.shard is not None

    @property
    def like(self) -> Tensor:
        """A tensor of the rows' dtype and device."""
        if isinstance(self.parts, RecomputedRows):
            return self.parts.like
        part = self.parts[0]
        return part.left if isinstance(part, OuterRows) else part

    def dense(self) -> Float[Tensor, "n r P"]:
        """Return all rows as one tensor."""
        return torch.cat([flat(part) for part in self.parts], dim=-1) if len(self.parts) > 1 else self._only

    @property
    def _only(self) -> Float[Tensor, "n r P"]:
        (part,) = self.parts
        return flat(part)

    def _changed(self, change: Callable[[int, RowsOfParameter], RowsOfParameter]) -> "RowMatrix":
        if isinstance(self.parts, RecomputedRows):
            return RowMatrix(self.parts.changed(change))
        return RowMatrix(tuple(change(i, part) for i, part in enumerate(self.parts)), self.shard)

    def within(self, shard: Shard | None) -> "RowMatrix":
        """Return the rows with the entries of some parameters alone; None: as they are."""
        if shard is None or self.shard is not None:
            return self
        if self.by_parameter:
            return RowMatrix(tuple(self.parts)[shard.numbers], shard)
        return RowMatrix((shard.own(self._only),), shard)

    def _summed(self, total: Tensor) -> Tensor:
        return total if self.shard is None else self.shard.summed(total)

    def at(self, samples: Tensor | slice) -> "RowMatrix":
        """Return the rows of some samples, by their indices or a mask."""
        changed = self._changed(lambda _, part: part.at(samples) if isinstance(part, OuterRows) else part[samples])
        if isinstance(changed.parts, RecomputedRows):
            n, r, P = self.shape
            n = len(torch.arange(n)[samples.cpu() if isinstance(samples, Tensor) else samples])
            return RowMatrix(replace(changed.parts, shape=(n, r, P)))
        return changed

    def scaled(self, factors: Float[Tensor, " n"]) -> "RowMatrix":
        """Return the rows times a number for each sample."""

        def scaled(_: int, part: RowsOfParameter) -> RowsOfParameter:
            return part.scaled(factors) if isinstance(part, OuterRows) else part * factors.to(part)[:, None, None]

        return self._changed(scaled)

    def rotated(self, basis: KroneckerBasis | None) -> "RowMatrix":
        """Return the rows in the coordinates of a basis; None: as they are."""
        if basis is None:
            return self
        if len(self.parts) == 1 and len(basis.blocks) > 1:
            return RowMatrix((basis.coordinates(self._only),), self.shard)
        blocks = basis.blocks

        def rotated(i: int, part: RowsOfParameter) -> RowsOfParameter:
            return part.rotated(blocks[i]) if isinstance(part, OuterRows) else blocks[i].rotated(part, back=False)

        return self._changed(rotated)

    @property
    def places(self) -> list[slice]:
        """Place of each parameter in the flat vector."""
        ends = torch.tensor([0, *self.sizes]).cumsum(0).tolist()
        return [slice(a, b) for a, b in pairwise(ends)]

    def columns(self, row_bytes: int = 1) -> Iterator[tuple[slice, Float[Tensor, "n r w"]]]:
        """Yield chunks of the columns, with their places in the flat vector.

        Args:
            row_bytes: bytes that the caller needs for each entry, relative to those of the entry.
        """
        most = self._most_columns(row_bytes)
        for place, part in zip(self.places, self.parts, strict=True):
            for local, rows in _columns_of(part, most):
                yield slice(place.start + local.start, place.start + local.stop), rows

    def projected(self, U: Float[Tensor, "P k"]) -> Float[Tensor, "n r k"]:
        """Return the products with directions."""
        n, r, _ = self.shape
        total = self.like.new_zeros(n, r, U.shape[1])
        for place, rows in self.columns():
            total += rows @ U[place].to(rows)
        return self._summed(total)

    def squared_norms(self) -> Float[Tensor, " n"]:
        """Return the sum of the squared norms of every sample's rows, in double precision."""
        n = len(self)
        exact = accumulation_dtype(self.like)
        total = self.like.new_zeros(n, dtype=exact)
        for part in self.parts:
            if isinstance(part, OuterRows) and part.positions <= min(part.left.shape[-1], part.right.shape[-1]):
                size = max(1, _chunk_bytes(self.like) // max(1, exact.itemsize * part.n_numbers // max(n, 1)))
                groups = [part.at(slice(start, start + size)) for start in range(0, n, size)]
                total += torch.cat([group.squared_norms(exact) for group in groups])
                continue
            for _, rows in _columns_of(part, self._most_columns()):
                total += rows.square().sum((1, 2), dtype=exact)
        return self._summed(total)

    def weighted(
        self, weights: Float[Tensor, " P"], U: Float[Tensor, "P k"], *, pairs: bool
    ) -> tuple[Tensor, Float[Tensor, "n r k"]]:
        r"""Return the products $V_n W V_n^\top$ of each sample's rows, and $V_n W U$.

        Args:
            weights: diagonal of W.
            U: directions.
            pairs: all pairs of a sample's rows, (n, r, r), not the squares of each, (n, r).
        """
        n, r, _ = self.shape
        squares = self.like.new_zeros((n, r, r) if pairs else (n, r))
        projections = self.like.new_zeros(n, r, U.shape[1])
        for place, part in zip(self.places, self.parts, strict=True):
            w, u = weights[place], U[place]
            if isinstance(part, OuterRows) and part.contractions_are_cheaper:
                T, o, i = part.positions, part.left.shape[-1], part.right.shape[-1]
                size = max(1, _PRODUCT_BYTES // max(1, 8 * T * (T * (o + i) + 2 * r * o)))
                groups = [part.at(slice(start, start + size)) for start in range(0, n, size)]
                squares += torch.cat([group.weighted_products(w, pairs=pairs) for group in groups])
                projections += part.weighted_projections(w, u)
                continue
            for local, rows in _columns_of(part, self._most_columns()):
                scaled = rows * w[local]
                squares += scaled @ rows.mT if pairs else (scaled * rows).sum(-1)
                projections += scaled @ u[local].to(scaled)
        return self._summed(squares), self._summed(projections)

    def _most_columns(self, row_bytes: int = 1) -> int:
        n, r, _ = self.shape
        return max(1, _chunk_bytes(self.like) // (max(1, n * r) * self.like.element_size() * row_bytes))

    def combined(self, W: Float[Tensor, "R k"], *, out: Float[Tensor, "P k"] | None = None) -> Float[Tensor, "P k"]:
        """Return $V^T W$ for all rows V (R, P), those of a sample adjacent; out None: in a new tensor."""
        result = W.new_empty(self.shape[2], W.shape[1]) if out is None else out
        for place, rows in self.columns():
            result[place] = rows.flatten(0, 1).mT @ W
        return result

    def residual_squares(
        self, projections: Float[Tensor, "n r k"], U: Float[Tensor, "P k"], basis: KroneckerBasis | None
    ) -> Float[Tensor, " P"]:
        """Return the squares, summed over rows, of what directions leave of the rows, in the coordinates of a basis.

        Args:
            projections: of the rows on the directions.
            U: orthonormal directions, not in the coordinates of the basis.
            basis: one block for each part; None: the axes.
        """
        total = projections.new_zeros(self.shape[2], dtype=accumulation_dtype(projections))
        most = self._most_columns()
        blocks = [None] * len(self.parts) if basis is None else list(basis.blocks)
        for place, part, block in zip(self.places, self.rotated(basis).parts, blocks, strict=True):
            own = U[place].to(projections)
            own = own if block is None else block.rotated_columns(own)
            for local, rows in _columns_of(part, most):
                outside = rows - projections @ own[local].mT
                total[place.start + local.start : place.start + local.stop] = outside.square().sum((0, 1))
        return total

    def products(self) -> Float[Tensor, "R R"]:
        """Return the inner products of all pairs of rows, in double precision."""
        n, r, _ = self.shape
        exact = accumulation_dtype(self.like)
        total = self.like.new_zeros(n * r, n * r, dtype=exact)
        # as many columns as rows: sums of products, which are held, cost less than products
        most = max(n * r, self._most_columns(2))
        for part in self.parts:
            if isinstance(part, OuterRows) and part.products_are_cheaper:
                total += part.products(exact)
                continue
            for _, rows in _columns_of(part, most):
                total += row_products(rows.flatten(0, 1), exact)
        return self._summed(total)


def _chunk_bytes(like: Tensor) -> int:
    return _CHUNK_BYTES if like.device.type == "cpu" else _CHUNK_BYTES_OF_ACCELERATORS


def _columns_of(part: RowsOfParameter, most: int) -> Iterator[tuple[slice, Float[Tensor, "n r w"]]]:
    """Yield chunks of at most about so many columns."""
    if not isinstance(part, OuterRows):
        for first in range(0, part.shape[2], most):
            last = min(first + most, part.shape[2])
            yield slice(first, last), part[..., first:last]
        return
    o, i = part.left.shape[-1], part.right.shape[-1]
    step = max(1, most // max(i, 1))
    for first in range(0, o, step):
        last = min(first + step, o)
        yield slice(first * i, last * i), part.columns(first, last)


def row_products(
    rows: Float[Tensor, "R P"],
    dtype: torch.dtype,
    *,
    weights: Float[Tensor, " P"] | None = None,
    device: torch.device | None = None,
) -> Float[Tensor, "R R"]:
    """Return the inner products of all pairs of rows in the given precision, computing one triangle only.

    Args:
        rows: the vectors.
        dtype: precision of products and sums.
        weights: of the entries, in that precision, on the device; None: 1.
        device: of the computation; None: that of the vectors.
    """
    R, P = rows.shape
    lower = rows.new_zeros(R, R, dtype=dtype, device=device)
    width = max(1, min(P, _PANEL_BYTES // (8 * max(R, 1))))
    for start in range(0, P, width):
        V = rows[:, start : start + width].to(lower)
        weighted = V if weights is None else V * weights[start : start + width]
        for i in range(0, R, _PANEL):
            stop = min(i + _PANEL, R)
            lower[i:stop, :stop] += weighted[i:stop] @ V[:stop].T
    return lower.tril() + lower.tril(-1).T
