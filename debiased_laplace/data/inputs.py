"""What a model takes for some samples: a tensor, or a mapping of tensors as Hugging Face models take them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = Tensor | dict[str, Tensor]
"""The first dimension of every tensor counts samples."""


@dataclass(frozen=True)
class MappingKeys:
    """Where a mapping holds what; the names are those of the public constructor.

    Attributes:
        dict_key_x: of the tensor whose length is the number of samples.
        dict_key_y: of the targets.
    """

    dict_key_x: str = "input_ids"
    dict_key_y: str = "labels"

    def inputs(self, loaded: Mapping[str, Any]) -> dict[str, Tensor]:
        """The entries of a mapping that the model takes: all but the targets.

        Raises:
            ValueError: if an entry is no tensor, or the input is missing.
        """
        wrong = {key: type(value).__name__ for key, value in loaded.items() if not isinstance(value, Tensor)}
        if wrong:
            raise ValueError(f"Expected a mapping of tensors; got {wrong}.")
        if self.dict_key_x not in loaded:
            raise ValueError(
                f"Expected the inputs of a mapping under dict_key_x={self.dict_key_x!r}; it has {sorted(loaded)}."
            )
        return {key: value for key, value in loaded.items() if key != self.dict_key_y}


DEFAULT_KEYS = MappingKeys()


def on_each(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """The same function of every tensor."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    return {key: function(value) for key, value in inputs.items()}


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    """Every tensor, by a name to call it by."""
    return {"inputs": inputs} if isinstance(inputs, Tensor) else inputs


def n_samples_of(inputs: Inputs) -> int:
    """Number of samples; all tensors have been checked to agree."""
    return len(next(iter(tensors_of(inputs).values())))


def shape_of(inputs: Inputs) -> object:
    """The shape, or every shape by its key, in the order of the keys."""
    return tuple(inputs.shape) if isinstance(inputs, Tensor) else {k: tuple(v.shape) for k, v in sorted(inputs.items())}


def dtype_of(inputs: Inputs) -> object:
    """The dtype, or every dtype by its key: for messages."""
    return inputs.dtype if isinstance(inputs, Tensor) else {k: v.dtype for k, v in inputs.items()}


def first(inputs: Inputs, n: int) -> Inputs:
    """The first n samples."""
    return on_each(inputs, lambda t: t[:n])


def split(inputs: Inputs, size: int) -> Iterator[Inputs]:
    """The samples in pieces of at most `size`."""
    for start in range(0, n_samples_of(inputs), size):
        yield on_each(inputs, lambda t, start=start: t[start : start + size])  # type: ignore[misc]


def one_by_one(inputs: Inputs) -> Iterator[Inputs]:
    """Single samples, each without the dimension that counts them."""
    for i in range(n_samples_of(inputs)):
        yield on_each(inputs, lambda t, i=i: t[i])  # type: ignore[misc]


def as_one(inputs: Inputs) -> Inputs:
    """A single sample as a batch of one."""
    return on_each(inputs, lambda t: t[None])


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """The inputs on a device."""
    return on_each(inputs, lambda t: t.to(device))
