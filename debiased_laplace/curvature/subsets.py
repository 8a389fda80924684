"""All weights, the last layer, or a subnetwork: which parameters of a model a posterior is over."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from debiased_laplace.curvature.contexts import evaluating
from debiased_laplace.curvature.parameters import ParameterSelection
from debiased_laplace.data.inputs import Inputs

SubsetOfWeights = Literal["all", "last_layer", "subnetwork"]


@dataclass(frozen=True, eq=False)
class WeightSubset:
    """What the user asked for; the names are those of the public constructor.

    Attributes:
        kind: all weights, the last layer or a subnetwork.
        last_layer_name: of `named_modules`; None: the last module with parameters that a forward pass goes through.
        subnetwork_indices: different positions in the flat vector of the trainable parameters; sorted on the way.

    Warns:
        UserWarning: if the indices had to be sorted.
    """

    kind: SubsetOfWeights
    last_layer_name: str | None = None
    subnetwork_indices: Tensor | None = None

    def __post_init__(self) -> None:
        indices = self.subnetwork_indices
        if not isinstance(indices, Tensor):
            return
        # a copy: the caller may write into the tensor later
        object.__setattr__(self, "subnetwork_indices", indices.detach().clone())
        if indices.ndim == 1 and bool((indices.diff() < 0).any()):
            object.__setattr__(self, "subnetwork_indices", indices.detach().sort().values)
            warnings.warn(
                "subnetwork_indices were sorted: the posterior's parameters are in the order of the flat vector.",
                stacklevel=5,
            )

    def select(self, model: nn.Module) -> ParameterSelection | None:
        """The parameters; None where only a forward pass can tell which they are.

        Raises:
            ValueError: if there is no such layer, or the indices are not different positions in the flat vector.
        """
        everything = ParameterSelection.all_weights(model)
        if self.kind != "last_layer" and self.last_layer_name is not None:
            raise ValueError(f"last_layer_name is of subset_of_weights='last_layer'; got it with {self.kind!r}.")
        if self.kind != "subnetwork" and self.subnetwork_indices is not None:
            raise ValueError(f"subnetwork_indices are of subset_of_weights='subnetwork'; got them with {self.kind!r}.")
        if self.kind == "last_layer":
            return None if self.last_layer_name is None else everything.layer(self.last_layer_name)
        if self.kind == "subnetwork":
            return everything.subnetwork(_checked(self.subnetwork_indices, everything.n_parameters))
        return everything

    def select_by(self, model: nn.Module, inputs: Inputs) -> ParameterSelection:
        """The parameters, with a forward pass where that has to tell.

        Raises:
            ValueError: as `select`, or if the model cannot be evaluated or has no layer to find.
        """
        known = self.select(model)
        if known is not None:
            return known
        everything = ParameterSelection.all_weights(model)
        return everything.layer(last_layer_of(everything, inputs))


def last_layer_of(selection: ParameterSelection, inputs: Inputs) -> str:
    """Name of the last module with trainable parameters of its own that a forward pass goes through.

    A module that holds parameters and other layers too counts only where none of those was called inside it.

    Raises:
        ValueError: if there is none.
    """
    called: list[str] = []

    def note(name: str) -> Any:
        def called_now(module: nn.Module, arguments: Any, output: Any) -> None:  # noqa: ARG001
            if not (called and called[-1].startswith(f"{name}.")):
                called.append(name)

        return called_now

    handles = [
        module.register_forward_hook(note(name))
        for name, module in selection.model.named_modules()
        # a parametrized weight is held by a module inside the layer that it belongs to
        if name
        and ".parametrizations." not in f".{name}"
        and any(p.requires_grad for p in module.parameters(recurse=is_parametrized(module)))
    ]
    try:
        with torch.enable_grad(), evaluating(selection.model):
            leaves = {name: p.requires_grad_() for name, p in selection.unflatten(selection.vector()).items()}
            outputs = selection.evaluated(leaves, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not called and not list(selection.model.children()):
        # the model is itself a layer, whose name among its own modules is empty
        return ""
    if not called:
        raise ValueError(
            "The model's last layer could not be found: no module with trainable parameters of its own was called. "
            "Pass last_layer_name, or take subset_of_weights='all'."
        )
    # an auxiliary head may be called last, and enter nothing
    gradients = torch.autograd.grad(outputs.sum(), list(leaves.values()), allow_unused=True)
    entering = {name for name, g in zip(leaves, gradients, strict=True) if g is not None}
    own = {name: {p for p in entering if p.startswith(f"{name}.")} for name in called}
    return next((name for name in reversed(called) if own[name]), called[-1])


def _checked(indices: Tensor | None, n: int) -> Tensor:
    """Indices as an increasing LongTensor on the CPU."""
    expected = f"subnetwork_indices must be different positions (a 1-D LongTensor) in the {n} trainable parameters"
    if indices is None:
        raise ValueError(f"{expected}; got none.")
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != 1 or len(indices) == 0:
        shown = f"{indices.dtype} of shape {tuple(indices.shape)}" if isinstance(indices, Tensor) else repr(indices)
        raise ValueError(f"{expected}; got {shown}.")
    indices = indices.detach().cpu()
    if int(indices.min()) < 0 or int(indices.max()) >= n:
        raise ValueError(f"{expected}; got {int(indices.min())} to {int(indices.max())}.")
    if bool((indices.diff() == 0).any()):
        raise ValueError(f"{expected}; got some twice: pass indices.unique().")
    return indices
