r"""Kronecker factors of a curvature, one pair per parameter, by two routes.

*Row matrices*: the rows of a curvature's root, seen per parameter as matrices M of the parameter's own shape, give
$L = \sum M M^\top$ and $R = \sum M^\top M$, the partial traces of the parameter's block. No hooks and no list of
layers: every parameter with the shape of a matrix has them.

*K-FAC*: the second moments of a layer's inputs and of the gradients at its outputs, for linear layers and convolutions.
Where a layer's weights act at several positions of a sample (sequences, images), "expand" counts every position as a
sample of its own, and "reduce" averages inputs and sums gradients over positions first.

References:
    Martens & Grosse (2015), arXiv 1503.05671; Grosse & Martens (2016), arXiv 1602.01407 (convolutions); Eschenhagen,
    Immer, Turner, Schneider & Hennig (2023), arXiv 2311.00636 (expand and reduce).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from debiased_laplace.curvature.linear_layer import LinearLayer
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.roots import OutputRoot
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.data.batches import Batch
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.kronecker_basis import BasisBlock, KroneckerBasis
from debiased_laplace.linalg.outer_products import outer_factors

KfacApproximation = Literal["expand", "reduce"]
_LARGEST_SIDE = 4096
"""A side longer than this keeps its axes: its eigenvectors would cost its cube."""

_BATCH = 64  # samples whose layer inputs are held at once


@dataclass(frozen=True)
class Side:
    """One side of a parameter as a matrix: its length, and whether it gets a basis of its own."""

    size: int
    full: bool


@dataclass(frozen=True)
class MatrixShape:
    """A parameter as a matrix: first dimension against all others."""

    rows: Side
    columns: Side


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """The curvature of one parameter as left ⊗ right.

    Attributes:
        left: of the rows, (o, o); only its diagonal, (o,), where that side keeps its axes.
        right: of the columns, (i, i) or (i,).
    """

    left: Tensor
    right: Tensor

    def scaled(self, weight: float) -> "KroneckerFactors":
        """The same curvature times a number."""
        return KroneckerFactors(self.left * weight, self.right)

    def basis(self, dtype: torch.dtype) -> BasisBlock:
        """Eigenvectors of both sides, by decreasing eigenvalue."""
        return BasisBlock(
            len(self.left), len(self.right), _eigenvectors(self.left, dtype), _eigenvectors(self.right, dtype)
        )

    def diagonal_in(self, block: BasisBlock) -> Tensor:
        """Curvature along the vectors of a basis, (o · i,)."""
        return torch.outer(_diagonal_in(self.left, block.left), _diagonal_in(self.right, block.right)).flatten()


def matrix_shapes(selection: ParameterSelection, *, layers_only: bool) -> list[MatrixShape]:
    """How each parameter is seen as a matrix, and which sides get a basis.

    Args:
        selection: the parameters; one of which only some entries are selected keeps its axes.
        layers_only: only weights and biases of linear layers and convolutions that K-FAC knows get a basis; without it
            every parameter of two or more dimensions does, and the biases of such layers.
    """
    parameters = dict(selection.model.named_parameters())
    layers = _kfac_layers(selection.model)
    weights = {id(layer.weight) for layer in layers.values()}
    biases = {id(layer.bias) for layer in layers.values() if layer.bias is not None}
    shapes = []
    for name, shape, entries in zip(selection.names, selection.shapes, selection.entries, strict=True):
        p = parameters[name]
        known = id(p) in weights if layers_only else p.ndim >= 2
        if entries is None and known and shape.numel():
            o, i = shape[0], shape.numel() // shape[0]
            shapes.append(MatrixShape(Side(o, 1 < o <= _LARGEST_SIDE), Side(i, 1 < i <= _LARGEST_SIDE)))
        else:
            full = entries is None and id(p) in biases and 1 < shape.numel() <= _LARGEST_SIDE
            shapes.append(MatrixShape(Side(shape.numel(), full), Side(1, False)))
    return shapes


def kronecker_basis(factors: Iterable[KroneckerFactors], dtype: torch.dtype) -> KroneckerBasis:
    """The eigenbasis of every pair of factors."""
    return KroneckerBasis(tuple(f.basis(dtype) for f in factors))


def row_matrix_factors(curvature: RowCurvature, shapes: list[MatrixShape]) -> list[KroneckerFactors]:
    r"""$L = \frac1n \sum M M^\top$ and $R = \sum M^\top M / \sum \|M\|^2$ of every parameter: L ⊗ R keeps the trace."""
    if curvature.linear_layer is not None:
        return _outer_product_factors(curvature, curvature.linear_layer, shapes)
    like = curvature.network.like
    exact = accumulation_dtype(like)
    sizes = [shape.rows.size * shape.columns.size for shape in shapes]
    sums = [
        tuple(like.new_zeros((side.size,) * (2 if side.full else 1), dtype=exact) for side in (s.rows, s.columns))
        for s in shapes
    ]
    for block in curvature.rows("[Kronecker factors]"):
        for part, shape, (left, right) in zip(block.split(sizes, dim=-1), shapes, sums, strict=True):
            # a parameter may be empty: no -1 in its shape
            M = part.reshape(part.shape[0] * part.shape[1], shape.rows.size, shape.columns.size)
            factors = outer_factors(M)
            if factors is not None:
                g, a = factors
                left += _weighted_gram(g, a.square().sum(1), full=shape.rows.full)
                right += _weighted_gram(a, g.square().sum(1), full=shape.columns.full)
                continue
            left += torch.einsum("nop,nqp->oq", M, M) if shape.rows.full else M.square().sum((0, 2))
            right += torch.einsum("nop,noq->pq", M, M) if shape.columns.full else M.square().sum((0, 1))
    return [_trace_preserving(left / curvature.n_samples, right) for left, right in sums]


def _outer_product_factors(
    curvature: RowCurvature, layer: LinearLayer, shapes: list[MatrixShape]
) -> list[KroneckerFactors]:
    r"""The same of a last linear layer, where M is $s \varphi^\top$ and a row of the bias s."""
    exact = accumulation_dtype(curvature.network.like)
    sums: list[tuple[Tensor, Tensor]] = []
    for features, columns in curvature.outer_products("[Kronecker factors]"):
        features = features.to(exact)
        lengths = features.square().sum(1)
        if not sums:
            C, d = curvature.network.n_outputs, features.shape[1]
            for part, shape in zip(layer.parts, shapes, strict=True):
                left = features.new_zeros((C, C) if shape.rows.full else (C,))
                right = features.new_zeros((d, d) if shape.columns.full else (d if part == "weight" else 1,))
                sums.append((left, right))
        for S in columns:
            S = S.to(exact)
            sizes = S.square().sum((1, 2))
            for part, shape, (left, right) in zip(layer.parts, shapes, sums, strict=True):
                weights = lengths if part == "weight" else torch.ones_like(lengths)
                left += _weighted_gram(S.mT.flatten(0, 1), weights.repeat_interleave(S.shape[2]), full=shape.rows.full)
                y = features if part == "weight" else torch.ones_like(features[:, :1])
                right += _weighted_gram(y, sizes, full=shape.columns.full)
    return [_trace_preserving(left / curvature.n_samples, right) for left, right in sums]


def _weighted_gram(x: Tensor, weights: Tensor, *, full: bool) -> Tensor:
    """Sum over rows of w x x' (its diagonal only, unless full)."""
    weighted = x * weights[:, None]
    return x.T @ weighted if full else (x * weighted).sum(0)


