"""Leave models and the process as they were found, whatever interrupts, and let one thread at a time touch them.

The contexts of `contexts` restore what they change as they are left. An interrupt (Ctrl-C) may hit inside of that, or
inside of torch's own contexts, such as the exchange of parameters in `functional_call`. At the public functions,
`leaves_as_found` therefore repairs what an exception has left.
"""

import os
import random
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial, wraps
from inspect import getclosurevars, isfunction, ismethod, signature
from types import ModuleType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.utils import _device, _python_dispatch

from debiased_laplace.data.workers import stop_workers

P = ParamSpec("P")
R = TypeVar("R")
Restore = Callable[[], object]

# kernels, warnings, global random numbers and torch's count of nested JVPs belong to the process, not to a thread
_LOCK = threading.RLock()
_ATTEMPTS = 5  # to restore, against interrupts


class _Use(NamedTuple):
    """Modules that a call uses, and the exception that its caller handles, if any."""

    modules: frozenset[int]
    handled: BaseException | None


# by the thread with the lock
_IN_USE: list[_Use] = []


def _unlock_child() -> None:
    """Replace the lock in a forked process, in which the thread that holds it does not run."""
    global _LOCK
    _LOCK = threading.RLock()
    _IN_USE.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_child)


def leaves_as_found(*, waits: bool = False, moves: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a public function, so that no exception or interrupt leaves models or the process changed.

    Its first argument is a model, an object with a `model`, a callable or a mapping of these. Of an object with a
    model, attributes are restored too.

    Args:
        waits: wait if another thread uses the same model; otherwise refuse it. For other models, the thread waits.
        moves: the function changes the weights, which are restored too.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        first = next(iter(signature(function).parameters))

        @wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            subject = args[0] if args else kwargs.get(first)
            models = list(models_of(subject))
            used = _modules_with_tensors(models)
            nested = _LOCK._is_owned()  # type: ignore[attr-defined]
            if not (waits or nested):
                _refuse_in_two_threads(used)
            with _LOCK:
                if nested and any(used <= others for others, _ in _IN_USE):
                    # the function outside of this one restores
                    return function(*args, **kwargs)
                n_used = len(_IN_USE) if nested else 0
                restore = _restorations(models, subject)
                if moves:
                    restore += _of_weights(subject)
                end: list[Restore] = [partial(_IN_USE.__delitem__, slice(n_used, None))]
                if not nested:
                    end.append(stop_workers)
                # everything before the return is inside: an interrupt can hit anywhere
                try:
                    _IN_USE[n_used:] = [_Use(used, sys.exc_info()[1])]
                    result = function(*args, **kwargs)
                    for step in end:
                        step()
                except BaseException as error:
                    interrupt = interrupt_behind(error)
                    _restore(error, [*restore, *end])
                    try:
                        if interrupt is not None and interrupt is not error:
                            raise interrupt from error
                        raise
                    finally:
                        # it refers to this frame: in a cycle it would outlive its handling
                        del interrupt
                return result

        return guarded

    return decorate


def _refuse_in_two_threads(used: frozenset[int]) -> None:
    """Refuse models that another thread uses.

    Raises:
        ValueError: if there is one.
    """
    if any(used & others for others, _ in _IN_USE):
        raise ValueError(
            "Another thread uses this model: expected one thread at a time, because parameters are exchanged and modes "
            "changed while a model is evaluated. Wait for it, or give each thread a copy, made before they start, "
            "copy.deepcopy(model)."
        )


def interrupt_behind(error: BaseException) -> BaseException | None:
    """Return an interrupt that torch's contexts turned into this error as they were left; None if there is none."""
    return next((e for e in _chain(error) if isinstance(e, KeyboardInterrupt | SystemExit)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those during which it was raised, up to what the caller already handled."""
    while error is not None and all(error is not use.handled for use in _IN_USE):
        yield error
        error = error.__context__


def raise_interrupt(error: Exception) -> None:
    """Raise the interrupt behind an error that is about to be taken for a model's fault.

    Raises:
        KeyboardInterrupt: if there is one.
    """
    interrupt = interrupt_behind(error)
    try:
        if interrupt is not None:
            raise interrupt
    finally:
        del interrupt


def uninterrupted(compute: Callable[[], R]) -> R:
    """Compute in another thread than the main one, which interrupts reach; they wait for the result."""
    pool = ThreadPoolExecutor(1)
    try:
        # an interrupt while the thread starts would leave it running
        pool.submit(int).result()
        return pool.submit(compute).result()
    finally:
        _shut_down(pool)


def _shut_down(pool: ThreadPoolExecutor) -> None:
    """Wait for the thread, through further interrupts."""
    interrupted = None
    for _ in range(_ATTEMPTS):
        try:
            pool.shutdown()
            break
        except KeyboardInterrupt as another:
            interrupted = another
    if interrupted is not None:
        raise interrupted


def models_of(subject: Any) -> Iterator[nn.Module]:
    """Yield the models that an argument holds: itself, its `model`, those of a mapping's values, or of a callable."""
    if isinstance(subject, nn.Module):
        yield subject
    elif isinstance(subject, Mapping):
        for value in subject.values():
            yield from models_of(value)
    elif isinstance(getattr(subject, "model", None), nn.Module):
        yield subject.model
    elif callable(subject):
        yield from modules_reached(subject)


def modules_reached(function: Any, skip: type | None = None, depth: int = 3) -> Iterator[nn.Module]:
    """Yield the modules that a callable refers to: in its closure, globals, arguments, defaults and attributes.

    Args:
        function: the callable.
        skip: kind of objects whose modules do not count.
        depth: callables and attributes within each other that are followed.
    """
    if isinstance(function, nn.Module):
        yield function
        return
    if depth == 0 or isinstance(function, type) or (skip is not None and isinstance(function, skip)):
        return
    held: list[Any] = []
    if isinstance(function, partial):
        held = [function.func, *function.args, *function.keywords.values()]
    elif ismethod(function):
        held = [function.__self__, function.__func__]
    elif isfunction(function):
        variables = getclosurevars(function)
        held = [*variables.nonlocals.values(), *variables.globals.values(), *(function.__defaults__ or ())]
    elif hasattr(function, "__dict__"):
        held = list(vars(function).values())
    # ensembles are lists or dictionaries of networks
    for value in (part for container in held for part in _members(container)):
        if isinstance(value, nn.Module | partial) or isfunction(value) or ismethod(value) or _has_module(value):
            yield from modules_reached(value, skip, depth - 1)


def _members(value: Any) -> Iterable[Any]:
    """Return the members of a container, or the value itself."""
    if isinstance(value, list | tuple | set | frozenset):
        return value
    return list(value.values()) if isinstance(value, dict) else [value]


def _has_module(value: Any) -> bool:
    return not isinstance(value, ModuleType) and any(
        isinstance(part, nn.Module)
        for attribute in getattr(value, "__dict__", {}).values()
        for part in _members(attribute)
    )


def _modules_with_tensors(models: Iterable[nn.Module]) -> frozenset[int]:
    # an activation function may be one object in many models
    return frozenset(id(m) for model in models for m in model.modules() if m._parameters or m._buffers)


def _restore(error: BaseException, restore: Iterable[Restore]) -> None:
    """Restore everything after an error; again, if that is interrupted."""
    interrupted = None
    for _ in range(_ATTEMPTS):
        try:
            if interrupt_behind(error) is not None:
                _release_frames(error)
            for step in restore:
                # one that fails must not keep the others from restoring
                with suppress(Exception):
                    step()
            break
        except KeyboardInterrupt as another:
            interrupted = another
    if interrupted is not None:
        raise interrupted


def _release_frames(error: BaseException) -> None:
    """Release what the frames of an interrupt hold: contexts that were not left restore late, in any order."""
    # the first error and the innermost frame first, as contexts are left
    for raised in reversed(list(_chain(error))):
        for frame, _ in reversed(list(traceback.walk_tb(raised.__traceback__))):
            # those that still run keep what they hold
            with suppress(RuntimeError):
                frame.clear()


def _restorations(models: Iterable[nn.Module], subject: Any) -> list[Restore]:
    """Return functions that restore the process, the models and the attributes of their owner, in this order."""
    steps = [*_of_transformations(), *_of_process()]
    for model in models:
        steps += _of_model(model)
    if not isinstance(subject, nn.Module | Mapping) and hasattr(subject, "model"):
        steps.append(partial(put_back, subject.__dict__, dict(subject.__dict__)))
    return steps


def _of_weights(subject: Any) -> Iterator[Restore]:
    """Yield functions that restore the contents of an optimizer's weights, and its state."""
    yield from (partial(put_back_contents, p, p.detach().clone()) for p in subject.model.parameters())
    yield from (partial(put_back, state, dict(state)) for state in subject.state.values())


def put_back(entries: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Restore a dictionary, if it has changed."""
    same = len(entries) == len(before) and all(
        a is b and x is y for (a, x), (b, y) in zip(entries.items(), before.items(), strict=True)
    )
    if not same:
        entries.clear()
        entries.update(before)


def _of_model(model: nn.Module) -> Iterator[Restore]:
    """Yield functions that restore a model's dictionaries, hooks, modes, gradients and tensors."""
    for module in model.modules():
        own = module.__dict__
        for name, entries in own.items():
            if isinstance(entries, dict) and (name in ("_parameters", "_buffers", "_modules") or "hooks" in name):
                yield partial(put_back, entries, dict(entries))
        yield partial(put_back, own, dict(own))
    for p in model.parameters():
        yield partial(_put_back_parameter, p, p.data, p.grad, p.requires_grad)
    yield from (partial(put_back_contents, b, b.detach().clone()) for b in model.buffers())


def _put_back_parameter(p: Tensor, data: Tensor, grad: Tensor | None, requires_grad: bool) -> None:
    # laplace-torch writes draws into the parameters, by other memory
    if p.data_ptr() != data.data_ptr():
        p.data = data
    if p.grad is not grad:
        p.grad = grad
    if p.requires_grad != requires_grad:
        p.requires_grad_(requires_grad)


def put_back_contents(t: Tensor, before: Tensor) -> bool:
    """Restore the contents of a tensor; return whether they had changed."""
    # not by its version: batch normalization writes running statistics without raising it
    if torch.equal(t, before):
        return False
    with torch.no_grad():
        t.detach().copy_(before)
    return True


def _of_transformations() -> Iterator[Restore]:
    """Yield functions that leave functorch's levels and torch's modes which were entered since."""
    functorch, autograd = torch._C._functorch, torch._C._autograd
    yield partial(functorch.pop_dynamic_layer_stack_and_undo_to_depth, functorch.get_dynamic_layer_stack_depth())
    yield partial(_leave_modes, torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack())
    yield partial(vars(eager_transforms).update, JVP_NESTING=eager_transforms.JVP_NESTING)
    yield partial(_leave_dual_levels, forward_ad._current_level)
    yield partial(torch._C._set_fwd_grad_enabled, torch._C._is_fwd_grad_enabled())
    yield partial(torch._C._set_grad_enabled, torch.is_grad_enabled())
    message = autograd._saved_tensors_hooks_get_disabled_error_message()
    if message is None:
        yield autograd._saved_tensors_hooks_enable
    else:
        yield partial(autograd._saved_tensors_hooks_disable, message)
    # set and patched by torch.fx while torch.func.linearize traces
    of_thread = getattr(_symbolic_trace, "_is_fx_tracing_tls", None)
    if of_thread is not None:
        yield partial(put_back, vars(of_thread), dict(vars(of_thread)))
    elif hasattr(_symbolic_trace, "_is_fx_tracing_flag"):
        yield partial(setattr, _symbolic_trace, "_is_fx_tracing_flag", _symbolic_trace._is_fx_tracing_flag)
    yield partial(_put_back_methods, {name: nn.Module.__dict__[name] for name in ("__call__", "__getattr__")})


def _leave_modes(n_dispatch: int, n_function: int) -> None:
    while torch._C._len_torch_dispatch_stack() > n_dispatch:
        last = torch._C._get_dispatch_stack_at(torch._C._len_torch_dispatch_stack() - 1)
        _python_dispatch._pop_mode(getattr(last, "_mode_key", None))
    while torch._C._len_torch_function_stack() > n_function:
        torch._C._pop_torch_function_stack()


def _leave_dual_levels(level: int) -> None:
    # torch's own count may have missed the last level; today it allows one
    for entered in range(level + 2, level, -1):
        with suppress(RuntimeError):
            torch._C._exit_dual_level(level=entered)
    forward_ad._current_level = level


def _put_back_methods(methods: dict[str, Any]) -> None:
    for name, method in methods.items():
        if nn.Module.__dict__[name] is not method:
            setattr(nn.Module, name, method)


def _of_process() -> Iterator[Restore]:
    """Yield functions that restore the switches of the process: kernels, warnings, defaults and random numbers."""
    cuda, mha = torch.backends.cuda, torch.backends.mha
    yield partial(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
    yield partial(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
    yield partial(cuda.enable_flash_sdp, cuda.flash_sdp_enabled())
    yield partial(cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled())
    yield partial(cuda.enable_math_sdp, cuda.math_sdp_enabled())
    yield partial(cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled())
    yield partial(torch.set_default_dtype, torch.get_default_dtype())
    yield partial(setattr, _device, "CURRENT_DEVICE", _device.CURRENT_DEVICE)
    yield partial(_put_back_warnings, warnings.filters, list(warnings.filters), _shown_by())
    yield partial(random.setstate, random.getstate())
    yield partial(np.random.set_state, np.random.get_state())  # noqa: NPY002
    yield partial(torch.set_rng_state, torch.get_rng_state())
    if torch.cuda.is_initialized():
        yield partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())


def _shown_by() -> dict[str, Any]:
    return {name: getattr(warnings, name) for name in ("showwarning", "_showwarnmsg_impl") if hasattr(warnings, name)}


def _put_back_warnings(filters: Any, before: list[Any], shown_by: dict[str, Any]) -> None:
    filters[:] = before
    vars(warnings).update(shown_by, filters=filters)
    warnings._filters_mutated()  # type: ignore[attr-defined]
