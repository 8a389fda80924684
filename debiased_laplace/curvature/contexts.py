"""Contexts in which the user's model is evaluated and differentiated without side effects."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from debiased_laplace.data.randomness import undisturbed_randomness


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode; restore every submodule's mode and attributes afterwards."""
    # attributes too: a tensor that a forward pass stores on its module (attention weights, features) may belong to a
    # transformation, and can then be neither used nor copied
    attributes = {module: dict(module.__dict__) for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, before in attributes.items():
            for name in module.__dict__.keys() - before.keys():
                del module.__dict__[name]
            module.__dict__.update(before)


@contextmanager
def differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Select kernels that can be differentiated in both modes; restore the user's settings afterwards."""
    # fused attention and the fast path of multi-head attention have no JVP, and cuDNN's recurrent layers no backward
    # pass in evaluation mode
    fast_path, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        torch.backends.cudnn.enabled = cudnn and not recurrent
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # vmap loops over operations without a batching rule: slower, but correct
            warnings.filterwarnings("ignore", message="There is a performance drop")
            # torch scripts its own forward-mode rules at their first use
            warnings.filterwarnings("ignore", message="`torch.jit.script")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.backends.cudnn.enabled = cudnn


@contextmanager
def at_weights(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Make the model deterministic and differentiable, whatever the caller's modes; restore all of it afterwards."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluating(model),
        differentiable_kernels(model),
        undisturbed_randomness(seed),
    ):
        yield