def partial_trace_factors(H: Tensor, shapes: list[MatrixShape]) -> list[KroneckerFactors]:
    """The same from a dense curvature (P, P): the partial traces of every parameter's block."""
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


class KfacSums:
    """Running sums of K-FAC's factors over batches."""

    def __init__(self, network: Network, root: OutputRoot, approximation: KfacApproximation):
        self.network, self.root, self.approximation = network, root, approximation
        self.n = 0
        layers = _kfac_layers(network.selection.model)
        own = set(network.selection.names)
        ids = {id(p): name for name, p in network.selection.model.named_parameters()}
        self._weights: dict[str, str] = {}
        self._biases: dict[str, str] = {}
        for name, layer in layers.items():
            if ids[id(layer.weight)] in own:
                self._weights[name] = ids[id(layer.weight)]
            if layer.bias is not None and ids[id(layer.bias)] in own:
                self._biases[name] = ids[id(layer.bias)]
        self._layers = {name: layers[name] for name in {**self._weights, **self._biases}}
        self._inputs: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._positions: dict[str, int] = {}
        # layers whose first dimension does not count samples, or through which no gradient comes
        self._strange: set[str] = set()

    def add(self, batch: Batch, side: Tensor) -> None:
        """Some more samples; the model's hooks are removed again."""
        for some, known in zip(batch.chunks(_BATCH), side.split(_BATCH), strict=True):
            self._add(some, known)

    def factors(self) -> dict[str, KroneckerFactors]:
        """Factors by the parameter's name, means over samples."""
        found: dict[str, KroneckerFactors] = {}
        for layer, G in self._gradients.items():
            if layer in self._strange:
                continue
            G = G / self.n
            if layer in self._weights:
                A = self._inputs[layer] / max(self._positions[layer], 1)
                found[self._weights[layer]] = KroneckerFactors(G, A)
            if layer in self._biases:
                found[self._biases[layer]] = KroneckerFactors(G, G.new_ones(1))
        return found

    def _add(self, batch: Batch, side: Tensor) -> None:
        seen: list[tuple[str, Tensor]] = []

        def note(name: str) -> Any:
            def hook(module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Any:
                a = (arguments[0] if arguments else named["input"]).detach()
                if not output.requires_grad or not _counts_samples(module, a, output, len(batch)):
                    self._strange.add(name)
                    return output
                self._add_inputs(name, a)
                seen.append((name, output))
                # what comes next may work in place, and would put its own output in the place of this one
                return output.clone()

            return hook

        handles = [layer.register_forward_hook(note(name), with_kwargs=True) for name, layer in self._layers.items()]
        leaves = {name: p.detach().requires_grad_() for name, p in self.network.parameters.items()}
        try:
            with torch.enable_grad():
                outputs = self.network.selection.call(leaves, batch.inputs)
        finally:
            for handle in handles:
                handle.remove()
        self.n += len(batch)
        if not seen:
            return
        at = [output for _, output in seen]
        S = self.root.columns(outputs.detach(), side, slice(None))
        for cotangent in S.unbind(-1):
            gradients = torch.autograd.grad(outputs, at, cotangent, retain_graph=True, materialize_grads=True)
            for (name, _), g in zip(seen, gradients, strict=True):
                G = _positions_of_outputs(self._layers[name], g)
                G = G.sum(1, keepdim=True) if self.approximation == "reduce" else G
                _accumulate(self._gradients, name, G)

    def _add_inputs(self, name: str, a: Tensor) -> None:
        A = _positions_of_inputs(self._layers[name], a)
        A = A.mean(1, keepdim=True) if self.approximation == "reduce" else A
        self._positions[name] = self._positions.get(name, 0) + A.shape[0] * A.shape[1]
        _accumulate(self._inputs, name, A)


def _accumulate(sums: dict[str, Tensor], name: str, x: Tensor) -> None:
    x = x.flatten(0, 1).to(accumulation_dtype(x))
    sums[name] = x.T @ x if name not in sums else sums[name] + x.T @ x


def _trace_preserving(left: Tensor, right: Tensor) -> KroneckerFactors:
    total = (right.diagonal() if right.ndim == 2 else right).sum()
    return KroneckerFactors(left, right / total if bool(total != 0) else right)


def _eigenvectors(factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    return torch.linalg.eigh(factor)[1].flip(1).to(dtype) if factor.ndim == 2 else None


def _diagonal_in(factor: Tensor, basis: Tensor | None) -> Tensor:
    if factor.ndim == 1:
        return factor
    if basis is None:
        return factor.diagonal()
    Q = basis.to(factor.dtype)
    return (Q * (factor @ Q)).sum(0)


def _counts_samples(layer: nn.Module, a: Tensor, output: Tensor, n: int) -> bool:
    """Whether a layer is called as K-FAC knows it: samples first, then positions, or channels and positions."""
    dimensions = {nn.Conv1d: (3,), nn.Conv2d: (4,)}
    expected = next((d for kind, d in dimensions.items() if isinstance(layer, kind)), tuple(range(2, 10)))
    return a.ndim in expected and len(a) == n == len(output)


KfacLayer = nn.Linear | nn.Conv1d | nn.Conv2d


def _kfac_layers(model: nn.Module) -> dict[str, KfacLayer]:
    """Layers that K-FAC knows, each parameter in one place only."""
    places: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                places[id(p)] = places.get(id(p), 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
        and places.get(id(module.weight)) == 1
        and (isinstance(module, nn.Linear) or (module.groups == 1 and module.padding_mode == "zeros"))
    }


def _positions_of_inputs(layer: KfacLayer, a: Tensor) -> Tensor:
    """A layer's inputs as (samples, positions, columns of its weight as a matrix)."""
    if isinstance(layer, nn.Linear):
        return a.reshape(len(a), -1, a.shape[-1])
    before_and_after = layer._reversed_padding_repeated_twice
    a = pad(a, before_and_after)
    if isinstance(layer, nn.Conv1d):
        a = a[:, :, None]
        kernel, dilation, stride = ((1, *layer.kernel_size), (1, *layer.dilation), (1, *layer.stride))
    else:
        kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    return unfold(a, kernel, dilation=dilation, stride=stride).mT


def _positions_of_outputs(layer: KfacLayer, g: Tensor) -> Tensor:
    """Gradients at a layer's outputs as (samples, positions, rows of its weight)."""
    if isinstance(layer, nn.Linear):
        return g.reshape(len(g), -1, g.shape[-1])
    return g.flatten(2).mT
