"""Checks of what users pass in, one for each kind of value."""

import operator
from math import inf, isfinite, nan
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn


def name_of(option: object) -> str:
    """Return an option as a plain string, whether it is one or a member of laplace-torch's enumerations."""
    return str(getattr(option, "value", option))


def shown(value: Any) -> str:
    """Return a value for a message: long ones by type and shape."""
    text = repr(value)
    if isinstance(value, Tensor) or len(text) > 60:
        shape = getattr(value, "shape", None)
        return type(value).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")
    return text


def one_of(value: object, kind: object, name: str, *, also: tuple[str, ...] = ()) -> None:
    """Check an option against its `Literal`, and against further values.

    Raises:
        ValueError: if it is none of them.
    """
    available = [*get_args(kind), *also]
    if not isinstance(value, str) or value not in available:
        raise ValueError(f"{name} must be one of {available}; got {shown(value)}.")


def integer(value: Any, name: str, *, minimum: int | None = None, also: str = "") -> int:
    """Return the value as an int, if it is a whole number of an integer type; `also` names what else is allowed.

    Raises:
        ValueError: if it is not, or is below the minimum.
    """
    expected = f"{name} must be an integer" + ("" if minimum is None else f" of at least {minimum}") + also
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (minimum is not None and number < minimum):
        raise ValueError(f"{expected}; got {shown(value)}.")
    return number


def boolean(value: object, name: str) -> bool:
    """Return the value, if it is True or False.

    Raises:
        ValueError: if it is neither.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False; got {shown(value)}.")
    return bool(value)


def number(value: Any, name: str, *, low: float = -inf, high: float = inf, is_open: bool = False) -> float:
    """Return a single real number of a range as a float.

    Args:
        value: a number of Python, NumPy or torch.
        name: of the argument.
        low: smallest value.
        high: largest value.
        is_open: whether `low` and `high` themselves are refused.

    Raises:
        ValueError: if it is not one, not finite, or outside of the range.
    """
    found = nan
    if not isinstance(value, bool | np.bool_ | str | bytes):
        try:
            found = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            found = nan
    if not isfinite(found) or not (low < found < high if is_open else low <= found <= high):
        if isfinite(low) and isfinite(high):
            expected = f"between {low:g} and {high:g}"
        else:
            expected = "a finite number" + (
                f" {'above' if is_open else 'of at least'} {low:g}" if isfinite(low) else ""
            )
        raise ValueError(f"{name} must be {expected}; got {shown(value)}.")
    return found


def text(value: Any, name: str) -> str:
    """Return the value, if it is text that is not empty.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be text; got {shown(value)}.")
    return value


def network(model: Any) -> nn.Module:
    """Return the model, if it is a module of torch with whole parameters.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"Expected the model as a torch.nn.Module; got {shown(model)}.")
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise ValueError(
            "The model's parameters are divided among processes (DTensor, as of fully_shard); expected whole ones, in "
            "each process. Build the model again, and load get_model_state_dict(sharded, "
            "options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict; "
            "shard_directions=True divides the directions, which take many times the memory of the weights."
        )
    return model


def tensor(value: Any, name: str) -> Tensor:
    """Return the value, if it is a tensor of real floating-point numbers.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else shown(value)
        raise ValueError(f"Expected {name} as a floating-point tensor; got {got}.")
    return value


def function(value: Any, name: str) -> Any:
    """Return the value, if it can be called.

    Raises:
        ValueError: if it cannot.
    """
    if not callable(value):
        raise ValueError(f"{name} must be a function; got {shown(value)}.")
    return value


def finite(value: Any, name: str) -> Tensor:
    """Return the value as a tensor, if every entry is finite.

    Raises:
        ValueError: if it is no number or tensor, or has no entries, or some are not finite.
    """
    try:
        entries = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a number or a tensor; got {value!r}.") from error
    if entries.is_complex():
        raise ValueError(f"{name} must be real; got {shown(value)}.")
    if entries.numel() == 0 or not bool(entries.detach().isfinite().all()):
        raise ValueError(f"{name} must be finite; got {entries.flatten()[:4].tolist()}.")
    return entries


def positive(value: Any, name: str) -> Any:
    """Return the value itself, if every entry is positive and finite.

    Raises:
        ValueError: if it is no number or tensor, or some entries are not positive and finite.
    """
    try:
        entries = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a number or a tensor; got {value!r}.") from error
    if entries.is_complex() or entries.dtype == torch.bool:
        raise ValueError(f"{name} must be a real number or a tensor of such; got {shown(value)}.")
    entries = entries.double()
    if entries.numel() == 0 or not bool((entries.isfinite() & (entries > 0)).all()):
        raise ValueError(f"{name} must be positive and finite; got {entries.flatten()[:4].tolist()}.")
    return value


def one_positive(value: Any, name: str) -> Any:
    """Return the value itself, if it is a single number, positive and finite.

    Raises:
        ValueError: if it is not.
    """
    n = torch.as_tensor(positive(value, name)).numel()
    if n != 1:
        raise ValueError(f"{name} must be one number; got {n}.")
    return value
