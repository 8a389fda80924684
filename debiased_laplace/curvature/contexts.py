"""How the user's model is looked at without leaving a trace on it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every submodule's mode is as it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Kernels that can be differentiated in both modes; the user's settings return afterwards.

    Fused attention and the fast path of multi-head attention have no JVP, and cuDNN's recurrent layers no backward
    pass in evaluation mode.
    """
    fast_path, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        torch.backends.cudnn.enabled = cudnn and not recurrent
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # vmap loops over what it has no batching rule for: slower, not wrong
            warnings.filterwarnings("ignore", message="There is a performance drop")
            # torch's own forward-mode rules are scripted at their first use
            warnings.filterwarnings("ignore", message="`torch.jit.script")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.backends.cudnn.enabled = cudnn
