"""How a step is taken, checked where the options are given."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal

from debiased_laplace.linalg.conjugate_gradients import LinearMap
from debiased_laplace.quadratics.given import Curvature, check_curvature

StepMagnitudes = Literal["cross_fitted", "held_out", "same_batch"]
_MAGNITUDES = ("cross_fitted", "held_out", "same_batch")
Stopping = Literal["held_out", "none"]


@dataclass(frozen=True)
class StepOptions:
    """How a step is taken.

    Attributes:
        shrinkage: shrink every step by how much of its slope is noise.
        max_iterations: of conjugate gradients.
        tolerance: conjugate gradients have converged at this residual, relative to the gradient.
        stopping: "held_out": once slopes of the samples that say the steps are not beyond three standard errors; along
            those there is no step, and directions are taken together in segments. "none": at the cap, one by one.
        preconditioner: of conjugate gradients.
    """

    shrinkage: bool
    max_iterations: int
    tolerance: float
    stopping: Stopping
    preconditioner: LinearMap | None = None


def check_n_data(n_data: int | None, n_samples: int) -> None:
    """Refuse an N that is none, or smaller than its part.

    Raises:
        ValueError: saying so.
    """
    if n_data is None:
        return
    if isinstance(n_data, bool) or not isinstance(n_data, int) or n_data < n_samples:
        raise ValueError(
            f"n_data must be a whole number, of at least the {n_samples} samples given, which are part of it; got "
            f"{n_data!r}."
        )


def checked_options(
    damping: float, magnitudes: StepMagnitudes, curvature: Curvature, options: StepOptions
) -> StepOptions:
    """Refuse options that are out of range.

    Raises:
        ValueError: saying which.
    """
    check_curvature(curvature)
    if magnitudes not in _MAGNITUDES:
        raise ValueError(f"magnitudes must be one of {list(_MAGNITUDES)}; got {magnitudes!r}.")
    if options.stopping not in ("held_out", "none"):
        raise ValueError(f"stopping must be 'held_out' or 'none'; got {options.stopping!r}.")
    for name, value in (("damping", damping), ("tolerance", options.tolerance)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not (isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0; got {value!r}.")
    n = options.max_iterations
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"max_iterations must be a whole number of at least 1; got {n!r}.")
    if not isinstance(options.shrinkage, bool):
        raise ValueError(f"shrinkage must be True or False; got {options.shrinkage!r}.")
    return options
