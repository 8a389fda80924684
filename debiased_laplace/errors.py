"""Exceptions of the package; all are subclasses of `ValueError`."""

from torch import Tensor


# laplace-torch raises AttributeError here
class NotFittedError(ValueError, AttributeError):
    """Result requested from a posterior that has not been fitted."""


class OverlapError(ValueError):
    """Sets of samples that must be disjoint overlap."""


class RepeatedSamplesError(ValueError):
    """Data set with equal samples at different positions, so that disjoint positions are not disjoint samples.

    Attributes:
        positions: positions in the loader's data set of the samples that repeat an earlier one.
    """

    def __init__(self, positions: Tensor):
        self.positions = positions
        shown = ", ".join(str(i) for i in positions[:5].tolist())
        super().__init__(
            f"Expected distinct samples; {len(positions)} samples have the same input and target as an earlier one "
            f"(positions {shown}{', …' if len(positions) > 5 else ''}), so the sub-batches for directions and for "
            "magnitudes would share them. Remove the repeats with a Subset of the data set; their positions are in "
            "the attribute `positions` of this error."
        )
