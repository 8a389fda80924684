"""The parameters that a posterior is over, and their flattening."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call

from debiased_laplace.curvature.positions import flattened
from debiased_laplace.data.inputs import Inputs, dtype_of, shape_of


@dataclass(frozen=True, eq=False)
class ParameterSelection:
    """The selected parameters of a model, in `named_parameters` order.

    All weights, the last layer and a subnetwork are three values of this type; a subnetwork may select single entries
    of a parameter.

    Attributes:
        model: the user's model, never written to.
        names: names of the parameters with selected entries.
        shapes: shapes of the selected entries: the parameter's own if all are selected, (n,) for n of them.
        entries: flat positions of the selected entries in each parameter; None if all are selected.
        subset: description of the selection for messages.
        last_layer: name of the module, if one layer is selected.
        written: names of buffers that a forward pass writes to, once that is known; it gets copies of them.
        outputs: some of the model's flat outputs; None: all.
    """

    model: nn.Module
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    entries: tuple[Int64[Tensor, " _"] | None, ...]
    subset: str
    last_layer: str | None = None
    written: set[str] = field(default_factory=set)
    outputs: slice | Int64[Tensor, " _"] | None = None

    @classmethod
    def all_weights(cls, model: nn.Module) -> "ParameterSelection":
        """Select all parameters with `requires_grad`.

        Raises:
            ValueError: if the model is no `torch.nn.Module` or is wrapped for parallelism, or there are no such
                parameters, or they differ in device or dtype, or are not in single or double precision.
        """
        if not isinstance(model, nn.Module):
            raise ValueError(f"Expected model as a torch.nn.Module; got {type(model).__name__}.")
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise ValueError(f"Expected the model itself; got it inside {type(model).__name__}: pass model.module.")
        # a compiled model is differentiated through the original one
        model = getattr(model, "_orig_mod", model)
        selected = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not selected:
            raise ValueError("The model has no trainable parameters; expected at least one with requires_grad=True.")
        kinds = {(p.dtype, p.device) for p in selected.values()}
        if len(kinds) > 1:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise ValueError(f"Expected trainable parameters of one dtype on one device; got {found}.")
        (dtype,) = {dtype for dtype, _ in kinds}
        if dtype not in (torch.bfloat16, torch.float32, torch.float64):
            names = ", ".join(list(selected)[:3]) + (", …" if len(selected) > 3 else "")
            raise ValueError(
                f"Expected trainable parameters in torch.float32, float64 or bfloat16; got {dtype} ({names}): fit "
                "model.float(), whose weights are the same, or leave only float32 parameters with requires_grad=True."
            )
        shapes = tuple(p.shape for p in selected.values())
        return cls(model, tuple(selected), shapes, (None,) * len(shapes), "all weights")

    def layer(self, name: str) -> "ParameterSelection":
        """Select those of these parameters that belong to one module.

        Raises:
            ValueError: if there is no module of that name, or it has none of these parameters.
        """
        modules = dict(self.model.named_modules(remove_duplicate=False))
        if name not in modules:
            raise ValueError(f"Expected last_layer_name as one of the modules {list(modules)[1:]}; got {name!r}.")
        own = {id(p) for p in modules[name].parameters()}
        parameters = dict(self.model.named_parameters())
        kept = [i for i, n in enumerate(self.names) if id(parameters[n]) in own]
        if not kept:
            raise ValueError(
                f"Layer {name!r} has no trainable parameters; expected one with requires_grad=True, or another "
                "last_layer_name."
            )
        return replace(
            self,
            names=tuple(self.names[i] for i in kept),
            shapes=tuple(self.shapes[i] for i in kept),
            entries=tuple(self.entries[i] for i in kept),
            subset=f"last layer {name!r}",
            last_layer=name,
        )

    def subnetwork(self, indices: Int64[Tensor, " n"]) -> "ParameterSelection":
        """Select entries of these parameters by their increasing positions in the flat vector."""
        names, shapes, entries = [], [], []
        start = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            selected = indices[(indices >= start) & (indices < start + shape.numel())] - start
            start += shape.numel()
            if len(selected) == 0:
                continue
            whole = len(selected) == shape.numel()
            names.append(name)
            shapes.append(shape if whole else torch.Size([len(selected)]))
            entries.append(None if whole else selected)
        return replace(
            self, names=tuple(names), shapes=tuple(shapes), entries=tuple(entries), subset=f"{len(indices)} entries"
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of selected entries of each parameter."""
        return tuple(shape.numel() for shape in self.shapes)

    @property
    def n_parameters(self) -> int:
        """Total number P of selected entries."""
        return sum(self.sizes)

    @cached_property
    def n_differentiated(self) -> int:
        """Number of entries that a backward pass computes: all those of parameters with selected ones."""
        return sum(self._by_name[name].numel() for name in self.names)

    @cached_property
    def indices(self) -> Int64[Tensor, " P"]:
        """Positions of the selected entries in the flat vector of all trainable parameters."""
        starts, start = {}, 0
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                starts[name] = start
                start += p.numel()
        parts = [
            starts[name] + (torch.arange(size) if entries is None else entries)
            for name, size, entries in zip(self.names, self.sizes, self.entries, strict=True)
        ]
        return torch.cat(parts)

    @property
    def description(self) -> str:
        """Description as one string that equal selections share."""
        parts = []
        for name, shape, entries in zip(self.names, self.shapes, self.entries, strict=True):
            digest = "" if entries is None else "@" + sha256(entries.cpu().numpy().tobytes()).hexdigest()[:16]
            parts.append(f"{name}{tuple(shape)}{digest}")
        return "\n".join(parts)

    def current(self) -> dict[str, Tensor]:
        """Return the model's current values in the working precision; whole parameters of that are not copied."""
        current = dict(self.model.named_parameters())
        chosen = {}
        for name, entries in zip(self.names, self.entries, strict=True):
            p = current[name].detach()
            chosen[name] = (p if entries is None else p.reshape(-1)[entries.to(p.device)]).to(working_dtype(p.dtype))
        return chosen

    def vector(self) -> Float[Tensor, " P"]:
        """Return a flat copy of the model's current values."""
        return torch.cat([p.reshape(-1) for p in self.current().values()])

    def check_finite(self) -> None:
        """Check that all weights are finite.

        Raises:
            ValueError: if some are NaN or infinite; it names the first such parameter.
        """
        for name, p in self.model.named_parameters():
            if not bool(p.isfinite().all()):
                raise ValueError(f"Expected finite weights; parameter {name!r} has NaN or infinity.")

    def unflatten(self, vectors: Float[Tensor, "*batch P"]) -> dict[str, Tensor]:
        """Convert flat vectors to a dictionary of parameters; leading dimensions are kept."""
        parts = vectors.split(self.sizes, dim=-1)
        lead = vectors.shape[:-1]
        return {
            name: part.reshape(lead + shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }

    def flatten(self, parameters: dict[str, Tensor], n_lead: int = 0) -> Tensor:
        """Convert a dictionary of parameters to flat vectors; the first `n_lead` dimensions are kept."""
        # Tensor.flatten fails for a scalar parameter with leading dimensions
        ordered = [parameters[name] for name in self.names]
        return torch.cat([p.reshape(*p.shape[:n_lead], -1) for p in ordered], dim=-1)

    @cached_property
    def _places(self) -> dict[str, str]:
        """Name of the trainable parameter at each of its places in the model, each module once."""
        # functional_call's own handling of ties fails to restore a module that is registered under two names
        own = {id(p): name for name, p in self.model.named_parameters() if p.requires_grad or name in self.names}
        return {
            f"{path}.{local}" if path else local: own[id(p)]
            for path, module in self.model.named_modules()
            for local, p in module._parameters.items()
            if id(p) in own
        }

    def call(self, parameters: dict[str, Tensor], inputs: Inputs, model_kwargs: dict[str, Any] | None = None) -> Tensor:
        """Return the model's flat outputs with these values in place of the selected entries.

        A mapping is passed as `call_with` does. Of Hugging Face outputs and of mappings, the logits are returned.

        Raises:
            ValueError: if the model returns anything but a tensor or an output with logits.
        """
        return self._flat(logits_of(self._returned(parameters, inputs, model_kwargs)))

    def as_placed(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return parameters in the precision that the model holds them in."""
        return {name: p.to(self._by_name[name].dtype) for name, p in parameters.items()}

    def call_with_tensors(self, parameters: dict[str, Tensor], inputs: Inputs) -> Tensor:
        """Return the same as `call`, where the model's functions take these very tensors.

        An embedding's padding is a constant in the derivative of `torch.nn.functional.embedding`, but not in that by
        the tensor.
        """
        return self._flat(logits_of(self._returned(parameters, inputs, None, {})))

    def call_noting_buffers(self, parameters: dict[str, Tensor], inputs: Inputs) -> Tensor:
        """Return the same as `call`, and note the buffers that the model writes to."""
        before = {name: (b, b._version) for name, b in self.model.named_buffers() if not b.is_inference()}
        outputs = self.call(parameters, inputs)
        after = dict(self.model.named_buffers())
        self.written.update(name for name, (b, v) in before.items() if after.get(name) is not b or b._version != v)
        return outputs

    def evaluated(self, parameters: dict[str, Tensor], inputs: Inputs) -> Tensor:
        """Return the same as `call` with all dimensions of the outputs, and with errors of the model as `ValueError`.

        Raises:
            ValueError: if the model cannot be evaluated; it names the shape and dtype of the inputs.
        """
        try:
            returned = self._returned(parameters, inputs, None)
        except Exception as error:
            raise ValueError(
                f"The model could not be evaluated on a batch of inputs of shape {shape_of(inputs)} and "
                f"{dtype_of(inputs)}: {error}"
            ) from error
        return logits_of(returned)

    def _flat(self, outputs: Tensor) -> Tensor:
        outputs = flattened(outputs)
        return outputs if self.outputs is None else outputs[:, self.outputs]

    def _returned(
        self,
        parameters: dict[str, Tensor],
        inputs: Inputs,
        model_kwargs: dict[str, Any] | None,
        padding_rows: dict[str, int] | None = None,
    ) -> object:
        rows = self._padding_rows if padding_rows is None else padding_rows
        placed = {place: self._placed(name, parameters, rows.get(place)) for place, name in self._places.items()}
        # torch's transformations refuse to write to tensors that were made outside of them
        placed |= {name: self.model.get_buffer(name).clone() for name in self.written}

        def call(*arguments: Inputs, **keywords: Any) -> object:
            return functional_call(
                self.model, placed, arguments, {**keywords, **(model_kwargs or {})}, tie_weights=False
            )

        return call_with(self.model, inputs, call)

    @cached_property
    def _padding_rows(self) -> dict[str, int]:
        """Row of the padding in each place that holds an embedding with one."""
        # of an EmbeddingBag no row of the padding enters the outputs
        rows = {
            f"{path}.weight" if path else "weight": module.padding_idx
            for path, module in self.model.named_modules()
            if isinstance(module, nn.Embedding) and module.padding_idx is not None
        }
        return {place: row for place, row in rows.items() if place in self._places}

    def _placed(self, name: str, parameters: dict[str, Tensor], row: int | None) -> Tensor:
        """Return a parameter as a place in the model takes it: of an embedding, the padding's row is a constant."""
        values = self._whole(name, parameters)
        if row is None or name not in parameters:
            return values
        is_padding = torch.arange(len(values), device=values.device)[:, None] == row
        return torch.where(is_padding, self._by_name[name].detach(), values)

    def _whole(self, name: str, parameters: dict[str, Tensor]) -> Tensor:
        """Return a parameter with its selected entries replaced; the others are constants."""
        p = self._by_name[name].detach()
        if name not in parameters:
            return p
        entries, values = self._entries_by_name[name], parameters[name]
        if values.dtype != p.dtype:
            values = values.to(p.dtype)
        if entries is None:
            return values
        return p.reshape(-1).index_put((entries.to(p.device),), values).reshape(p.shape)

    @cached_property
    def _entries_by_name(self) -> dict[str, Tensor | None]:
        return dict(zip(self.names, self.entries, strict=True))

    @cached_property
    def _by_name(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def fingerprint(self, without: Iterable[str] = ()) -> str:
        """Return a hash of all weights and buffers, followed by the names of buffers that do not count."""
        without = sorted(without)
        digest = sha256()
        # a buffer that is not saved with the model still enters its outputs
        tensors = {**self.model.state_dict(), **dict(self.model.named_buffers())}
        for name, value in tensors.items():
            if isinstance(value, Tensor) and name not in without:
                flat = value.detach().cpu().contiguous().reshape(-1)
                digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
                digest.update(flat.view(torch.uint8).numpy().tobytes())
        return "\n".join([digest.hexdigest(), *without])

    def matches(self, fingerprint: str) -> bool:
        """Return whether weights and buffers are those of a fingerprint, except for buffers that do not count."""
        return self.fingerprint(fingerprint.split("\n")[1:]) == fingerprint


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of vectors and matrices of parameters: single, for those in bfloat16."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def rounding_of(model: nn.Module) -> float:
    """Return the rounding error of a network's coarsest weights, relative to a number."""
    return max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())


def logits_of(returned: object) -> Tensor:
    """Return the tensor of outputs in what a model returns, in single precision where it is in half.

    Raises:
        ValueError: if there is none.
    """
    outputs = (
        returned.get("logits", returned) if isinstance(returned, Mapping) else getattr(returned, "logits", returned)
    )
    if isinstance(outputs, tuple | list):
        parts = ", ".join(str(tuple(o.shape)) if isinstance(o, Tensor) else type(o).__name__ for o in outputs)
        raise ValueError(
            "Expected the model to return a tensor, or an output with a tensor of logits; got "
            f"{type(outputs).__name__} of {parts}. Give a model whose forward returns the one element with the outputs."
        )
    if not isinstance(outputs, Tensor):
        keys = f" with keys {sorted(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
        raise ValueError(
            "Expected the model to return a tensor, or an output with a tensor of logits; "
            f"got {type(outputs).__name__}{keys}."
        )
    # what follows is in the dtype of the weights
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs


def call_with(model: nn.Module, inputs: Inputs, call: Callable[..., Any]) -> Any:
    """Call a model, by a function, with inputs in the way that the model takes them.

    Entries of a mapping go in by name where `forward` names a key. Where it does not, the first way that works is
    taken: by name (if it takes any), the mapping as one argument, or its first entry, that of `dict_key_x`, alone.

    Warns:
        UserWarning: once for each model, if entries that `forward` does not name are dropped.
    """
    if isinstance(inputs, Tensor):
        return call(inputs)
    keywords = takes_keywords(model, inputs)
    named, takes_any = _names_of(model)
    if keywords and named & inputs.keys():
        extra = sorted(set() if takes_any else inputs.keys() - named)
        if extra and model not in _WARNED:
            _WARNED.add(model)
            warnings.warn(
                f"{type(model).__name__}.forward takes no {', '.join(extra)}: dropped from the mappings of inputs.",
                stacklevel=2,
            )
        return call(**{key: value for key, value in inputs.items() if key not in extra})
    errors = []
    for attempt in ([lambda: call(**inputs)] if keywords else []) + [
        lambda: call(inputs),
        lambda: call(next(iter(inputs.values()))),
    ]:
        try:
            return attempt()
        # a module in the model may have taken a mapping for a tensor
        except (TypeError, AttributeError) as error:
            errors.append(error)
    raise errors[0]


_WARNED: "WeakSet[nn.Module]" = WeakSet()


def takes_keywords(model: nn.Module, keys: Iterable[str]) -> bool:
    """Return whether a model's `forward` may take the entries of a mapping by name, not the mapping itself.

    It does if it names at least one key, or takes any keywords, and requires no other arguments.
    """
    signature = inspect.signature(model.forward).parameters
    named, takes_any = _names_of(model)
    keys = set(keys)
    if {n for n in named if signature[n].default is inspect.Parameter.empty} - keys:
        return False
    return bool(keys & named) or takes_any


def _names_of(model: nn.Module) -> tuple[set[str], bool]:
    """Return the names of the arguments of a model's `forward`, and whether it takes any others by name."""
    signature, kinds = inspect.signature(model.forward).parameters, inspect.Parameter
    named = {n for n, p in signature.items() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
    return named, any(p.kind is kinds.VAR_KEYWORD for p in signature.values())
