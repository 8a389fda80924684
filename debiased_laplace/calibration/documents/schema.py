"""JSON Schema from frozen dataclasses: their fields, types and docstrings.

References:
    JSON Schema 2020-12, https://json-schema.org/draft/2020-12/json-schema-core
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from debiased_laplace.calibration.documents.reading import list_fields

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}
_SECTION = re.compile(r"^Attributes:\n((?:[ ]{4}.*\n?|\n)*)", re.MULTILINE)
_ENTRY = re.compile(r"^    (\w+): (.*(?:\n[ ]{5,}.*)*)", re.MULTILINE)


def describe_type(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type that `Reader` reads.

    Args:
        kind: the type.
        definitions: schemas of dataclasses by their names; those that `kind` needs are added.

    Raises:
        TypeError: if nobody has said how such a type stands in a document.
    """
    origin, members = get_origin(kind), get_args(kind)
    if kind is Any:
        return {"type": ["string", "number", "boolean", "null"]}
    if kind in _TYPES:
        return {"type": _TYPES[kind]}
    if origin is Literal:
        return {"enum": list(members)}
    if origin in (Union, UnionType):
        return _describe_union(members, definitions)
    if is_dataclass(kind) and isinstance(kind, type):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # a dataclass may refer to itself
            definitions[kind.__name__] = describe_dataclass(kind, definitions)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if origin in (tuple, Sequence):
        if len(members) == 1 or members[-1] is Ellipsis:
            return {"type": "array", "items": describe_type(members[0], definitions)}
        items = [describe_type(member, definitions) for member in members]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": describe_type(members[1], definitions)}
    raise TypeError(f"{kind} has no JSON Schema.")


def describe_dataclass(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """An object with the dataclass's fields and no others; those without a default are required."""
    hints, required = list_fields(cls)
    words = describe_attributes(cls)
    properties = {}
    for name, kind in hints.items():
        described = describe_type(kind, definitions)
        properties[name] = {**described, "description": words[name]} if name in words else described
    return {
        "description": (inspect.getdoc(cls) or "").split("\n")[0],
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def describe_attributes(cls: type) -> dict[str, str]:
    """Field to its sentence in the docstring's section on attributes."""
    section = _SECTION.search(inspect.getdoc(cls) or "")
    entries = _ENTRY.finditer(section[1]) if section else ()
    return {entry[1]: " ".join(entry[2].split()) for entry in entries}


def _describe_union(members: tuple[Any, ...], definitions: dict[str, Any]) -> dict[str, Any]:
    if all(member in _TYPES for member in members):
        names = [_TYPES[member] for member in members]
        return {"type": [n for n in names if not (n == "integer" and "number" in names)]}
    return {"anyOf": [describe_type(member, definitions) for member in members]}
