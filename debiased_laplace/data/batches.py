"""A batch of inputs and targets: what loaders yield, checked and moved to where the model is."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from debiased_laplace.errors import NotBuiltError


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs and targets of some samples; the first dimension of both counts samples."""

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if self.inputs.ndim == 0 or self.targets.ndim == 0:
            raise ValueError(
                "Inputs and targets need a first dimension that counts samples; got shapes "
                f"{tuple(self.inputs.shape)} and {tuple(self.targets.shape)}."
            )
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"A batch has {len(self.inputs)} inputs but {len(self.targets)} targets.")

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return Batch(self.inputs.to(device), self.targets.to(device))

    def chunks(self, size: int) -> list["Batch"]:
        """The batch in pieces of at most `size` samples."""
        pairs = zip(self.inputs.split(size), self.targets.split(size), strict=True)
        return [Batch(x, y) for x, y in pairs]

    @property
    def n_bytes(self) -> int:
        """Memory of inputs and targets."""
        return sum(t.numel() * t.element_size() for t in (self.inputs, self.targets))

    def check_finite(self) -> None:
        """Refuse NaN and infinity.

        Raises:
            ValueError: if an input or a target is not finite.
        """
        for name, values in (("inputs", self.inputs), ("targets", self.targets)):
            if values.is_floating_point() and not bool(values.isfinite().all()):
                n = (
                    int((~values.isfinite().flatten(1).all(1)).sum())
                    if values.ndim > 1
                    else int((~values.isfinite()).sum())
                )
                raise ValueError(
                    f"Expected finite {name}; {n} of {len(values)} samples of a batch have NaN or infinite entries."
                )


def as_batch(loaded: Any) -> Batch:
    """A loader's item as a batch.

    Args:
        loaded: a pair (inputs, targets) of tensors with the samples along the first dimension.

    Returns:
        The batch, where it was loaded.

    Raises:
        ValueError: if it is anything else.
    """
    if isinstance(loaded, Mapping):
        raise NotBuiltError("Mappings as batches are not available yet; pass a loader of (inputs, targets) tensors.")
    is_pair = isinstance(loaded, tuple | list) and len(loaded) == 2
    if not is_pair or not all(isinstance(part, Tensor) for part in loaded):
        parts = [type(part).__name__ for part in loaded] if isinstance(loaded, tuple | list) else ""
        raise ValueError(
            f"Expected batches of two tensors, (inputs, targets); a batch came as {type(loaded).__name__} {parts}."
        )
    return Batch(*loaded)


def sample_hashes(batch: Batch) -> Int64[Tensor, " n"]:
    """A 64-bit hash of each sample's input and target, by which it is known wherever it turns up."""
    inputs, targets = (t.detach().cpu().contiguous() for t in (batch.inputs, batch.targets))
    # the same label is the same in any integer or floating-point type
    targets = targets.to(torch.float64 if targets.is_floating_point() else torch.int64)
    header = f"{inputs.dtype}{tuple(inputs.shape[1:])}{targets.dtype}{tuple(targets.shape[1:])}"
    hashes = [
        int.from_bytes(
            blake2b(header.encode() + _bytes(x) + _bytes(y), digest_size=8).digest(),
            "little",
            signed=True,
        )
        for x, y in zip(inputs, targets, strict=True)
    ]
    return torch.tensor(hashes, dtype=torch.int64)


def _bytes(t: Tensor) -> bytes:
    return t.reshape(-1).view(torch.uint8).numpy().tobytes()
