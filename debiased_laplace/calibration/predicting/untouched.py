"""Predicting without leaving a trace on anybody's model."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn

from debiased_laplace.curvature.contexts import evaluating
from debiased_laplace.posterior.laplace_torch import plain_model

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def untouched(model: nn.Module | None, *, plain: bool = True) -> Iterator[None]:
    """The model in evaluation mode; afterwards its modes, attributes, hooks, parameters and gradients are as they were.

    laplace-torch's sampling writes every draw into the parameters and leaves views of its mean there, or, after an
    exception, the last draw; its backends may clear gradients, and extend modules with hooks.

    Args:
        model: the model; None where there is none.
        plain: without what laplace-torch's backends have left on it. They need it themselves.
    """
    if model is None:
        yield
        return
    # by identity: a parameter holds other memory while a draw is written into it, and gets its own back
    before = [(p, p.data, p.grad) for p in model.parameters()]
    hooks = [(getattr(m, name), dict(getattr(m, name))) for m in model.modules() for name in HOOKS]
    try:
        with evaluating(model), plain_model(model) if plain else nullcontext():
            for p, _, _ in before:
                p.grad = None
            yield
    finally:
        for p, data, grad in before:
            if p.data_ptr() != data.data_ptr():
                p.data = data
            p.grad = grad
        for present, kept in hooks:
            if list(present) != list(kept):
                present.clear()
                present.update(kept)
