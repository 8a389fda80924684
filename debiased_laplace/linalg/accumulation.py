"""The precision in which sums over data are kept."""

import torch
from torch import Tensor


def accumulation_dtype(like: Tensor) -> torch.dtype:
    """Double precision where the tensor's device has it (Apple's GPUs do not), else the tensor's own."""
    return like.dtype if like.device.type == "mps" else torch.float64
