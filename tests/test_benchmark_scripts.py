"""Scripts of the benchmarks import what is there: no type checker reads them, and most are run by hand only."""

import importlib
from pathlib import Path

import pytest

import benchmarks

FOLDER = Path(benchmarks.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
README = (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_script_imports(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}").__doc__


@pytest.mark.parametrize("name", [n for n in NAMES if "if __name__" in (FOLDER / f"{n}.py").read_text()])
def test_a_script_that_can_be_run_is_in_the_readme(name: str) -> None:
    assert f"python -m benchmarks.{name}" in README


def test_the_readme_names_nothing_else() -> None:
    for path in (FOLDER / "results").iterdir():
        assert path.name in README
