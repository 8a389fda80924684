"""Subsets of a model's weights: all, the last layer, or a subnetwork."""

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
    """The subset as given to the constructor, with the same names.

    Attributes:
        kind: all weights, the last layer or a subnetwork.
        last_layer_name: as in `named_modules`; None: the last module with parameters that a forward pass calls.
        subnetwork_indices: distinct positions in the flat vector of the trainable parameters; sorted on creation.

    Warns:
        UserWarning: if the indices were not sorted.
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
        """Select the parameters; return None if the last layer must be found by a forward pass.

        Raises:
            ValueError: if an option belongs to another subset, there is no such layer, or the indices are not distinct
                positions in the flat vector.
        """
        everything = ParameterSelection.all_weights(model)
        if self.kind != "last_layer" and self.last_layer_name is not None:
            raise ValueError(f"last_layer_name requires subset_of_weights='last_layer'; got it with {self.kind!r}.")
        if self.kind != "subnetwork" and self.subnetwork_indices is not None:
            raise ValueError(f"subnetwork_indices require subset_of_weights='subnetwork'; got them with {self.kind!r}.")
        if self.kind == "last_layer":
            return None if self.last_layer_name is None else everything.layer(self.last_layer_name)
        if self.kind == "subnetwork":
            return everything.subnetwork(_checked(self.subnetwork_indices, everything.n_parameters))
        return everything

    def select_by(self, model: nn.Module, inputs: Inputs) -> ParameterSelection:
        """Select the parameters, with a forward pass if needed.

        Raises:
            ValueError: as `select`, or if the model cannot be evaluated or no last layer is found.
        """
        selection = self.select(model)
        if selection is not None:
            return selection
        everything = ParameterSelection.all_weights(model)
        return everything.layer(last_layer_of(everything, inputs))


def last_layer_of(selection: ParameterSelection, inputs: Inputs) -> str:
    """Return the name of the last module with trainable parameters of its own that a forward pass calls.

    A module with parameters and submodules counts only if none of its submodules was called.

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
        # a parametrized weight belongs to a submodule of its layer
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
        # the model is a single layer, whose name among its own modules is empty
        return ""
    if not called:
        raise ValueError(
            "The model's last layer could not be found: no module with trainable parameters of its own was called. "
            "Pass last_layer_name, or take subset_of_weights='all'."
        )
    # an auxiliary head may be called last without entering the outputs
    gradients = torch.autograd.grad(outputs.sum(), list(leaves.values()), allow_unused=True)
    used = {name for name, g in zip(leaves, gradients, strict=True) if g is not None}
    own = {name: {p for p in used if p.startswith(f"{name}.")} for name in called}
    return next((name for name in reversed(called) if own[name]), called[-1])


def _checked(indices: Tensor | None, n: int) -> Tensor:
    """Return the indices on the CPU, if they are distinct positions among n parameters."""
    expected = f"subnetwork_indices must be distinct positions (a 1-D LongTensor) in the {n} trainable parameters"
    if indices is None:
        raise ValueError(f"{expected}; got none.")
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != 1 or len(indices) == 0:
        shown = f"{indices.dtype} of shape {tuple(indices.shape)}" if isinstance(indices, Tensor) else repr(indices)
        raise ValueError(f"{expected}; got {shown}.")
    indices = indices.detach().cpu()
    if int(indices.min()) < 0 or int(indices.max()) >= n:
        raise ValueError(f"{expected}; got {int(indices.min())} to {int(indices.max())}.")
    if bool((indices.diff() == 0).any()):
        raise ValueError(f"{expected}; got duplicates: pass indices.unique().")
    return indices
