"""Exceptions of the package; all are subclasses of `ValueError`."""


# laplace-torch raises AttributeError here
class NotFittedError(ValueError, AttributeError):
    """Result requested from a posterior that has not been fitted."""


class OverlapError(ValueError):
    """Sets of samples that must be disjoint overlap."""


class ProcessError(ValueError, RuntimeError):
    """Another process of the group has failed, or does something else."""
