r"""Rows by layers: one backward pass for the rows of all samples of a batch, whatever the layers.

A row is the gradient, with respect to the parameters, of one sample's outputs times a cotangent. Samples do not meet in
the network, so the backward pass of a whole batch, each sample with a cotangent of its own, gives at every layer the
cotangents of the layer's outputs for each sample; with the layer's inputs they give the sample's rows. A linear map
with inputs $a_t$ and cotangents $g_t$ at positions t has the row $\sum_t g_t a_t^\top$ (`OuterRows`); recurrent layers
(`recurrent_layers`) and embeddings are linear maps too; other functions (normalization, a product with a raw parameter)
are differentiated on their own.

Layers are found where torch's functions are called with a selected parameter, so that modules, functional calls and
shared parameters are all seen. Of each call, the axis that counts samples is the one that changes with their number.

References:
    Goodfellow (2015), arXiv 1510.01799 (linear layers); Rochette, Manoel & Tramel (2019), arXiv 1912.06015
    (convolutions); Yousefpour et al. (2021), arXiv 2109.12298 (per-sample gradients by hooks).
"""

import math
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from debiased_laplace.curvature.as_found import raise_interrupt
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.curvature.recurrent_layers import as_steps
from debiased_laplace.data.inputs import Inputs, n_samples_of, on_each
from debiased_laplace.linalg.row_matrix import OuterRows, RowsOfParameter, flat

Cotangents = Callable[[Tensor, Tensor], Tensor]
"""Map from the outputs (C,) of one sample and its targets or noise to the columns of a (C, r) matrix."""


class LayersDifferError(Exception):
    """Layers are called otherwise than when they were found."""


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a function with selected parameters.

    Attributes:
        function: the function.
        arguments: positional arguments by number and others by name; tensors without a graph.
        names: parameter in each argument that is one.
        output: what it returned, without a graph.
        edge: the output in the graph.
    """

    function: Callable[..., Tensor]
    arguments: dict[int | str, Any]
    names: dict[int | str, str]
    output: Tensor
    edge: Any

    @property
    def kind(self) -> tuple[Any, ...]:
        """What has to be the same in every batch."""
        return self.function, tuple(self.names.items())

    @property
    def tensors(self) -> dict[int | str, Tensor]:
        """Tensors among the arguments that are no parameters, and the output ("")."""
        tensors = {k: v for k, v in self.arguments.items() if isinstance(v, Tensor) and k not in self.names}
        return {**tensors, "": self.output}

    def __call__(self, values: dict[int | str, Any]) -> Tensor:
        """Call the function with other values of some arguments."""
        arguments = {**self.arguments, **values}
        positional = [arguments[i] for i in sorted(k for k in arguments if isinstance(k, int))]
        return self.function(*positional, **{k: v for k, v in arguments.items() if isinstance(k, str)})


@dataclass(frozen=True)
class _Axis:
    """Axis of a tensor that counts samples.

    Attributes:
        number: of the axis.
        positions: number of positions of a sample in the axis.
        sample_first: whether the positions of a sample are next to each other.
    """

    number: int
    positions: int = 1
    sample_first: bool = True

    @classmethod
    def of(cls, two: Tensor, three: Tensor) -> "_Axis | None":
        """Find the axis from a tensor of two samples, and that of these two and a third; None without an axis.

        Raises:
            LayersDifferError: if the shapes differ otherwise.
        """
        if two.shape == three.shape:
            return None
        different = [i for i, (a, b) in enumerate(zip(two.shape, three.shape, strict=False)) if a != b]
        if (
            two.ndim != three.ndim
            or len(different) != 1
            or 3 * two.shape[different[0]] != 2 * three.shape[different[0]]
        ):
            raise LayersDifferError(f"shapes {tuple(two.shape)} and {tuple(three.shape)} for two and three samples")
        number = different[0]
        axis = cls(number, two.shape[number] // 2)
        if axis.positions == 1:
            return axis
        other = cls(number, axis.positions, sample_first=False)
        differences = [a.by_sample(three, 3)[:2].double() - a.by_sample(two, 2).double() for a in (axis, other)]
        first, second = (float(difference.abs().sum()) for difference in differences)
        return other if second < first else axis

    def by_sample(self, x: Tensor, n: int) -> Tensor:
        """Return the tensor with the samples in front, each with its positions in the axis.

        Raises:
            LayersDifferError: if the axis has another length.
        """
        if x.shape[self.number] != n * self.positions:
            raise LayersDifferError(f"shape {tuple(x.shape)} for {n} samples")
        if self.sample_first:
            return x.unflatten(self.number, (n, self.positions)).movedim(self.number, 0)
        return x.unflatten(self.number, (self.positions, n)).movedim(self.number + 1, 0)


def _may_be_repeated(function: Callable[..., Any], output: Tensor) -> bool:
    """Return whether an output that is the same for all samples has an axis that can count them."""
    return function is functional.embedding and output.shape[0] == 1


def _axes_of(two: _Call, three: _Call) -> dict[int | str, _Axis]:
    """Return the axes of a call with two samples, and with three, that count them."""
    found = {key: _Axis.of(x, three.tensors[key]) for key, x in two.tensors.items()}
    return {key: axis for key, axis in found.items() if axis is not None}


@dataclass(frozen=True)
class _Layer:
    """A call that every batch makes.

    Attributes:
        kind: what is called.
        axes: of its arguments and of its output that count samples.
        is_shared: whether it is called once for all samples, as an embedding of positions is, with an output that is
            repeated for each of them.
    """

    kind: tuple[Any, ...]
    axes: dict[int | str, _Axis]
    is_shared: bool = False


def _body(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of torch without its own test for overriding, so that what it calls can be seen."""
    of_module = {**vars(functional), "has_torch_function": lambda _: False}
    body = types.FunctionType(function.__code__, of_module, function.__name__, function.__defaults__)  # type: ignore[attr-defined]
    body.__kwdefaults__ = function.__kwdefaults__  # type: ignore[attr-defined]
    return body


