"""Checks of what users pass in, one for each kind of value."""

import operator
from typing import Any, get_args

import torch
from torch import Tensor


def name_of(option: object) -> str:
    """Return an option as a plain string, whether it is one or a member of laplace-torch's enumerations."""
    return str(getattr(option, "value", option))


def one_of(value: object, kind: object, name: str, *, also: tuple[str, ...] = ()) -> None:
    """Check an option against its `Literal`, and against further values.

    Raises:
        ValueError: if it is none of them.
    """
    available = [*get_args(kind), *also]
    if value not in available:
        raise ValueError(f"{name} must be one of {available}; got {value!r}.")


def integer(value: Any, name: str, *, minimum: int | None = None, also: str = "") -> int:
    """Return the value as an int, if it is a whole number of an integer type; `also` names what else is allowed.

    Raises:
        ValueError: if it is not, or is below the minimum.
    """
    expected = f"{name} must be an integer" + ("" if minimum is None else f" of at least {minimum}") + also
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (minimum is not None and number < minimum):
        raise ValueError(f"{expected}; got {value!r}.")
    return number


def boolean(value: object, name: str) -> bool:
    """Return the value, if it is True or False.

    Raises:
        ValueError: if it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {value!r}.")
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
    if entries.numel() == 0 or not bool(entries.detach().isfinite().all()):
        raise ValueError(f"{name} must be finite; got {entries.flatten()[:4].tolist()}.")
    return entries


def positive(value: Any, name: str) -> Any:
    """Return the value itself, if every entry is positive and finite.

    Raises:
        ValueError: if it is no number or tensor, or some entries are not positive and finite.
    """
    try:
        entries = torch.as_tensor(value).detach().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a number or a tensor; got {value!r}.") from error
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
