"""Shapes in signatures are checked while the tests run, and only then."""

from jaxtyping import install_import_hook

with install_import_hook("debiased_laplace", "beartype.beartype"):
    import debiased_laplace  # noqa: F401
