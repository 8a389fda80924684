"""What a Newton step is worth in gradients, and nothing that depends on the machine.

By products of matrices in a layer: a forward pass takes one; a backward pass two, for its weights and for its inputs; a
derivative along a direction two, for the same reason. A gradient is a forward and a backward pass.
"""

from debiased_laplace.newton.directional_steps import StepOutcome

FORWARD, BACKWARD, DERIVATIVE = 1 / 3, 2 / 3, 2 / 3
"""In gradients of one sample."""


def step_work(outcome: StepOutcome, magnitudes: str, n: int) -> float:
    """Gradients of one sample that a step is worth which divides n samples in halves, or takes them all at once."""
    one_set = n if magnitudes == "same_batch" else n / 2
    starts = 2 if magnitudes == "cross_fitted" else 1  # of conjugate gradients, each from a gradient
    work = outcome.products * (DERIVATIVE + BACKWARD) + outcome.derivatives * DERIVATIVE
    return n * FORWARD + one_set * (starts * BACKWARD + work)
