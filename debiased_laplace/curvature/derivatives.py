r"""Derivatives of the network's outputs: rows $S_n^\top J_n$ by VJPs, columns $J_n u$ by JVPs, and products by both.

Neither mode is universal: `vmap` fails for recurrent layers and data-dependent control flow, JVPs are missing for some
fused kernels. `find_capabilities` tests once, on two samples, which modes a model allows; each has a slower fallback.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import jvp, linearize, vjp, vmap

from debiased_laplace.curvature.as_found import raise_interrupt, uninterrupted
from debiased_laplace.curvature.layer_rows import Cotangents, Layers
from debiased_laplace.curvature.linear_layer import LinearLayer
from debiased_laplace.curvature.parameters import ParameterSelection, rounding_of
from debiased_laplace.curvature.roots import OutputRoot
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.inputs import Inputs, as_one, first, n_samples_of, on_each, one_by_one
from debiased_laplace.linalg.row_matrix import RowMatrix, RowsOfParameter, flat

_VECTORS = 2  # random combinations of outputs, and tangents, that modes of differentiation are tested on
_ASSUMED_BYTES = 2**20  # activations of a sample that could not be measured

_LARGE = 4 * 2**20
"""Bytes of a model above which modes are not tested that would only save time: each test holds several vectors."""

_ROUNDED = 10  # rounding errors of a network's weights by which two ways to differentiate it may differ

_GROUP = 128 * 2**20  # bytes of the gradients that the rows of a large network are compared with at a time


def is_large_network(model: nn.Module) -> bool:
    """Return whether few samples and vectors are tested, because each pass or each vector of parameters is large."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) > _LARGE


def identity_cotangents(outputs: Tensor, targets_or_noise: Tensor) -> Tensor:  # noqa: ARG001
    """Return the cotangents of the Jacobian itself."""
    return torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)


def vmapped_rows(
    selection: ParameterSelection,
    parameters: dict[str, Tensor],
    inputs: Inputs,
    targets_or_noise: Tensor,
    cotangents: Cotangents,
) -> tuple[Tensor, Tensor]:
    """Compute rows (n, r, P) and outputs (n, C) of a batch, all samples at once."""
    names = frozenset(selection.names)
    rows, outputs = _vmapped(selection, parameters, names, inputs, targets_or_noise, cotangents)
    return selection.flatten(rows, n_lead=2), outputs


