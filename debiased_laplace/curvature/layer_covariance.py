r"""Covariances of a last linear layer's outputs under a Gaussian over its parameters, in closed form from features.

With features $\varphi$, a row of the weight's Jacobian is $e_c \otimes \varphi$ and is never formed. The covariance of
the parameters is $K D^{-1} K^\top + F^\top \mathrm{diag}(v) F$ with $K = Q_G \otimes Q_A$. In that of the outputs, the
first term is $Q_G\,\mathrm{diag}(w)\,Q_G^\top$ with $w_c = \sum_a (Q_A^\top \varphi)_a^2 / D_{ca}$, and the second one
$B\,\mathrm{diag}(v)\,B^\top$ with $B_{cj} = \sum_a F_{j,ca} \varphi_a$. A bias is a weight whose only feature is 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.linear_layer import LinearLayer
from debiased_laplace.curvature.memory import CHUNK_BYTES
from debiased_laplace.curvature.roots import OutputRoot
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.kronecker_basis import BasisBlock
from debiased_laplace.linalg.low_rank_plus_diagonal import LowRankPlusDiagonal

_COPIES = 4
"""Copies of the low-rank factor that are in memory at once while it is computed."""


@dataclass(frozen=True, eq=False)
class OutputCovariances:
    r"""Covariances of n samples' outputs, $\sum_p Q_p\,\mathrm{diag}(w_p)\,Q_p^\top + B\,\mathrm{diag}(v)\,B^\top$.

    Attributes:
        terms: Q and w of the weight and of the bias; Q is None for the identity.
        factor: B.
        weights: v, of any sign.
    """

    terms: tuple[tuple[Float[Tensor, "C C"] | None, Float[Tensor, "n C"]], ...]
    factor: Float[Tensor, "n C k"]
    weights: Float[Tensor, " k"]

    def variances(self) -> Float[Tensor, "n C"]:
        """Return the variance of every output."""
        total = self.factor.square() @ self.weights
        for Q, w in self.terms:
            total = total + (w if Q is None else w @ Q.square().T)
        return total

    def dense(self) -> Float[Tensor, "n C C"]:
        """Return the covariances."""
        total = (self.factor * self.weights) @ self.factor.mT
        for Q, w in self.terms:
            total = total + (torch.diag_embed(w) if Q is None else (Q * w[:, None]) @ Q.T)
        return total


@dataclass(frozen=True, eq=False)
class LayerCovariance:
    """A Gaussian over the parameters of a last linear layer.

    Attributes:
        layer: the layer.
        blocks: basis of each parameter, and the inverse of the precision's diagonal in it, (o, i).
        rows: F, (k, P).
        weights: v.
    """

    layer: LinearLayer
    blocks: tuple[tuple[BasisBlock, Float[Tensor, "o _i"]], ...]
    rows: Float[Tensor, "k P"]
    weights: Float[Tensor, " k"]

    @classmethod
    def of(cls, layer: LinearLayer, precision: LowRankPlusDiagonal, memory: int) -> "LayerCovariance | None":
        """Return the Gaussian of a precision; None if its directions take more bytes of memory than there may be."""
        # single precision suffices where nothing is subtracted
        like, exact, P = precision.magnitudes, accumulation_dtype(precision.magnitudes), precision.n_parameters
        rows, weights, dtype = like.new_zeros(0, P), like.new_zeros(0), like.dtype
        if precision.rank:
            if _COPIES * precision.rank * P * exact.itemsize > memory:
                return None
            (rows, weights), dtype = precision.inverse_factor, exact
        if precision.rank == P:
            return cls(layer, (), rows, weights)
        names, sizes = layer.selection.names, layer.selection.sizes
        shapes = dict(zip(names, layer.selection.shapes, strict=True))
        inverses = (1 / precision.diagonal.to(dtype)).expand(P).split(sizes)
        blocks = []
        for i, (name, inverse) in enumerate(zip(names, inverses, strict=True)):
            o = shapes[name][0]
            block = BasisBlock(o, len(inverse) // o) if precision.basis is None else precision.basis.blocks[i]
            left, right = (None if side is None else side.to(dtype) for side in (block.left, block.right))
            blocks.append((BasisBlock(block.rows, block.columns, left, right), inverse.reshape(o, -1)))
        return cls(layer, tuple(blocks), rows, weights)

    def of_features(self, features: Float[Tensor, "n d"]) -> Iterator[tuple[slice, OutputCovariances]]:
        """Yield the covariances of the outputs at features, for parts of them that bound the memory."""
        C = self.layer.layer.out_features
        size = max(1, CHUNK_BYTES // (2 * self.weights.element_size() * C * max(1, len(self.weights))))
        for start in range(0, len(features), size):
            chosen = slice(start, start + size)
            yield chosen, OutputCovariances(self._terms(features[chosen]), self._factor(features[chosen]), self.weights)

    def joint(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "nC nC"]:
        """Return the covariance of all outputs at all features, by sample, then output."""
        factor = self._factor(features).flatten(0, 1)
        total = (factor * self.weights) @ factor.T
        for (block, inverse), a in zip(self.blocks, self._rotated(features), strict=True):
            w = torch.einsum("na,ma,ca->nmc", a, a, inverse)
            Q = torch.eye(block.rows, dtype=w.dtype, device=w.device) if block.left is None else block.left
            total = total + torch.einsum("ck,nmk,ek->ncme", Q, w, Q).reshape(total.shape)
        return total

    def traces(
        self, features: Float[Tensor, "n d"], outputs: Float[Tensor, "n C"], root: OutputRoot, targets_or_noise: Tensor
    ) -> Float[Tensor, " n"]:
        r"""Return the traces of the covariances times $S_n S_n^\top$."""
        parts = []
        for chosen, found in self.of_features(features):
            f, part = outputs[chosen], targets_or_noise[chosen]
            exact = accumulation_dtype(f)
            along = root.transposed(f.to(exact), part, found.factor.to(exact))
            total = along.square().sum(1) @ found.weights.to(exact)
            for Q, w in found.terms:
                total = total + (w.to(exact) * root.quadratics(f, part, Q)).sum(1)
            parts.append(total.to(outputs.dtype))
        return torch.cat(parts)

    def _rotated(self, features: Float[Tensor, "n d"]) -> Iterator[Float[Tensor, "n i"]]:
        """Yield the features of each parameter in its basis."""
        for name, (block, inverse) in zip(self.layer.parts, self.blocks, strict=False):
            a = features.to(inverse.dtype) if name == "weight" else inverse.new_ones(len(features), 1)
            yield a if block.right is None else a @ block.right

    def _terms(self, features: Float[Tensor, "n d"]) -> tuple[tuple[Tensor | None, Tensor], ...]:
        return tuple(
            (block.left, a.square() @ inverse.T)
            for (block, inverse), a in zip(self.blocks, self._rotated(features), strict=True)
        )

    def _factor(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n C k"]:
        return self.layer.pushed(features.to(self.rows.dtype), self.rows.T)
