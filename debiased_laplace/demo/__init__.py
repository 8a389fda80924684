"""The main job on real data: train, fit three posteriors, compare them, write a report."""

from debiased_laplace.demo.presentation import run

__all__ = ["run"]
