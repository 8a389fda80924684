"""Contexts in which the user's model is evaluated and differentiated without side effects."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from debiased_laplace.checks import integer, network
from debiased_laplace.curvature.as_found import put_back, put_back_contents
from debiased_laplace.data.randomness import undisturbed_randomness


@contextmanager
def evaluating(model: nn.Module) -> Iterator[set[str]]:
    """Set evaluation mode; restore every submodule's mode, attributes and buffers afterwards.

    Yields:
        Names of the buffers that evaluation wrote to; empty until the end.

    Raises:
        ValueError: if the samples of a batch depend on each other also in evaluation mode.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"{type(module).__name__} {name!r} has no running statistics and takes those of the batch, so that the "
                "samples of a batch depend on each other; expected track_running_stats=True."
            )
    # attributes too: a tensor that a forward pass stores on its module (attention weights, features) may belong to a
    # transformation, and can then be neither used nor copied
    attributes = {module: dict(module.__dict__) for module in model.modules()}
    buffers = _Buffers(getattr(model, "_orig_mod", model))
    written: set[str] = set()
    try:
        model.eval()
        yield written
    finally:
        for module, before in attributes.items():
            for name in module.__dict__.keys() - before.keys():
                del module.__dict__[name]
            module.__dict__.update(before)
        written.update(buffers.put_back())


class _Buffers:
    """Buffers of a model, to be restored where they were replaced or written to."""

    def __init__(self, model: nn.Module):
        # a forward pass may count its calls, or keep what it has computed
        self._modules = [(name, m, dict(m._buffers)) for name, m in model.named_modules() if m._buffers]
        buffers = {id(b): b for _, _, kept in self._modules for b in kept.values() if b is not None}
        self._contents = {key: b.detach().clone() for key, b in buffers.items()}

    def put_back(self) -> Iterator[str]:
        """Restore them; yield the names of those that had other contents."""
        for path, module, kept in self._modules:
            replaced = {name for name, b in module._buffers.items() if b is not kept.get(name)}
            put_back(module._buffers, kept)
            for name, b in kept.items():
                changed = b is not None and put_back_contents(b, self._contents[id(b)])
                if changed or name in replaced:
                    yield f"{path}.{name}" if path else name


@contextmanager
def keeping_buffers(models: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the buffers of models afterwards, such as running statistics."""
    kept = [_Buffers(model) for model in models]
    try:
        yield
    finally:
        for buffers in kept:
            list(buffers.put_back())


class DifferentiableFunctions(TorchFunctionMode):
    """Calls of torch's functions with the same derivatives in forward mode and in backward mode.

    Embeddings: torch's backward pass gives the padding's row no gradient, its forward mode a tangent; here that row is
    a constant. Division by frequencies in the batch is of steps of an optimizer, and sparse gradients cannot be
    flattened: both are turned off. Weight normalization: torch's second derivative is wrong. Autocast, which
    transformations mix up the dtypes of, is turned off for each call, also where the model turns it on.
    """

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch's."""
        kwargs = kwargs or {}
        if torch.is_autocast_enabled(self.device_type):
            with torch.autocast(self.device_type, enabled=False):
                return self._called(func, args, kwargs)
        return self._called(func, args, kwargs)

    def _called(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch._weight_norm and len(args) == 3:
            v, g, dim = args
            return v * (g / torch.norm_except_dim(v, 2, dim))
        if func not in (functional.embedding, functional.embedding_bag):
            return func(*args, **kwargs)
        # torch passes all but the first two by name
        found = func(*args, **{**kwargs, "scale_grad_by_freq": False, "sparse": False})
        row = kwargs.get("padding_idx")
        if func is functional.embedding_bag or row is None:
            return found
        indices, weight = args
        return torch.where((indices == row % len(weight))[..., None], found.detach(), found)


@contextmanager
def full_precision() -> Iterator[None]:
    """Leave the caller's autocast, which would round sums to a few digits."""
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextmanager
def differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Select functions and kernels that can be differentiated in both modes; restore the user's settings afterwards."""
    # fused attention and the fast path of multi-head attention have no JVP, and cuDNN's recurrent layers no backward
    # pass in evaluation mode
    fast_path, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    device_type = next((p.device.type for p in model.parameters()), "cpu")
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        torch.backends.cudnn.enabled = cudnn and not recurrent
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # vmap loops over operations without a batching rule: slower, but correct
            warnings.filterwarnings("ignore", message="There is a performance drop")
            # torch scripts its own forward-mode rules at their first use
            warnings.filterwarnings("ignore", message="`torch.jit.script")
            with full_precision(), DifferentiableFunctions(device_type):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.backends.cudnn.enabled = cudnn


@contextmanager
def at_weights(model: nn.Module, seed: int = 0) -> Iterator[set[str]]:
    """Make the model deterministic and differentiable, whatever the caller's modes; restore all of it afterwards.

    Yields:
        Names of the buffers that evaluation wrote to; empty until the end.

    Raises:
        ValueError: if the model is no module, its samples depend on each other, or the seed is no integer.
    """
    network(model)
    seed = integer(seed, "seed")
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluating(model) as written,
        differentiable_kernels(model),
        undisturbed_randomness(seed),
    ):
        yield written
