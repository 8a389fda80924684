"""Inputs of a model: a tensor, or a mapping of tensors as in Hugging Face models."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = Tensor | dict[str, Tensor]
"""Inputs of samples; the first dimension of every tensor counts samples."""


WEIGHTS = "sample_weights"
"""Key of the samples' weights in a mapping, and their name in messages."""


@dataclass(frozen=True)
class MappingKeys:
    """Keys of the inputs and targets in a mapping, named as in the public constructor.

    Attributes:
        dict_key_x: key of the tensor whose length is the number of samples.
        dict_key_y: key of the targets.
    """

    dict_key_x: str = "input_ids"
    dict_key_y: str = "labels"

    def inputs(self, loaded: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the inputs of a mapping, that of `dict_key_x` first: all but the targets and the samples' weights.

        Raises:
            ValueError: if an entry is not a tensor, or the entry `dict_key_x` is missing.
        """
        wrong = {key: type(value).__name__ for key, value in loaded.items() if not isinstance(value, Tensor)}
        if wrong:
            raise ValueError(f"Expected a mapping of tensors; got {wrong}.")
        if self.dict_key_x not in loaded:
            raise ValueError(
                f"Expected the inputs of a mapping under dict_key_x={self.dict_key_x!r}; got keys {sorted(loaded)}."
            )
        ordered = {self.dict_key_x: loaded[self.dict_key_x], **loaded}
        return {key: value for key, value in ordered.items() if key not in (self.dict_key_y, WEIGHTS)}


DEFAULT_KEYS = MappingKeys()


def on_each(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Apply a function to every tensor."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    return {key: function(value) for key, value in inputs.items()}


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    """Return the tensors by name; a single tensor is named "inputs"."""
    return {"inputs": inputs} if isinstance(inputs, Tensor) else inputs


def n_samples_of(inputs: Inputs) -> int:
    """Return the number of samples, which `Batch` checks to be the same for all tensors."""
    return len(next(iter(tensors_of(inputs).values())))


def shape_of(inputs: Inputs) -> object:
    """Return the shape, or the shapes by key in sorted order."""
    return tuple(inputs.shape) if isinstance(inputs, Tensor) else {k: tuple(v.shape) for k, v in sorted(inputs.items())}


def dtype_of(inputs: Inputs) -> object:
    """Return the dtype, or the dtypes by key."""
    return inputs.dtype if isinstance(inputs, Tensor) else {k: v.dtype for k, v in inputs.items()}


def first(inputs: Inputs, n: int) -> Inputs:
    """Return the first n samples."""
    return on_each(inputs, lambda t: t[:n])


def split(inputs: Inputs, size: int) -> Iterator[Inputs]:
    """Yield the inputs in parts of at most `size` samples."""
    for start in range(0, n_samples_of(inputs), size):
        yield on_each(inputs, lambda t, start=start: t[start : start + size])  # type: ignore[misc]


def one_by_one(inputs: Inputs) -> Iterator[Inputs]:
    """Yield single samples without the first dimension."""
    for i in range(n_samples_of(inputs)):
        yield on_each(inputs, lambda t, i=i: t[i])  # type: ignore[misc]


def as_one(inputs: Inputs) -> Inputs:
    """Add the first dimension to a single sample."""
    return on_each(inputs, lambda t: t[None])


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """Return the inputs on a device."""
    return on_each(inputs, lambda t: t.to(device))
