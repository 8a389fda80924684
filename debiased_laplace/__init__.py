"""Post-hoc Laplace uncertainty whose curvature is not biased by the mini-batch it was measured on."""

from debiased_laplace.posterior.factory import DebiasedLaplace

__all__ = ["DebiasedLaplace"]
