"""Run-time type checks, on request, and one thread for each of several test processes."""

import os

import torch

if os.environ.get("TYPECHECK"):
    from jaxtyping import install_import_hook

    # before any test imports the package
    with install_import_hook("debiased_laplace", "beartype.beartype"):
        import debiased_laplace  # noqa: F401

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)
