"""Marks of files and of many cases, run-time type checks on request, one thread for each of several test processes."""

import os
from collections import defaultdict
from collections.abc import Iterator
from zlib import crc32

import pytest
import torch

MOST_CASES = 5
"""Cases of a test in the fast part; the others are slow. A test whose cases say different things is several tests."""

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
    """Mark what runs pages, examples and benchmark scripts, by its file, and cases beyond the first ones as slow."""
    for item in items:
        if any(word in item.path.stem for word in PAGES) and "calibration" not in item.path.parts:
            item.add_marker(pytest.mark.pages)
        if os.environ.get("TYPECHECK") and "untyped" in item.keywords:
            item.add_marker(pytest.mark.skip("not under run-time type checks"))
    first = first_cases(items, MOST_CASES)
    for item in items:
        if item not in first:
            item.add_marker(pytest.mark.slow)
    yield
    if os.environ.get("TYPECHECK"):
        # types are those of the test, and a function that one test calls is called by others
        kept = {item for item in first_cases(items, 1) if crc32(name_of(item).encode()) % 3 == 0}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def first_cases(items: list[pytest.Item], n: int) -> set[pytest.Item]:
    """Return at most n cases of every test, in an order that mixes its parameters and is always the same."""
    cases = defaultdict(list)
    for item in items:
        cases[name_of(item)].append(item)
    return {item for own in cases.values() for item in sorted(own, key=lambda item: crc32(item.nodeid.encode()))[:n]}


def name_of(item: pytest.Item) -> str:
    """Return the name of a test without that of the case."""
    return item.nodeid.partition("[")[0]