def _vmapped(
    selection: ParameterSelection,
    parameters: dict[str, Tensor],
    names: frozenset[str],
    inputs: Inputs,
    targets_or_noise: Tensor,
    cotangents: Cotangents,
) -> tuple[dict[str, Tensor], Tensor]:
    """Compute the rows of the named parameters, (n, r, …) each, all samples at once."""
    chosen = {name: p for name, p in parameters.items() if name in names}

    def of_one(x: Inputs, aux: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        outputs, pullback = _vjp(lambda p: selection.call({**parameters, **p}, as_one(x))[0], chosen)
        return vmap(lambda cotangent: pullback(cotangent)[0])(cotangents(outputs, aux).mT), outputs

    rows_and_outputs: tuple[dict[str, Tensor], Tensor] = vmap(of_one)(inputs, targets_or_noise)
    return rows_and_outputs


def looped_rows(
    selection: ParameterSelection,
    parameters: dict[str, Tensor],
    inputs: Inputs,
    targets_or_noise: Tensor,
    cotangents: Cotangents,
    *,
    create_graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute rows (n, r, P) and outputs (n, C) without `vmap`, one sample and one cotangent at a time."""
    names = frozenset(selection.names)
    rows, outputs = _looped(
        selection, parameters, names, inputs, targets_or_noise, cotangents, create_graph=create_graph
    )
    vectors = selection.flatten(rows, n_lead=2)
    return (vectors, outputs) if create_graph else (vectors.detach(), outputs.detach())


def _looped(
    selection: ParameterSelection,
    parameters: dict[str, Tensor],
    names: frozenset[str],
    inputs: Inputs,
    targets_or_noise: Tensor,
    cotangents: Cotangents,
    *,
    create_graph: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """Compute the rows of the named parameters, (n, r, …) each, one sample and one cotangent at a time."""
    leaves = {name: p.detach().requires_grad_(name in names) for name, p in parameters.items()}
    chosen = [name for name in leaves if name in names]
    stacked: list[dict[str, Tensor]] = []
    collected = []
    with torch.enable_grad():
        for x, aux in zip(one_by_one(inputs), targets_or_noise, strict=True):
            outputs = selection.call(leaves, as_one(x))[0]
            at = cotangents(outputs if create_graph else outputs.detach(), aux).mT
            if not outputs.requires_grad and not create_graph:
                # the outputs of this sample depend on none of these parameters
                stacked.append({name: leaves[name].new_zeros(len(at), *leaves[name].shape) for name in chosen})
                collected.append(outputs)
                continue
            rows = [
                torch.autograd.grad(
                    outputs,
                    [leaves[name] for name in chosen],
                    cotangent,
                    retain_graph=True,
                    create_graph=create_graph,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for cotangent in at
            ]
            stacked.append({name: torch.stack(g) for name, g in zip(chosen, zip(*rows, strict=True), strict=True)})
            collected.append(outputs)
    return {name: torch.stack([rows[name] for rows in stacked]) for name in chosen}, torch.stack(collected)


def layered_rows(
    selection: ParameterSelection,
    parameters: dict[str, Tensor],
    layers: Layers,
    inputs: Inputs,
    targets_or_noise: Tensor,
    cotangents: Cotangents,
    *,
    vmapped: bool,
    names: tuple[str, ...] | None = None,
) -> tuple[RowMatrix, Tensor]:
    """Compute the rows of every parameter, or of those named, and the outputs (n, C), by layers where these are seen.

    Raises:
        LayersDifferError: if the batch calls other layers than those found.
    """
    names = selection.names if names is None else names
    rows, outputs = layers.rows(selection, parameters, inputs, targets_or_noise, cotangents, frozenset(names))
    others = frozenset(names) - layers.names
    if others:
        of_others = _vmapped if vmapped else _looped
        found, _ = of_others(selection, parameters, others, inputs, targets_or_noise, cotangents)
        rows |= {name: value.detach().reshape(*value.shape[:2], -1) for name, value in found.items()}
    return RowMatrix(tuple(rows[name] for name in names)), outputs


def columns(
    selection: ParameterSelection,
    parameters: dict[str, Tensor],
    inputs: Inputs,
    tangents: Tensor,
    *,
    vmapped: bool,
) -> tuple[Tensor, Tensor]:
    """Compute directional derivatives J u of the outputs, (n, C, k) for tangents (P, k), and the outputs (n, C)."""

    def push(tangent: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return jvp(lambda p: selection.call(p, inputs), (parameters,), (tangent,))[:2]

    stacked = selection.unflatten(tangents.mT)
    if vmapped:
        outputs, pushed = vmap(push, out_dims=(None, -1))(stacked)  # type: ignore[arg-type]
        return pushed, outputs
    singles = [push({name: t[i] for name, t in stacked.items()}) for i in range(tangents.shape[1])]
    return torch.stack([pushed for _, pushed in singles], dim=-1), singles[0][0]


class LinearizedBatch:
    r"""Outputs of a batch with derivatives $J_n u$ along directions and $\sum_n J_n^\top w_n$, for repeated use.

    The network is linearized once if its capabilities allow that, which costs the memory of one forward pass and saves
    that pass at every use.

    Attributes:
        outputs: (n, C), without a graph.
    """

    def __init__(
        self,
        selection: ParameterSelection,
        parameters: dict[str, Tensor],
        inputs: Inputs,
        capabilities: "Capabilities",
    ):
        self.selection, self._parameters, self._inputs = selection, parameters, inputs
        self._vmapped = capabilities.vmapped_columns

        def network(p: dict[str, Tensor]) -> Tensor:
            return selection.call(p, inputs)

        self._push: Callable[[dict[str, Tensor]], Tensor] | None = None
        if capabilities.linearized:
            _, self._push = _linearize(network, parameters)
        # not by torch.func.vjp: checkpoints and functions without setup_context allow backward passes only
        self._leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        with torch.enable_grad():
            self._outputs = network(self._leaves)
        self.outputs = self._outputs.detach()

    def pushed(self, X: Tensor) -> Tensor:
        """Return $J_n x$ as (n, C, k) for X (P, k), by forward mode, which the model must allow."""
        if self._push is None:
            vmapped = self._vmapped and X.shape[1] > 1
            return columns(self.selection, self._parameters, self._inputs, X, vmapped=vmapped)[0]
        if self._vmapped and X.shape[1] > 1:
            pushed: Tensor = torch.no_grad()(vmap(self._push, out_dims=-1))(self.selection.unflatten(X.mT))
            return pushed
        return torch.stack([self._push(self.selection.unflatten(x)) for x in X.unbind(1)], dim=-1)

    def pulled(self, W: Tensor) -> Tensor:
        r"""Return $\sum_n J_n^\top w_n$ (P,) for W (n, C)."""
        gradients = torch.autograd.grad(
            self._outputs, list(self._leaves.values()), W, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return self.selection.flatten(dict(zip(self._leaves, gradients, strict=True)))


class LinearizedLayer:
    """The same as `LinearizedBatch` for the features of a last linear layer."""

    def __init__(self, layer: LinearLayer, features: Tensor, outputs: Tensor):
        self._layer, self._features = layer, features
        self.outputs = outputs

    def pushed(self, X: Tensor) -> Tensor:
        """Return $J_n x$ as (n, C, k) for X (P, k)."""
        return self._layer.pushed(self._features, X)

    def pulled(self, W: Tensor) -> Tensor:
        r"""Return $\sum_n J_n^\top w_n$ (P,) for W (n, C)."""
        return self._layer.pulled(self._features, W)


class BatchProducts:
    r"""The map $x \mapsto \sum_n J_n^\top S_n S_n^\top J_n x$ of one batch, for repeated use."""

    def __init__(
        self, linearized: LinearizedBatch | LinearizedLayer, samples: Batch, targets_or_noise: Tensor, root: OutputRoot
    ):
        self._batch, self._samples = linearized, samples
        self._root, self._targets_or_noise = root, targets_or_noise

    def __call__(self, X: Tensor) -> Tensor:
        """Return the product with each column of X (P, b)."""
        return torch.stack([self._single(x) for x in X.unbind(1)], dim=1)

    def _single(self, x: Tensor) -> Tensor:
        pushed = self._batch.pushed(x[:, None])[..., 0]
        product = self._root.product(self._batch.outputs, self._targets_or_noise, pushed)
        return self._batch.pulled(self._samples.scaled(product))


def activation_bytes(selection: ParameterSelection, parameters: dict[str, Tensor], inputs: Inputs) -> int:
    """Return the bytes of a sample that a graph of the outputs holds, measured on one and two samples of the inputs.

    They are not measured, and assumed, for a model whose own forward pass differentiates by torch.func.
    """
    n = min(2, n_samples_of(inputs))
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}

    def saved(n_samples: int) -> int:
        sizes: dict[tuple[int, int], int] = {}

        def note(t: Tensor) -> Tensor:
            # others have no address
            if t.layout is torch.strided:
                sizes[t.data_ptr(), t.numel()] = t.numel() * t.element_size()
            return t

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            # alive while sizes are noted, so that no memory is noted twice
            outputs = selection.call(leaves, first(inputs, n_samples))
        return sum(sizes.values()) + outputs.numel() * outputs.element_size()

    try:
        # what does not depend on the number of samples, such as weights, cancels
        return max(1, saved(n) - saved(n - 1) if n > 1 else saved(1))
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        return _ASSUMED_BYTES


def _vjp(
    network: Callable[[dict[str, Tensor]], Tensor], parameters: dict[str, Tensor]
) -> tuple[Tensor, Callable[[Tensor], tuple[dict[str, Tensor]]]]:
    """Return the outputs, and the map from cotangents to gradients."""
    outputs, pullback = vjp(network, parameters)[:2]
    return outputs, pullback


def _linearize(
    network: Callable[[dict[str, Tensor]], Tensor], parameters: dict[str, Tensor]
) -> tuple[Tensor, Callable[[dict[str, Tensor]], Tensor]]:
    """Return the outputs, and the map from a tangent to their directional derivative."""
    with warnings.catch_warnings():
        # torch.fx warns about the names that tracing gives to constants
        warnings.filterwarnings("ignore", message="Attempted to insert a get_attr Node")
        stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

        def trace() -> tuple[Tensor, Callable[[dict[str, Tensor]], Tensor]]:
            with torch.cuda.stream(stream):  # type: ignore[arg-type]
                return linearize(network, parameters)

        # an interrupt halfway through torch's modes of tracing would end the process: it waits
        outputs, push = uninterrupted(trace)

    # the trace refers to the model's own parameters, which require gradients
    return outputs, torch.no_grad()(push)


@dataclass(frozen=True)
class Capabilities:
    """Modes of differentiation that work for a model.

    Attributes:
        vmapped_rows: VJPs for all samples of a batch at once.
        columns: JVPs.
        vmapped_columns: JVPs for many tangents at once.
        reasons: modes that failed, with torch's message.
        layers: layers that give rows of all samples at once; None: no layer does.
        linearized: `torch.func.linearize` with repeated use of its result. Tested only before products, because tracing
            takes longer than all other tests together.
        linear_layer: the layer whose features give all derivatives without differentiation, if there is one; other
            modes are then not tested.
        activation_bytes: what a graph of the outputs holds for a sample.
    """

    vmapped_rows: bool
    columns: bool
    vmapped_columns: bool
    reasons: dict[str, str]
    linearized: bool = False
    layers: Layers | None = None
    linear_layer: LinearLayer | None = None
    activation_bytes: int = _ASSUMED_BYTES


def find_capabilities(selection: ParameterSelection, parameters: dict[str, Tensor], inputs: Inputs) -> Capabilities:
    """Test each mode on one or two samples, for which the forward pass is known to work.

    Args:
        selection: the parameters.
        parameters: their values.
        inputs: at least one sample.

    Returns:
        The modes that work and agree with rows computed one at a time; of a large network, those of one sample, a few
        parameters at a time.

    Raises:
        ValueError: if the outputs do not depend on the parameters or cannot be differentiated, or a checkpoint leaves
            gradients out.
    """
    several, inputs = first(inputs, 3), first(inputs, 2)
    n = n_samples_of(inputs)
    unused = torch.zeros(n)
    reasons: dict[str, str] = {}

    def attempt(name: str, compute: Callable[[], bool]) -> bool:
        try:
            if compute():
                return True
            reasons[name] = "disagreed with one sample at a time"
        # torch raises many types for operations that it cannot transform
        except Exception as error:
            raise_interrupt(error)
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        return False

    generator = torch.Generator().manual_seed(0)
    like = next(iter(parameters.values()))
    with torch.no_grad():
        n_outputs = selection.call_noting_buffers(parameters, inputs).shape[-1]
    # a few combinations test as much as all outputs, of which there may be thousands
    is_large, eps = is_large_network(selection.model), rounding_of(selection.model)
    n_vectors = 1 if is_large else _VECTORS
    mixed = torch.randn(n_outputs, min(n_outputs, n_vectors), generator=generator).to(like)

    def cotangents(outputs: Tensor, targets_or_noise: Tensor) -> Tensor:  # noqa: ARG001
        return mixed

    # not the first: there, positions taken for samples may go unnoticed
    tested = slice(n - 1, n) if is_large else slice(0, n)
    samples = on_each(inputs, lambda t: t[tested])

    def gradients() -> Iterator[dict[str, Tensor]]:
        return _gradients(selection, parameters, samples, mixed, _GROUP if is_large else None)

    # not all at once of a large network, and where nothing catches errors
    expected = [] if is_large else list(gradients())
    if selection.last_layer is not None:
        rows = selection.flatten({name: g for group in expected or gradients() for name, g in group.items()}, n_lead=2)
        layer = LinearLayer.of(selection, parameters, samples, mixed, rows)
        if layer is not None:
            able = Capabilities(vmapped_rows=True, columns=True, vmapped_columns=True, reasons={}, linear_layer=layer)
            return replace(able, activation_bytes=activation_bytes(selection, parameters, inputs))

    def tangents(chosen: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tangents of some parameters, (…, n_vectors), the same at every use."""
        for i, (name, shape) in enumerate(zip(selection.names, selection.shapes, strict=True)):
            if name in chosen:
                of_parameter = torch.Generator().manual_seed(i + 1)
                yield name, torch.randn(*shape, n_vectors, generator=of_parameter).to(like)

    pushed, scale = mixed.new_zeros(()), mixed.new_zeros(())
    for group in expected or gradients():
        scale = torch.stack([scale, *(g.abs().max() for g in group.values() if g.numel())]).max()
        for name, tangent in tangents(group):
            pushed = pushed + _flat(group[name]) @ tangent.reshape(group[name][0, 0].numel(), n_vectors)

    def different(rows: dict[str, RowsOfParameter]) -> set[str]:
        """Return the parameters whose rows are not those expected."""
        groups = (group.items() for group in expected or gradients())
        named = ((name, g) for group in groups for name, g in group if name in rows)
        return {name for name, g in named if not _close(flat(rows[name])[tested], _flat(g), eps, scale)}

    def rows_agree(names: frozenset[str]) -> bool:
        rows, _ = _vmapped(selection, parameters, names, inputs, unused, cotangents)
        return not different({name: _flat(g) for name, g in rows.items()})

    layers: list[Layers] = []

    def layers_agree() -> bool:
        found = Layers.of(selection, parameters, several)
        rows, _ = found.rows(selection, parameters, inputs, unused, cotangents)
        wrong = different(rows)
        layers.append(found.tested(rows, wrong))
        return not wrong

    def columns_of_groups_agree() -> bool:
        total = mixed.new_zeros(())
        for names in _groups(parameters, _GROUP):
            own = {name: parameters[name] for name in names}
            tangent = {name: t[..., 0] for name, t in tangents(names)}
            total = total + jvp(lambda p: selection.call({**parameters, **p}, samples), (own,), (tangent,))[1]
        return _close(mixed.T @ total[..., None], pushed, eps)

    def columns_agree(*, vmapped: bool) -> bool:
        X = like.new_empty(n_vectors, selection.n_parameters)
        for part, (_, tangent) in zip(X.split(selection.sizes, dim=1), tangents(selection.names), strict=True):
            part.copy_(tangent.movedim(-1, 0).reshape(part.shape))
        return _close(mixed.T @ columns(selection, parameters, samples, X.mT, vmapped=vmapped)[0], pushed, eps)

    attempt("layers", layers_agree)
    seen = layers[0] if layers and layers[0].names else None
    # of a large network, only the rows that layers do not give
    others = frozenset(selection.names) - (seen.names if seen is not None and is_large else frozenset())
    by_rows = bool(others) and attempt("vmapped rows", lambda: rows_agree(others))
    by_columns = attempt("columns", columns_of_groups_agree if is_large else lambda: columns_agree(vmapped=False))
    many = by_columns and not is_large and attempt("vmapped columns", lambda: columns_agree(vmapped=True))
    held = activation_bytes(selection, parameters, inputs)
    return Capabilities(by_rows, by_columns, many, reasons, layers=seen, activation_bytes=held)


def _groups(parameters: dict[str, Tensor], n_bytes: int | None) -> list[list[str]]:
    """Return the names of the parameters in groups of at most about so many bytes; None: in one."""
    groups: list[list[str]] = []
    size = 0
    for name, p in parameters.items():
        own = p.numel() * p.element_size()
        if not groups or (n_bytes is not None and size + own > n_bytes):
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += own
    return groups


def _gradients(
    selection: ParameterSelection, parameters: dict[str, Tensor], inputs: Inputs, mixed: Tensor, n_bytes: int | None
) -> Iterator[dict[str, Tensor]]:
    """Yield the gradients (n, r, …) of combinations of the outputs, of about so many bytes of parameters at a time.

    Raises:
        ValueError: as `find_capabilities`.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    with _readable_errors(selection), torch.enable_grad():
        outputs = [selection.call(leaves, as_one(x))[0] for x in one_by_one(inputs)]
    for names in _groups(parameters, n_bytes):
        of_group = [leaves[name] for name in names]
        with _readable_errors(selection):
            rows = [
                torch.autograd.grad(f, of_group, c, retain_graph=True, allow_unused=True, materialize_grads=True)
                for f in outputs
                for c in mixed.mT
            ]
        yield {
            name: (torch.stack(parts) if len(parts) > 1 else parts[0][None]).unflatten(0, (len(outputs), -1))
            for name, parts in zip(names, zip(*rows, strict=True), strict=True)
        }


@contextmanager
def _readable_errors(selection: ParameterSelection) -> Iterator[None]:
    """Turn torch's errors of differentiation into `ValueError`, as `find_capabilities` raises them."""
    try:
        with warnings.catch_warnings():
            if selection.last_layer is None:
                # torch warns and leaves the gradients of what is in the checkpoint out
                warnings.filterwarnings("error", message="None of the inputs have requires_grad=True")
            yield
    except UserWarning as error:
        if "None of the inputs have requires_grad=True" not in str(error):
            raise
        raise ValueError(
            "The model calls torch.utils.checkpoint with use_reentrant=True, which leaves out the gradients of what it "
            "calls where only weights need one; expected use_reentrant=False."
        ) from error
    except RuntimeError as error:
        if "does not require grad" in str(error):
            raise ValueError(
                f"The outputs do not depend on the selected parameters ({selection.subset}); expected parameters that "
                "they depend on."
            ) from error
        raise ValueError(f"The model could not be differentiated with respect to its parameters: {error}") from error


def _flat(gradients: Tensor) -> Tensor:
    """Return gradients (n, r, …) as rows (n, r, p)."""
    return gradients.flatten(2) if gradients.ndim > 2 else gradients[..., None]


def allows_linearization(selection: ParameterSelection, parameters: dict[str, Tensor], inputs: Inputs) -> bool:
    """Test whether a network linearized once gives correct products repeatedly; JVPs are known to work."""
    inputs = first(inputs, 2)
    generator = torch.Generator().manual_seed(1)
    tangents = torch.randn(selection.n_parameters, 2, generator=generator).to(selection.vector())
    expected, _ = columns(selection, parameters, inputs, tangents, vmapped=False)
    try:
        _, push = _linearize(lambda p: selection.call(p, inputs), parameters)
        # torch's linearization of in-place layers overwrites its own constants at the first use
        uses = (0, 1, 0)
        eps = rounding_of(selection.model)
        return all(_close(push(selection.unflatten(tangents[:, i])), expected[..., i], eps) for i in uses)
    # torch raises many types for operations that it cannot trace
    except Exception as error:
        raise_interrupt(error)
        return False


def _close(found: Tensor, expected: Tensor, eps: float, scale: Tensor | None = None) -> bool:
    """Return whether tensors are equal up to rounding, relative to a scale.

    Args:
        found: one of them.
        expected: the other.
        eps: rounding error of the network's weights, which may be in a lower precision than the tensors.
        scale: None: the largest expected entry.
    """
    relative = max(1000 * torch.finfo(expected.dtype).eps, _ROUNDED * eps)
    rounding = relative * (expected.abs().max() if scale is None else scale)
    return bool(((found - expected).abs() <= rounding + max(1e-3, relative) * expected.abs()).all())
