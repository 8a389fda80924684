"""Marks of whole files, run-time type checks on request, and one thread for each of several test processes."""

import math
import os
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch

PAGES = ("page", "example", "benchmark", "readme")

if os.environ.get("TYPECHECK"):
    from jaxtyping import install_import_hook

    # before any test imports the package
    with install_import_hook("debiased_laplace", "type_checks.check"):
        import debiased_laplace  # noqa: F401

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Mark what runs pages, examples and benchmark scripts, by its file; thin out the cases under type checks."""
    for item in items:
        if any(word in item.path.stem for word in PAGES) and "calibration" not in item.path.parts:
            item.add_marker(pytest.mark.pages)
        if os.environ.get("TYPECHECK") and "untyped" in item.keywords:
            item.add_marker(pytest.mark.skip("not under run-time type checks"))
    yield
    if os.environ.get("TYPECHECK"):
        kept = some_cases(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def some_cases(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return about the square root of the cases of every test, evenly spaced: the types are those of the test."""
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept: set[pytest.Item] = set()
    for own in cases.values():
        n = math.ceil(len(own) ** 0.5)
        kept |= {own[i * len(own) // n] for i in range(n)}
    return kept
