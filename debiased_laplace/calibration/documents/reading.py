"""Plain data as frozen dataclasses: what `json.loads` gives becomes what the types of their fields say.

Nothing here knows reports, so that a field added to a dataclass is read without another line of code.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_WORDS = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false", NoneType: "null"}


class DocumentError(ValueError):
    """The document is not what it should be; the message has the place as a JSON Pointer (RFC 6901)."""

    def __init__(self, pointer: str, message: str) -> None:
        super().__init__(f"at {pointer or '/'}: {message}")


@dataclass(frozen=True)
class Reader:
    """Reads plain data by type.

    Of types: text, numbers, truth values, None, `Literal`, `Any` (a single value), dataclasses, tuples and sequences,
    mappings from text, and unions of these. Fields with a default may be missing.

    Attributes:
        derived: dataclass to names that documents have beside its fields, because they follow from them.
    """

    derived: Mapping[type, Iterable[str]]

    def read_dataclass(self, cls: type[T], value: Any, pointer: str = "") -> T:
        """An instance of a dataclass from a mapping of its fields.

        Args:
            cls: the dataclass.
            value: what `json.loads` made of it.
            pointer: where that stands in the document, for messages.

        Raises:
            DocumentError: where a field is missing, unknown or of another type, or the dataclass refuses the values.
        """
        if not isinstance(value, Mapping):
            raise DocumentError(pointer, f"expected an object with the fields of {cls.__name__}; got {show(value)}.")
        derived = {name for known, names in self.derived.items() if issubclass(cls, known) for name in names}
        hints, required = list_fields(cls)  # type: ignore[arg-type]
        missing = [name for name in required if name not in value]
        if missing:
            raise DocumentError(pointer, f"{cls.__name__} lacks {', '.join(map(repr, missing))}.")
        unknown = [name for name in value if name not in hints and name not in derived]
        if unknown:
            known = ", ".join(hints)
            raise DocumentError(pointer, f"{cls.__name__} has no field {unknown[0]!r}; its fields are {known}.")
        given = {
            name: self.read(hints[name], item, join(pointer, name)) for name, item in value.items() if name in hints
        }
        try:
            return cls(**given)
        except ValueError as error:
            raise DocumentError(pointer, str(error)) from error

    def read(self, kind: Any, value: Any, pointer: str) -> Any:
        """A value of the type `kind`.

        Raises:
            DocumentError: if `value` is no such thing.
            TypeError: if nobody has said how to read that type.
        """
        origin, members = get_origin(kind), get_args(kind)
        if kind is Any:
            return _read_one_of((str, bool, int, float, NoneType), value, pointer)
        if kind in _WORDS:
            return _read_one_of((kind,), value, pointer)
        if origin in (Union, UnionType):
            return self._read_union(members, value, pointer)
        if origin is Literal:
            if not any(value == m and type(value) is type(m) for m in members):
                raise DocumentError(pointer, f"expected one of {', '.join(map(repr, members))}; got {show(value)}.")
            return value
        if is_dataclass(kind) and isinstance(kind, type):
            return self.read_dataclass(kind, value, pointer)
        if origin in (tuple, Sequence):
            return self._read_sequence(members, value, pointer)
        if origin is Mapping:
            if not isinstance(value, Mapping):
                raise DocumentError(pointer, f"expected an object; got {show(value)}.")
            return {key: self.read(members[1], item, join(pointer, key)) for key, item in value.items()}
        raise TypeError(f"{kind} cannot be read from a document.")

    def _read_union(self, members: tuple[Any, ...], value: Any, pointer: str) -> Any:
        single = tuple(m for m in members if m in _WORDS)
        others = [m for m in members if m not in _WORDS]
        if not others or (value is None and NoneType in members):
            return _read_one_of(single, value, pointer)
        if len(others) == 1:
            return self.read(others[0], value, pointer)
        if isinstance(value, Mapping) and all(is_dataclass(m) for m in others):
            return self.read_dataclass(max(others, key=lambda cls: _likeness(cls, value)), value, pointer)
        raise DocumentError(pointer, f"expected {' or '.join(m.__name__ for m in others)}; got {show(value)}.")

    def _read_sequence(self, members: tuple[Any, ...], value: Any, pointer: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise DocumentError(pointer, f"expected an array; got {show(value)}.")
        if len(members) == 1 or members[-1] is Ellipsis:
            kinds = [members[0]] * len(value)
        elif len(members) != len(value):
            raise DocumentError(pointer, f"expected an array of {len(members)}; got {len(value)}.")
        else:
            kinds = list(members)
        return tuple(self.read(k, item, join(pointer, i)) for i, (k, item) in enumerate(zip(kinds, value, strict=True)))


@cache
def list_fields(cls: type) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Fields of a dataclass with their types, and the names of those without a default."""
    hints = get_type_hints(cls)
    members = fields(cls)  # type: ignore[arg-type]
    required = tuple(f.name for f in members if f.default is MISSING and f.default_factory is MISSING)
    return {f.name: hints[f.name] for f in members}, required


def join(pointer: str, name: str | int) -> str:
    """The JSON Pointer to a member."""
    return f"{pointer}/{str(name).replace('~', '~0').replace('/', '~1')}"


def show(value: Any) -> str:
    """A value of a document in a message, shortened."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_one_of(kinds: Sequence[type], value: Any, pointer: str) -> Any:
    """A single value; whole numbers are numbers too and stay as they were written."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = type(value) in kinds or (float in kinds and is_number)
    if not fits or (is_number and not _is_finite(value)):
        raise DocumentError(pointer, f"expected {' or '.join(_WORDS[k] for k in kinds)}; got {show(value)}.")
    return value


def _is_finite(value: int | float) -> bool:
    try:
        return isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def _likeness(cls: type, value: Mapping[str, Any]) -> int:
    """How many of the value's fields a dataclass knows, less those that it needs and misses."""
    hints, required = list_fields(cls)
    return len(hints.keys() & value.keys()) - len([name for name in required if name not in value])
