"""The errors of the package, all of them `ValueError`: what was expected, and what came."""

from torch import Tensor


class NotFittedError(ValueError, AttributeError):
    """A posterior was asked for something that only `fit` can give it.

    It is an `AttributeError` too, because that is what laplace-torch raises here.
    """


class NotBuiltError(ValueError):
    """An option of the public contract that this release does not have yet; the message names what it has."""


class OverlapError(ValueError):
    """Samples that must be disjoint are not: the premise of every held-out estimate."""


class RepeatedSamplesError(ValueError):
    """Samples of a data set are equal to others, so that disjoint positions are not disjoint samples.

    Attributes:
        positions: of all samples that repeat an earlier one, in the loader's data set.
    """

    def __init__(self, positions: Tensor):
        self.positions = positions
        shown = ", ".join(str(i) for i in positions[:5].tolist())
        super().__init__(
            f"Expected every sample once; {len(positions)} samples have the same input and target as an "
            f"earlier one (positions {shown}{', …' if len(positions) > 5 else ''}), so that directions and "
            "magnitudes would share them. Leave the repeats out: they are in this error's `positions`, for "
            "a Subset of the data set without them."
        )
