"""The reader by type, on dataclasses of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from debiased_laplace.calibration.documents.reading import DocumentError, Reader


@dataclass(frozen=True)
class Leaf:
    word: str
    size: int | None = None


@dataclass(frozen=True)
class Flower:
    colour: str
    petals: tuple[float, ...]


@dataclass(frozen=True)
class Plant:
    name: str
    height: float
    kind: Literal["tree", "bush"]
    ever_green: bool
    leaves: tuple[Leaf, ...]
    corner: tuple[int, str]
    notes: Mapping[str, str | int | float]
    end: Leaf | Flower
    cells: Sequence[Sequence[Any]] = ()
    best: Leaf | None = None

    def __post_init__(self) -> None:
        if self.height < 0:
            raise ValueError(f"height must not be negative; got {self.height}")


READER = Reader({Leaf: ("derived",)})
GOOD = {
    "name": "oak",
    "height": 3,
    "kind": "tree",
    "ever_green": False,
    "leaves": [{"word": "a"}, {"word": "b", "size": 2, "derived": "ignored"}],
    "corner": [1, "x"],
    "notes": {"a/b": 1, "c": 0.5, "d": "e"},
    "end": {"colour": "red", "petals": [1.5, 2]},
    "cells": [["a", 1, None, 2.5], []],
    "best": None,
}


def test_every_type_is_read() -> None:
    assert READER.read_dataclass(Plant, GOOD) == Plant(
        "oak",
        3,
        "tree",
        False,
        (Leaf("a"), Leaf("b", 2)),
        (1, "x"),
        {"a/b": 1, "c": 0.5, "d": "e"},
        Flower("red", (1.5, 2)),
        (("a", 1, None, 2.5), ()),
        None,
    )


def test_whole_numbers_stay_whole() -> None:
    """Else a report would not render to the same bytes."""
    read = READER.read_dataclass(Plant, GOOD)
    assert isinstance(read.height, int)
    assert isinstance(read.notes["a/b"], int)


def test_the_member_of_a_union_is_chosen_by_its_fields() -> None:
    assert READER.read_dataclass(Plant, GOOD | {"end": {"word": "z"}}).end == Leaf("z")


WRONG = {
    "a list instead of an object": ([], "at /: expected an object with the fields of Plant; got an array of 0"),
    "a missing field": ({"name": "oak"}, "Plant lacks 'height', 'kind'"),
    "an unknown field": (GOOD | {"root": 1}, "Plant has no field 'root'; its fields are name, height"),
    "text for a number": (GOOD | {"height": "3"}, "at /height: expected a finite number; got '3'"),
    "true for a number": (GOOD | {"height": True}, "at /height: expected a finite number; got true"),
    "infinity": (GOOD | {"height": float("inf")}, "at /height: expected a finite number; got inf"),
    "a whole number beyond floats": (GOOD | {"height": 10**400}, "at /height: expected a finite number"),
    "a number for a truth value": (GOOD | {"ever_green": 0}, "at /ever_green: expected true or false; got 0"),
    "another word": (GOOD | {"kind": "moss"}, "at /kind: expected one of 'tree', 'bush'; got 'moss'"),
    "a fraction for a whole number": (GOOD | {"leaves": [{"word": "a", "size": 1.5}]}, "at /leaves/0/size: .*1.5"),
    "an object for an array": (GOOD | {"leaves": {}}, "at /leaves: expected an array; got an object"),
    "null": (GOOD | {"leaves": None}, "at /leaves: expected an array; got null"),
    "too few members": (GOOD | {"corner": [1]}, "at /corner: expected an array of 2; got 1"),
    "a slash in a name": (GOOD | {"notes": {"a/b": None}}, "at /notes/a~1b: expected text or a whole number"),
    "an array in a cell": (GOOD | {"cells": [[[1]]]}, "at /cells/0/0: expected text or true or false"),
    "neither member of a union": (GOOD | {"end": 3}, "at /end: expected Leaf or Flower; got 3"),
    "half of a union's member": (GOOD | {"end": {"colour": "red"}}, "at /end: Flower lacks 'petals'"),
    "a value that is refused": (GOOD | {"height": -1}, "at /: height must not be negative; got -1"),
    "derived names elsewhere": (GOOD | {"derived": 1}, "has no field 'derived'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_say_where(case: str) -> None:
    document, message = WRONG[case]
    with pytest.raises(DocumentError, match=message):
        READER.read_dataclass(Plant, document)


def test_a_type_that_nobody_can_read_is_a_programming_error() -> None:
    with pytest.raises(TypeError, match="complex"):
        READER.read(complex, 1, "")