_MATRIX_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
_ADDMM = (torch.addmm, Tensor.addmm)
_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)
_EXPANSIONS = (Tensor.expand, Tensor.expand_as)
_OPENED = {functional.multi_head_attention_forward: _body(functional.multi_head_attention_forward)}
_UNCHANGED = 1e-3  # change of a sample's outputs, relative to that of another's, that is rounding
_LOOPED = 4  # backward passes that are done one after another

_TRANSPOSED = "conv_transpose1d conv_transpose2d conv_transpose3d"
_NORMALIZATIONS = "batch_norm group_norm instance_norm layer_norm rms_norm"
_SEEN = {
    *_MATRIX_PRODUCTS,
    *_ADDMM,
    *_CONVOLUTIONS,
    *_EXPANSIONS,
    *(
        getattr(module, name)
        for module, names in {
            functional: f"linear bilinear embedding {_TRANSPOSED} {_NORMALIZATIONS}",
            torch: f"add sub rsub mul div {_NORMALIZATIONS}",
            Tensor: "add sub mul div __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__",
        }.items()
        for name in names.split()
        if hasattr(module, name)  # rms_norm is newer than the others
    ),
}
"""Functions whose calls give rows: of each sample, their outputs depend on its inputs alone."""


@dataclass(frozen=True)
class _LinearMap:
    """Arguments of a linear map; transposed: of weights (i, o)."""

    input: tuple[int | str, ...]
    weight: tuple[int | str, ...]
    bias: tuple[int | str, ...] = ()
    transposed: bool = False


_LINEAR_MAPS: dict[Callable[..., Any], _LinearMap] = {
    **dict.fromkeys((functional.linear, *_CONVOLUTIONS), _LinearMap((0, "input"), (1, "weight"), (2, "bias"))),
    **dict.fromkeys(_MATRIX_PRODUCTS, _LinearMap((0, "input"), (1, "other", "mat2"), transposed=True)),
    **dict.fromkeys(_ADDMM, _LinearMap((1, "mat1"), (2, "mat2"), (0, "input"), transposed=True)),
}


