"""The way through the house: a room imports only rooms listed above it."""

import ast
from pathlib import Path

import pytest

import debiased_laplace

PACKAGE = Path(debiased_laplace.__file__).parent
ROOMS = [
    "errors",
    "checks",
    "files",
    "processes",
    "fit_checkpoint",
    "linalg",
    "data",
    "curvature",
    "quadratics",
    "debiasing",
    "predictive",
    "posterior",
    "newton",
    "calibration",
    "diagnosis",
    "demo",
    "cli",
]


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "debiased_laplace" and len(parts) > 1 else None


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_above_it(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own in ("__init__", "__main__"):
        return
    assert own in ROOMS, f"{own} is not a known room"
    above = ROOMS[: ROOMS.index(own) + 1]
    seen = {room_of(module) for module in imports(path)} - {None}
    assert seen <= set(above), f"{path.name} imports {sorted(seen - set(above))}, which come after {own}"


def test_linear_algebra_and_data_know_no_laplace_torch():
    for room in ("linalg", "data", "curvature", "quadratics", "debiasing", "newton"):
        for path in (PACKAGE / room).glob("*.py"):
            assert not any(module.split(".")[0] == "laplace" for module in imports(path)), path
