"""How much damping the next step has, by what the judges say of the last one.

References:
    Martens (2010), Deep learning via Hessian-free optimization, ICML, §4.1 (damping that adapts).
"""

from math import inf, isfinite

from debiased_laplace.newton.judging import Verdict

_TRUSTED, _DOUBTED, _WRONG = 2 / 3, 1.5, 4.0  # factors of the damping
_LEAST, _MOST = 1e-8, 1e8  # damping


def wrong_by(verdict: Verdict) -> float:
    """By how much the quadratic is too low at the step, as a share of what the damped one falls by at its minimum."""
    if verdict.excess <= 0:
        return 0.0
    return verdict.excess / verdict.bend if verdict.bend > 0 and isfinite(verdict.excess) else inf


def adapted(damping: float, wrong: float) -> float:
    """Levenberg's and Marquardt's rule, by samples that had no part in what they judge.

    More damping where the quadratic is not to be trusted so far, less where it is.

    Args:
        damping: of the step.
        wrong: by how much the judges' mean loss rises above their quadratic, as a share of what a quadratic of their
            curvature falls by at its minimum.

    Returns:
        The next damping.
    """
    factor = 1.0
    if wrong < 0.25:
        factor = _TRUSTED
    elif wrong > 0.75:
        factor = _DOUBTED if wrong < 2 else _WRONG
    return min(max(damping * factor, _LEAST), _MOST)