class _Recorder(TorchFunctionMode):
    """Note every call with a selected parameter, and the parameters that other functions take.

    Args:
        parameters: the selected parameters, as the model takes them.
        shared: numbers of the calls whose output is repeated for each sample.
        repeated: map from such an output to its copies.
    """

    def __init__(self, parameters: dict[str, Tensor], shared: frozenset[int], repeated: Callable[[Tensor], Tensor]):
        super().__init__()
        self._shared, self._repeated = shared, repeated
        self._names = {id(p): name for name, p in parameters.items()}
        self.calls: list[_Call] = []
        self.unseen: set[str] = set()
        self._versions: list[tuple[Tensor, int]] = []

    def check_inputs(self) -> None:
        """Check that what the calls were given is still there.

        Raises:
            LayersDifferError: if it was changed in place.
        """
        if any(tensor._version != version for tensor, version in self._versions):
            raise LayersDifferError("an input of a layer is changed in place")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OPENED:
            with self:
                return _OPENED[func](*args, **kwargs)
        arguments: dict[int | str, Any] = dict(enumerate(args))
        arguments.update(kwargs)
        direct = self._named(arguments)
        nested = self._named(dict(enumerate(_nested(arguments.values()))))
        if not direct and not nested:
            return func(*args, **kwargs)
        steps = as_steps(func, args)
        if steps is not None:
            result, maps = steps
            seen = [self._note(functional.linear, dict(enumerate(m.arguments)), m.output, m.edge) for m in maps]
            self.unseen.update({*direct.values(), *nested.values()} - {name for names in seen for name in names})
            return result
        result = func(*args, **kwargs)
        self.unseen.update(nested.values())
        if func in _SEEN and isinstance(result, Tensor) and "out" not in kwargs:
            if direct and len(self.calls) in self._shared:
                if not _may_be_repeated(func, result):
                    raise LayersDifferError("another call where one was shared by all samples")
                result = self._repeated(result)
            edge = torch.autograd.graph.get_gradient_edge(result) if result.requires_grad else None
            self._note(func, arguments, result, edge)
        elif any(isinstance(v, Tensor) for v in (result, *_nested([result]))):
            self.unseen.update(direct.values())
        return result

    def _named(self, values: dict[int | str, Any]) -> dict[int | str, str]:
        """Return the names of the parameters among some values."""
        return {key: self._names[id(v)] for key, v in values.items() if id(v) in self._names}

    def _note(
        self, function: Callable[..., Tensor], arguments: dict[int | str, Any], output: Tensor, edge: Any
    ) -> set[str]:
        """Note a call, and return the names of its parameters; without any, there is nothing to note."""
        names = self._named(arguments)
        if names:
            kept = {key: v.detach() if isinstance(v, Tensor) else v for key, v in arguments.items()}
            self._versions += [(v, v._version) for v in kept.values() if isinstance(v, Tensor)]
            self.calls.append(_Call(function, kept, names, output.detach(), edge))
        return set(names.values())


