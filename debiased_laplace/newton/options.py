"""Options of a Newton step and their checks."""

from dataclasses import dataclass, replace
from typing import Literal

from debiased_laplace.checks import boolean, function, integer, number, one_of
from debiased_laplace.linalg.conjugate_gradients import LinearMap
from debiased_laplace.quadratics.preparation import Curvature

StepMagnitudes = Literal["cross_fitted", "held_out", "same_batch"]
Stopping = Literal["held_out", "none"]


@dataclass(frozen=True)
class StepOptions:
    """Options of a pass of conjugate gradients and its steps.

    Attributes:
        shrinkage: shrink each step by the noise in its slope.
        max_iterations: cap on the iterations of conjugate gradients.
        tolerance: residual, relative to the gradient, at which conjugate gradients have converged.
        stopping: "held_out": take no step along a direction whose slope is not beyond three standard errors, stop after
            two of these in a row, and combine directions into segments; "none": one step per direction, to the cap.
        preconditioner: of conjugate gradients.
        n_rows: number of rows to draw of each set of samples for its curvature; None: all.
    """

    shrinkage: bool
    max_iterations: int
    tolerance: float
    stopping: Stopping
    preconditioner: LinearMap | None = None
    n_rows: int | None = None


def check_n_data(n_data: int | None, n_samples: int) -> None:
    """Check the size of a data set that the samples are part of.

    Raises:
        ValueError: if it is not an integer of at least the number of samples.
    """
    if n_data is not None:
        integer(n_data, "n_data", minimum=n_samples)


def checked_options(
    damping: float, magnitudes: StepMagnitudes, curvature: Curvature, options: StepOptions
) -> StepOptions:
    """Check the options of a step and return them.

    Raises:
        ValueError: if one is out of range.
    """
    one_of(curvature, Curvature, "curvature")
    one_of(magnitudes, StepMagnitudes, "magnitudes")
    one_of(options.stopping, Stopping, "stopping")
    number(damping, "damping", low=0)
    if options.n_rows is not None:
        integer(options.n_rows, "n_rows", minimum=1)
        if curvature == "hessian":
            raise ValueError(
                "A Hessian has no rows to draw; expected curvature='ggn' or 'ef' with n_rows, or n_rows=None."
            )
    if options.preconditioner is not None:
        function(options.preconditioner, "preconditioner")
    return replace(
        options,
        tolerance=number(options.tolerance, "tolerance", low=0),
        max_iterations=integer(options.max_iterations, "max_iterations", minimum=1),
        shrinkage=boolean(options.shrinkage, "shrinkage"),
    )
