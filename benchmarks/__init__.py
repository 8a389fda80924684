"""Benchmarks of the package: `python -m benchmarks.NAME` from the top of the repository."""