def _nested(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors in lists and tuples."""
    return [t for v in values if isinstance(v, list | tuple) for t in v if isinstance(t, Tensor)]


def _recorded(
    selection: ParameterSelection,
    parameters: dict[str, Tensor],
    inputs: Inputs,
    shared: frozenset[int] = frozenset(),
    repeated: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, _Recorder]:
    n = n_samples_of(inputs)
    recorder = _Recorder(parameters, shared, repeated or (lambda x: x.expand(n, *x.shape[1:])))
    with recorder:
        outputs = selection.call_with_tensors(parameters, inputs)
    recorder.check_inputs()
    return outputs, recorder


def _belongs_to_one_sample(
    selection: ParameterSelection, parameters: dict[str, Tensor], inputs: Inputs, shared: int, outputs: Tensor
) -> bool:
    """Return whether an output that all samples share, repeated for each, affects its own sample's outputs only.

    Checked on two samples: changing the first copy has to change the outputs of the first sample, and of no other.
    """
    try:
        with torch.no_grad():
            again, _ = _recorded(
                selection, parameters, inputs, frozenset({shared}), lambda x: torch.cat([1.3 * x + 1, x])
            )
        of_other, own = (again - outputs).abs().flatten(1).amax(1)
        return bool(own < _UNCHANGED * of_other)
    # a model that takes the shape of what is not repeated may fail in many ways
    except Exception as error:
        raise_interrupt(error)
        return False


def _samples(x: Tensor, indices: Tensor) -> Tensor:
    return x[indices.to(x.device)]


@dataclass(frozen=True, eq=False)
class Layers:
    """Layers of a network, in the order of their calls, and the parameters whose rows they give.

    Attributes:
        calls: what every batch calls.
        names: parameters of which all uses are seen.
        n_numbers: how many numbers a row takes, for each of them, in the samples that the layers were tested with.
    """

    calls: tuple[_Layer, ...]
    names: frozenset[str]
    n_numbers: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, selection: ParameterSelection, parameters: dict[str, Tensor], inputs: Inputs) -> "Layers":
        """Find the layers of a network from one sample or more.

        Raises:
            LayersDifferError: if the calls are not the same for two samples and for three.
        """
        placed, n = selection.as_placed(parameters), n_samples_of(inputs)
        few = [on_each(inputs, partial(_samples, indices=torch.arange(m) % n)) for m in (2, 3)]
        with torch.no_grad():
            (outputs, two), (_, three) = (_recorded(selection, placed, chosen) for chosen in few)
        if [call.kind for call in two.calls] != [call.kind for call in three.calls]:
            raise LayersDifferError("other calls for two samples than for three")
        found = [_axes_of(a, b) for a, b in zip(two.calls, three.calls, strict=True)]
        once = frozenset(i for i, axes in enumerate(found) if "" not in axes)
        shared = frozenset(
            i
            for i in once
            if not found[i]
            and _may_be_repeated(two.calls[i].function, two.calls[i].output)
            and _belongs_to_one_sample(selection, placed, few[0], i, outputs)
        )
        unseen = two.unseen | three.unseen
        unseen |= {
            name for name, entries in zip(selection.names, selection.entries, strict=True) if entries is not None
        }
        # of what is computed once for all samples, no sample has rows of its own
        unseen |= {name for i in once - shared for name in two.calls[i].names.values()}
        calls = [
            _Layer(call.kind, {"": _Axis(0)} if i in shared else axes, i in shared)
            for i, (call, axes) in enumerate(zip(two.calls, found, strict=True))
        ]
        seen = {name for call in two.calls for name in call.names.values()} - unseen
        return cls(tuple(calls), frozenset(seen))

    def tested(self, rows: dict[str, RowsOfParameter], wrong: Iterable[str]) -> "Layers":
        """Return the layers without the parameters whose rows are wrong, given the rows of all."""
        names = self.names - set(wrong)
        n_numbers = {}
        for name in names:
            part = rows[name]
            sides = part.left.shape[-1] + part.right.shape[-1] if isinstance(part, OuterRows) else part.shape[2]
            n_numbers[name] = sides * (part.positions if isinstance(part, OuterRows) else 1)
        return Layers(self.calls, names, n_numbers)

    def rows(
        self,
        selection: ParameterSelection,
        parameters: dict[str, Tensor],
        inputs: Inputs,
        targets_or_noise: Tensor,
        cotangents: Cotangents,
        names: frozenset[str] | None = None,
    ) -> tuple[dict[str, RowsOfParameter], Tensor]:
        """Compute the rows of each seen parameter, or of those named, and the outputs (n, C), of a batch.

        Raises:
            LayersDifferError: if the batch calls other layers, or changes their inputs in place.
        """
        names = self.names if names is None else self.names & names
        placed = selection.as_placed(parameters)
        leaves = {name: p.detach().requires_grad_(name in names) for name, p in placed.items()}
        with torch.enable_grad():
            shared = frozenset(i for i, layer in enumerate(self.calls) if layer.is_shared)
            outputs, recorder = _recorded(selection, leaves, inputs, shared)
        calls = recorder.calls
        if [call.kind for call in calls] != [layer.kind for layer in self.calls]:
            raise LayersDifferError("other calls than at the samples that the layers were found with")
        n = len(outputs)
        columns = vmap(cotangents)(outputs.detach(), targets_or_noise).movedim(-1, 0)
        used = [i for i, call in enumerate(calls) if call.edge is not None and names & set(call.names.values())]
        edges = [calls[i].edge for i in used]
        gradients = _pulled_back(outputs, edges, columns)
        like = next(iter(parameters.values()))
        found: dict[str, list[RowsOfParameter]] = {name: [] for name in names}
        for i, g in zip(used, gradients, strict=True):
            if g is not None:
                for name, rows in _rows_of_call(calls[i], self.calls[i], g, n, like.dtype).items():
                    if name in found:
                        found[name].append(rows)
        shapes = {name: (n, len(columns), p.numel()) for name, p in parameters.items()}
        return {
            name: _summed(rows) if rows else like.new_zeros(shapes[name]) for name, rows in found.items()
        }, outputs.detach()


def _pulled_back(outputs: Tensor, edges: list[Any], columns: Float[Tensor, "r n C"]) -> list[Tensor | None]:
    """Return the cotangents (r, …) at every edge; None where the outputs do not depend on it."""
    if not edges:
        return []
    if len(columns) > _LOOPED:
        try:
            return list(
                torch.autograd.grad(
                    outputs, edges, columns, is_grads_batched=True, allow_unused=True, retain_graph=True
                )
            )
        # torch raises many types for operations that it cannot transform
        except Exception as error:
            raise_interrupt(error)
    by_column = [torch.autograd.grad(outputs, edges, c, retain_graph=True, allow_unused=True) for c in columns]
    return [None if parts[0] is None else torch.stack(parts) for parts in zip(*by_column, strict=True)]


def _summed(parts: list[RowsOfParameter]) -> RowsOfParameter:
    """Return the rows of a parameter that several calls use."""
    if len(parts) == 1:
        return parts[0]
    outer = [p for p in parts if isinstance(p, OuterRows)]
    if len(outer) == len(parts):
        left, right = (_joined_positions(side) for side in zip(*((p.left, p.right) for p in outer), strict=True))
        return _fewer_numbers(OuterRows(left, right))
    dense = [flat(p) for p in parts]
    return sum(dense[1:], start=dense[0])


def _joined_positions(factors: tuple[Float[Tensor, "n _ _ o"], ...]) -> Float[Tensor, "n _ _ o"]:
    """Return the factors of several calls, for as many rows as the one that has most."""
    r = max(x.shape[1] for x in factors)
    return torch.cat([x.expand(-1, r, -1, -1) for x in factors], dim=2)


def _rows_of_call(call: _Call, layer: _Layer, g: Tensor, n: int, dtype: torch.dtype) -> dict[str, RowsOfParameter]:
    """Compute the rows of a call's parameters, in a precision, from cotangents (r, …) of its output."""
    axes, output = layer.axes, layer.axes[""]
    g = _Axis(output.number + 1, output.positions, output.sample_first).by_sample(g, n)
    if call.function in _EXPANSIONS:
        ((key, name),) = call.names.items()
        shape, g = call.arguments[key].shape, g.to(dtype)
        return {name: torch.stack([x.sum_to_size(shape).flatten() for x in g.flatten(0, 1)]).unflatten(0, g.shape[:2])}
    if layer.is_shared:
        inputs = {k: x.expand(n, *x.shape[1:]) for k, x in call.tensors.items() if k != ""}
    else:
        inputs = {key: axis.by_sample(call.arguments[key], n) for key, axis in axes.items() if key != ""}
    # sums over positions in the precision of the rows
    converted = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    found = _by_formula(call, converted, g.to(dtype))
    return found or {name: rows.to(dtype) for name, rows in _by_differentiation(call, inputs, g).items()}


def _by_formula(call: _Call, inputs: dict[int | str, Tensor], g: Tensor) -> dict[str, RowsOfParameter]:
    """Return the rows of linear maps, convolutions and embeddings; nothing for other functions."""
    if call.function is functional.embedding:
        return _by_tokens(call, inputs, g)
    slots = _LINEAR_MAPS.get(call.function)
    if slots is None:
        return {}
    (x,) = inputs.values() if len(inputs) == 1 else (None,)
    weight, bias = (next((key for key in keys if key in call.names), None) for keys in (slots.weight, slots.bias))
    if x is None or set(call.names) - {weight, bias} or not set(inputs) <= set(slots.input):
        return {}
    if call.function in _CONVOLUTIONS:
        found = _positions_of_convolution(call, x, g)
        if found is None:
            return {}
        a, g, groups = found
    elif g.shape[2:-1] == x.shape[1:-1]:
        a, g, groups = x.flatten(1, -2)[:, None], g.flatten(2, -2), 1
    else:
        return {}
    rows: dict[str, RowsOfParameter] = {}
    if bias is not None:
        rows[call.names[bias]] = g.sum(2)
    if weight is None:
        return rows
    if groups > 1:
        a, g = (t.unflatten(-1, (groups, -1)) for t in (a, g))
        rows[call.names[weight]] = torch.einsum("nrtgo,ntgi->nrgoi", g, a[:, 0]).flatten(2)
        return rows
    rows[call.names[weight]] = _fewer_numbers(OuterRows(a, g) if slots.transposed else OuterRows(g, a))
    return rows


def _by_tokens(call: _Call, inputs: dict[int | str, Tensor], g: Tensor) -> dict[str, RowsOfParameter]:
    """Return the rows of an embedding, a linear map of indicators of tokens; nothing where it is differentiated."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    options = {names[k] if isinstance(k, int) else k: value for k, value in call.arguments.items()}
    found = [x for key, x in inputs.items() if key in (0, "input")]
    if not found or options.get("max_norm") is not None or options.get("scale_grad_by_freq"):
        return {}
    (n, r), d = g.shape[:2], g.shape[-1]
    (name,), tokens, g = call.names.values(), found[0].reshape(n, -1), g.reshape(n, r, -1, d)
    T = tokens.shape[1]
    V = len(options["weight"])
    if (padding := options.get("padding_idx")) is not None:
        # it has no gradient
        g = g.masked_fill((tokens == padding % V)[:, None, :, None], 0)
    if T * V + r * T * d <= r * V * d:
        indicators = g.new_zeros(n, 1, T, V).scatter_(3, tokens[:, None, :, None], 1)
        return {name: OuterRows(indicators, g)}
    places = tokens[:, None, :, None].expand(-1, r, -1, d)
    return {name: g.new_zeros(n, r, V, d).scatter_add_(2, places, g).flatten(2)}


def _fewer_numbers(rows: OuterRows) -> RowsOfParameter:
    """Return the factors, or the rows where these have fewer entries."""
    return rows if rows.n_numbers <= math.prod(rows.shape) else rows.dense()


def _positions_of_convolution(call: _Call, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, int] | None:
    """Return inputs (n, 1, T, i) and cotangents (n, r, T, o) at each position, and the number of groups.

    Three-dimensional convolutions, and paddings given by name, have None.
    """
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given = {names[k] if isinstance(k, int) else k: v for k, v in call.arguments.items()}
    options = {**defaults, **given}
    kernel, d = given["weight"].shape[2:], given["weight"].ndim - 2
    if d == 3 or isinstance(options["padding"], str) or x.ndim != d + 3:
        return None

    def pair(value: Any) -> tuple[int, ...]:
        return (
            tuple(value)
            if isinstance(value, list | tuple) and len(value) == d
            else (tuple(value) * d if isinstance(value, list | tuple) else (value,) * d)
        )

    sizes = [pair(options[key]) for key in ("dilation", "padding", "stride")]
    images = x.flatten(0, 1)
    if d == 1:
        images, kernel = images[:, :, None], (1, *kernel)
        sizes = [(neutral, *size) for neutral, size in zip((1, 0, 1), sizes, strict=True)]
    a = functional.unfold(images, tuple(kernel), *sizes)
    a = a.unflatten(0, x.shape[:2]).mT.flatten(1, 2)
    # (n, r, images, o, …) to (n, r, positions, o)
    g = g.flatten(4).mT.flatten(2, 3)
    return a[:, None], g, options["groups"]


def _by_differentiation(call: _Call, inputs: dict[int | str, Tensor], g: Tensor) -> dict[str, Tensor]:
    """Rows of any function, by its own derivative for each sample."""
    parameters = {name: call.arguments[key] for key, name in call.names.items()}

    def of_one(x: dict[int | str, Tensor], g: Tensor) -> dict[str, Tensor]:
        def applied(p: dict[str, Tensor]) -> Tensor:
            return call({**x, **{key: p[name] for key, name in call.names.items()}})

        pullback = vjp(applied, parameters)[1]

        def pulled(cotangent: Tensor) -> dict[str, Tensor]:
            return pullback(cotangent)[0]

        return vmap(pulled)(g)

    rows = vmap(of_one)(inputs, g)
    return {name: value.flatten(2) if value.ndim > 2 else value[..., None] for name, value in rows.items()}
