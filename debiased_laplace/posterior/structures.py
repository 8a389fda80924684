"""The posteriors by name: three structures of the curvature for three subsets of the weights.

`laplace.Laplace(model, likelihood, subset, "debiased_…")` finds each by its `_key`; laplace-torch itself takes no other
structures than its own for "subnetwork", where `DebiasedLaplace` does.
"""

from debiased_laplace.posterior.parametric import DebiasedParametricLaplace


class DebiasedLowRankLaplace(DebiasedParametricLaplace):
    """All weights, low rank plus diagonal; see `DebiasedLaplace` for the arguments of all of these."""

    _key = ("all", "debiased_lowrank")
    _subset, _structure = "all", "lowrank"


class DebiasedKronLaplace(DebiasedParametricLaplace):
    """All weights, curvature along the vectors of a Kronecker basis."""

    _key = ("all", "debiased_kron")
    _subset, _structure = "all", "kron"


class DebiasedFullLaplace(DebiasedParametricLaplace):
    """All weights, every direction; for few parameters."""

    _key = ("all", "debiased_full")
    _subset, _structure = "all", "full"


class DebiasedLowRankLLLaplace(DebiasedParametricLaplace):
    """Last layer, low rank plus diagonal."""

    _key = ("last_layer", "debiased_lowrank")
    _subset, _structure = "last_layer", "lowrank"


class DebiasedKronLLLaplace(DebiasedParametricLaplace):
    """Last layer, curvature along the vectors of a Kronecker basis."""

    _key = ("last_layer", "debiased_kron")
    _subset, _structure = "last_layer", "kron"


class DebiasedFullLLLaplace(DebiasedParametricLaplace):
    """Last layer, every direction."""

    _key = ("last_layer", "debiased_full")
    _subset, _structure = "last_layer", "full"


class DebiasedLowRankSubnetLaplace(DebiasedParametricLaplace):
    """Some entries of the weights, low rank plus diagonal."""

    _key = ("subnetwork", "debiased_lowrank")
    _subset, _structure = "subnetwork", "lowrank"


class DebiasedKronSubnetLaplace(DebiasedParametricLaplace):
    """Some entries of the weights; a Kronecker basis for parameters that are selected as a whole."""

    _key = ("subnetwork", "debiased_kron")
    _subset, _structure = "subnetwork", "kron"


class DebiasedFullSubnetLaplace(DebiasedParametricLaplace):
    """Some entries of the weights, every direction."""

    _key = ("subnetwork", "debiased_full")
    _subset, _structure = "subnetwork", "full"


CLASSES: dict[tuple[str, str], type[DebiasedParametricLaplace]] = {
    (cls._subset, cls._structure): cls
    for cls in (
        DebiasedLowRankLaplace,
        DebiasedKronLaplace,
        DebiasedFullLaplace,
        DebiasedLowRankLLLaplace,
        DebiasedKronLLLaplace,
        DebiasedFullLLLaplace,
        DebiasedLowRankSubnetLaplace,
        DebiasedKronSubnetLaplace,
        DebiasedFullSubnetLaplace,
    )
}
"""Each class by subset of weights and structure."""
