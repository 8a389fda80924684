"""Batches of inputs and targets, and hashes of their samples."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from debiased_laplace.data.inputs import (
    WEIGHTS,
    Inputs,
    MappingKeys,
    dtype_of,
    n_samples_of,
    on_each,
    shape_of,
    tensors_of,
)


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs and targets of samples; the first dimension of every tensor counts samples.

    Attributes:
        inputs: of the model.
        targets: of the likelihood.
        weights: factor of each sample's loss and curvature, (n,); None: 1.
        features: inputs (n, d) of the network's last layer, where they were kept; None elsewhere.

    Raises:
        ValueError: if there is no input, or a tensor has no first dimension or another length.
    """

    inputs: Inputs
    targets: Tensor
    weights: Tensor | None = None
    features: Tensor | None = None

    def __post_init__(self) -> None:
        if not tensors_of(self.inputs):
            raise ValueError("Expected at least one tensor as inputs; got an empty mapping.")
        # pairs: a mapping may have an entry of this name too
        named = [*tensors_of(self.inputs).items(), ("targets", self.targets)]
        if self.weights is not None:
            named.append((WEIGHTS, self.weights))
            if self.weights.ndim != 1:
                raise ValueError(f"Expected {WEIGHTS} of shape (n,); got shape {tuple(self.weights.shape)}.")
        if any(t.ndim == 0 for _, t in named):
            shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in named)
            raise ValueError(f"Inputs and targets need a first dimension that counts samples; got shapes {shapes}.")
        if len({len(t) for _, t in named}) > 1:
            lengths = ", ".join(f"{name} {len(t)}" for name, t in named)
            raise ValueError(
                f"Expected as many targets as inputs; got {n_samples_of(self.inputs)} inputs but "
                f"{len(self.targets)} targets ({lengths})."
            )

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return self.mapped(lambda t: t.to(device))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply a function to every tensor."""
        weights, features = (None if t is None else function(t) for t in (self.weights, self.features))
        return Batch(on_each(self.inputs, function), function(self.targets), weights, features)

    def chunks(self, size: int) -> list["Batch"]:
        """Split the batch into batches of at most `size` samples."""
        return [self.mapped(lambda t, i=i: t[i : i + size]) for i in range(0, len(self), size)]  # type: ignore[misc]

    def at(self, positions: Int64[Tensor, " m"]) -> "Batch":
        """Return the samples at these positions."""
        return self.mapped(lambda t: t[positions.to(t.device)])

    def first(self, n: int) -> "Batch":
        """Return the first n samples."""
        return self.mapped(lambda t: t[:n])

    def weighted(self, weights: Tensor | None) -> "Batch":
        """Return the samples with other weights."""
        return replace(self, weights=weights)

    def scaled(self, values: Tensor, power: float = 1.0) -> Tensor:
        """Multiply values of the samples, (n, …), by a power of their weights."""
        if self.weights is None:
            return values
        factors = self.weights.to(values).pow(power)
        return values * factors.reshape(-1, *(1,) * (values.ndim - 1))

    @property
    def total_weight(self) -> float:
        """Sum of the weights."""
        return len(self) if self.weights is None else float(self.weights.cpu().double().sum())

    def with_mean_weight_one(self) -> "Batch":
        """Return the samples with their weights scaled to a mean of 1."""
        if self.weights is None:
            return self
        if self.total_weight == 0:
            raise ValueError(f"Expected positive {WEIGHTS} of at least one sample; got 0 for all of them.")
        weights = self.weights if self.weights.is_floating_point() else self.weights.to(torch.get_default_dtype())
        return self.weighted(weights * (len(self) / self.total_weight))

    @property
    def n_bytes(self) -> int:
        """Memory of inputs, targets and features in bytes."""
        tensors = [*tensors_of(self.inputs).values(), self.targets]
        tensors += [] if self.features is None else [self.features]
        return sum(t.numel() * t.element_size() for t in tensors)

    def check_finite(self) -> None:
        """Check that inputs and targets are finite, and weights too and not negative.

        Raises:
            ValueError: if an input, a target or a weight is not finite, or a weight is negative.
        """
        if self.weights is not None and not bool(((self.weights >= 0) & self.weights.isfinite()).all()):
            raise ValueError(
                f"Expected finite {WEIGHTS} that are not negative; got {float(self.weights.min()):g} to "
                f"{float(self.weights.max()):g}."
            )
        for name, values in (*tensors_of(self.inputs).items(), ("targets", self.targets)):
            if values.is_floating_point() and not bool(values.isfinite().all()):
                bad = ~values.isfinite()
                n = int((bad.flatten(1).any(1) if values.ndim > 1 else bad).sum())
                raise ValueError(
                    f"Expected finite {name}; {n} of {len(values)} samples of a batch have NaN or infinite entries."
                )


def concatenated(batches: Iterable[Batch]) -> list[Batch]:
    """Join consecutive batches whose samples have the same shape; all of them have weights, or none has."""
    return [joined(list(group)) for _, group in groupby(batches, key=_kind)]


def joined(batches: Sequence[Batch]) -> Batch:
    """Join batches of samples of one shape; all of them have weights, or none has, and likewise of features."""
    inputs: Inputs
    if isinstance(batches[0].inputs, Tensor):
        inputs = torch.cat([batch.inputs for batch in batches if isinstance(batch.inputs, Tensor)])
    else:
        mappings = [batch.inputs for batch in batches if not isinstance(batch.inputs, Tensor)]
        inputs = {key: torch.cat([mapping[key] for mapping in mappings]) for key in mappings[0]}
    weights = [batch.weights for batch in batches if batch.weights is not None]
    features = [batch.features for batch in batches if batch.features is not None]
    targets = torch.cat([batch.targets for batch in batches])
    return Batch(inputs, targets, torch.cat(weights) if weights else None, torch.cat(features) if features else None)


def of_one_kind(one: Batch, other: Batch) -> bool:
    """Return whether two batches can be joined."""
    return _kind(one) == _kind(other)


def _kind(batch: Batch) -> str:
    """Return what has to be the same for batches to be joined."""
    of_one = on_each(batch.inputs, lambda t: t[:0])
    return str(
        (
            shape_of(of_one),
            dtype_of(of_one),
            tuple(batch.targets.shape[1:]),
            batch.weights is None,
            batch.features is None,
        )
    )


def as_batch(loaded: Any, keys: MappingKeys) -> Batch:
    """Convert an item of a loader to a batch.

    Args:
        loaded: (inputs, targets) or (inputs, targets, weights), tensors with the samples along the first dimension, or
            a mapping of tensors as Hugging Face models take them, with weights under "sample_weights"; the inputs of a
            pair may also be such a mapping.
        keys: keys of the inputs and targets in a mapping.

    Returns:
        The batch, on the device of the item.

    Raises:
        ValueError: if `loaded` is anything else.
    """
    if isinstance(loaded, Mapping):
        if not isinstance(loaded.get(keys.dict_key_y), Tensor):
            raise ValueError(
                f"Expected the targets of a mapping as a tensor under dict_key_y={keys.dict_key_y!r}; got keys "
                f"{sorted(loaded)}."
            )
        return Batch(keys.inputs(loaded), loaded[keys.dict_key_y], loaded.get(WEIGHTS))
    if isinstance(loaded, tuple | list) and len(loaded) in (2, 3) and all(isinstance(t, Tensor) for t in loaded[1:]):
        if isinstance(loaded[0], Mapping):
            return Batch(keys.inputs(loaded[0]), *loaded[1:])
        if isinstance(loaded[0], Tensor):
            return Batch(*loaded)
    parts = [type(part).__name__ for part in loaded] if isinstance(loaded, tuple | list) else ""
    raise ValueError(
        f"Expected batches of two tensors, (inputs, targets), of three, (inputs, targets, {WEIGHTS}), or mappings of "
        f"tensors; a batch came as "
        f"{type(loaded).__name__} {parts}."
    )


def as_unweighted_batch(loaded: Any, keys: MappingKeys) -> Batch:
    """Convert an item of a loader of validation or test data to a batch.

    Raises:
        ValueError: if it has weights, or cannot be converted.
    """
    batch = as_batch(loaded, keys)
    if batch.weights is not None:
        raise ValueError(
            f"Validation and test losses are not weighted: expected batches (inputs, targets); got {WEIGHTS} too."
        )
    return batch


def check_inputs(x: Any, keys: MappingKeys) -> Inputs:
    """Return inputs to predict at, if they can be used.

    Args:
        x: a tensor with the samples along the first dimension, or a mapping of tensors.
        keys: of mappings.

    Raises:
        ValueError: if they are neither, empty or not finite, or the tensors of a mapping differ in length.
    """
    if isinstance(x, Mapping):
        x = keys.inputs(x)
    elif not isinstance(x, Tensor):
        raise ValueError(f"Expected inputs as a tensor, or a mapping of tensors; got {type(x).__name__}.")
    for name, values in tensors_of(x).items():
        if values.ndim == 0 or len(values) == 0:
            raise ValueError(f"Expected at least one sample of {name}; got shape {tuple(values.shape)}.")
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise ValueError(f"Expected finite {name}; some are NaN or infinite.")
    if len({len(values) for values in tensors_of(x).values()}) > 1:
        raise ValueError(f"Expected as many samples in every tensor of a mapping; got shapes {shape_of(x)}.")
    return x


def sample_hashes(batch: Batch) -> Int64[Tensor, " n"]:
    """Return a 64-bit hash of the input and target of each sample."""
    # a label has the same hash in any integer type, and in any floating-point type
    targets = batch.targets.to(torch.float64 if batch.targets.is_floating_point() else torch.int64)
    # and a single number in the shape () or (1,)
    targets = targets[:, None] if targets.ndim == 1 and targets.is_floating_point() else targets
    # sorted: the order of a mapping is not part of the sample; a single tensor has no name
    named = [("", batch.inputs)] if isinstance(batch.inputs, Tensor) else sorted(batch.inputs.items())
    parts = [(name, t.detach().cpu().contiguous()) for name, t in (*named, ("", targets))]
    header = "".join(f"{name}{t.dtype}{tuple(t.shape[1:])}" for name, t in parts).encode()
    hashes = [
        int.from_bytes(
            blake2b(header + b"".join(_bytes(t) for t in sample), digest_size=8).digest(), "little", signed=True
        )
        for sample in zip(*(t for _, t in parts), strict=True)
    ]
    return torch.tensor(hashes, dtype=torch.int64)


def _bytes(t: Tensor) -> bytes:
    return t.reshape(-1).view(torch.uint8).numpy().tobytes()
