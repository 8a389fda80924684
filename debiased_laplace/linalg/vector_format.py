"""How many vectors of all parameters are held: in which precision, and where."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

VectorDevice = Literal["model", "cpu", "disk"]


@dataclass(frozen=True)
class VectorFormat:
    """Precision and place of vectors that are held.

    Attributes:
        dtype: None: that of computations.
        device: "model", where computations are; "cpu"; or "disk", in a temporary file that is mapped into memory and
            goes with the tensor.
    """

    dtype: torch.dtype | None = None
    device: VectorDevice = "model"

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """Return a tensor to be written, for vectors that are computed like another tensor."""
        dtype = self.dtype or like.dtype
        n = torch.Size(shape).numel()
        if self.device == "model" or n == 0:
            return like.new_empty(shape, dtype=dtype)
        if self.device == "cpu":
            return torch.empty(shape, dtype=dtype)
        # a file whose name is gone lives as long as its mapping; systems that refuse to remove it keep it
        with tempfile.TemporaryDirectory(prefix="debiased_laplace_", ignore_cleanup_errors=True) as folder:
            name = str(Path(folder) / "vectors")
            return torch.from_file(name, shared=True, size=n, dtype=dtype).reshape(shape)

    def copied(self, vectors: Tensor, like: Tensor) -> Tensor:
        """Return a copy of vectors in this format, for computations like another tensor."""
        if self.device == "model":
            # with the same strides, so that products have the same rounding
            return vectors.to(like.device, self.dtype or like.dtype, copy=True)
        return self.empty(like, *vectors.shape).copy_(vectors)

    def stored(self, vectors: Tensor) -> Tensor:
        """Return vectors in this format; themselves if they are."""
        if self.device == "model":
            return vectors if self.dtype is None else vectors.to(self.dtype)
        return self.empty(vectors, *vectors.shape).copy_(vectors)


def is_on_disk(vectors: Tensor) -> bool:
    """Return whether a tensor is mapped from a file."""
    return vectors.untyped_storage().filename is not None


AS_COMPUTED = VectorFormat()
