"""Precision of sums over data."""

import torch
from torch import Tensor


def accumulation_dtype(like: Tensor) -> torch.dtype:
    """Return float64, or the tensor's own dtype on Apple GPUs, which have no float64."""
    return like.dtype if like.device.type == "mps" else torch.float64
