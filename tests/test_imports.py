"""`import debiased_laplace` imports neither matplotlib nor scikit-learn (torchmetrics imports the former)."""

import subprocess
import sys

import pytest

LISTEN = """
import builtins

plain, found = builtins.__import__, set()


def listening(name, globals=None, *rest, **options):
    importer = (globals or {}).get("__name__", "")
    if name.split(".")[0] in ("matplotlib", "sklearn", "netcal") and importer.startswith("debiased_laplace"):
        found.add(f"{importer} imports {name}")
    return plain(name, globals, *rest, **options)


builtins.__import__ = listening
import debiased_laplace
print(sorted(found))
"""


@pytest.mark.slow
def test_figures_and_the_demo_are_imported_where_they_are_needed():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LISTEN], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
