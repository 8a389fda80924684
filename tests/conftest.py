"""Marks of whole files, run-time type checks on request, and one thread for each of several test processes."""

import os

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs pages, examples and benchmark scripts, by the name of its file."""
    for item in items:
        if any(word in item.path.stem for word in PAGES) and "calibration" not in item.path.parts:
            item.add_marker(pytest.mark.pages)
        if os.environ.get("TYPECHECK") and "untyped" in item.keywords:
            item.add_marker(pytest.mark.skip("not under run-time type checks"))
