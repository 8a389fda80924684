"""Demo on real data: train a network, fit three posteriors, compare them, write a report."""

from debiased_laplace.demo.presentation import run

__all__ = ["run"]
