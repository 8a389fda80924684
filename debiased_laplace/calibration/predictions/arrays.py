"""Arrays of any kind as tensors, and where the first bad number is."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Task = Literal["binary", "multiclass", "regression"]


def as_tensor(values: Any, where: str) -> Tensor:
    """Numpy, torch or nested lists of real numbers as a detached tensor on its own device.

    Args:
        values: the numbers.
        where: what they are, for messages.

    Raises:
        ValueError: if they are not an array of real numbers.
    """
    try:
        x = values.detach() if isinstance(values, Tensor) else torch.as_tensor(_array(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{where}: expected an array or tensor of numbers; got {type(values).__name__} ({error})."
        ) from error
    if x.is_complex():
        raise ValueError(f"{where}: expected real numbers; got {x.dtype}.")
    return x.cpu() if x.device.type == "mps" else x  # MPS has no float64


def first_bad(mask: Tensor) -> str:
    """How many entries of a mask are set, and where the first one is."""
    first = mask.nonzero()[0].tolist()
    place = f"row {first[0]}" + (f", column {first[1]}" if len(first) > 1 else "")
    return f"{int(mask.sum())} of {mask.numel()} are not, the first in {place}"


def _array(values: Any) -> np.ndarray:
    """`values` in a layout that torch takes: a copy only of read-only or strided arrays."""
    if isinstance(values, Sequence) and any(isinstance(v, Tensor) for v in values):
        values = [v.detach().cpu().numpy() if isinstance(v, Tensor) else v for v in values]
    return np.require(values, requirements=["C_CONTIGUOUS", "WRITEABLE"])
