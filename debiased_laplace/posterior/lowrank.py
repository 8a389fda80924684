"""The debiased low-rank-plus-diagonal posterior over all weights."""

from debiased_laplace.posterior.parametric import DebiasedParametricLaplace


class DebiasedLowRankLaplace(DebiasedParametricLaplace):
    """Low-rank-plus-diagonal posterior with split-batch curvature; see `DebiasedLaplace` for the arguments."""

    # what `laplace.Laplace(..., "all", "debiased_lowrank")` finds it by
    _key = ("all", "debiased_lowrank")
