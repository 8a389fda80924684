"""Curvature backends of laplace-torch: the kind of curvature of each, and where it is used.

A backend is used where it agrees with torch.func on a few samples. Where it fails or disagrees, torch.func is used
instead, a warning gives the reason, and `curvature_source` names the engine.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from laplace.curvature import CurvatureInterface, EFInterface, GGNInterface
from laplace.curvature.asdfghjkl import AsdfghjklHessian
from laplace.curvature.asdl import AsdlHessian
from laplace.curvature.curvlinops import CurvlinopsHessian

from debiased_laplace.checks import integer
from debiased_laplace.curvature.kfac import KfacApproximation
from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.roots import EmpiricalFisher, GaussNewton, MonteCarloGaussNewton, OutputRoot
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.inputs import MappingKeys
from debiased_laplace.posterior.backend_derivatives import BackendDerivatives, BackendFeature

CurvatureKind = Literal["GGN", "Monte-Carlo GGN", "EF", "Hessian"]


@dataclass(frozen=True)
class BackendChoice:
    """Requested backend.

    Attributes:
        backend: a class of laplace-torch's; None: torch.func.
        kind: which curvature it stands for.
        n_draws: of the Monte-Carlo GGN.
    """

    backend: type | None
    kind: CurvatureKind
    n_draws: int

    @classmethod
    def of(cls, backend: Any, kwargs: Any) -> "BackendChoice":
        """Read the constructor's `backend` and `backend_kwargs`.

        Raises:
            ValueError: if it is no backend that can be used, or an option is not known.
        """
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise ValueError(f"Expected backend_kwargs as a mapping or None; got {kwargs!r}.")
        left = dict(kwargs or {})
        stochastic, n_draws = left.pop("stochastic", False), left.pop("num_samples", None)
        if left:
            raise ValueError(
                f"backend_kwargs may hold 'stochastic' and 'num_samples'; got {sorted(left, key=str)}. last_layer and "
                "subnetwork_indices follow from subset_of_weights."
            )
        if not isinstance(stochastic, bool):
            raise ValueError(f"Expected stochastic as True or False; got {stochastic!r}.")
        kind = _kind(backend)
        if (stochastic or n_draws is not None) and kind != "GGN":
            raise ValueError(
                f"stochastic and num_samples are of the GGN; {backend.__name__} computes the {kind}. Expected them "
                "with CurvlinopsGGN, BackPackGGN, AsdlGGN or backend=None."
            )
        if n_draws is not None and not stochastic:
            raise ValueError("num_samples is of stochastic=True; expected both in backend_kwargs.")
        n_draws = 1 if n_draws is None else integer(n_draws, "num_samples")
        if n_draws < 1:
            raise ValueError(f"num_samples must be at least 1; got {n_draws}.")
        return cls(backend, "Monte-Carlo GGN" if stochastic else kind, n_draws)

    @classmethod
    def of_laplace_torch(cls, backend: type, kwargs: Mapping[str, Any]) -> "BackendChoice":
        """Return the kind of curvature of a laplace-torch posterior, to be computed by torch.func.

        Raises:
            ValueError: if the backend does not say.
        """
        hessian = issubclass(backend, CurvlinopsHessian | AsdlHessian | AsdfghjklHessian)
        kind = "Hessian" if hessian else _kind_by_interface(backend)
        if kind is None:
            raise ValueError(f"Expected a posterior of the GGN, the EF or the Hessian; got one by {backend.__name__}.")
        return cls(None, "Monte-Carlo GGN" if kind == "GGN" and kwargs.get("stochastic") else kind, 1)

    def root(self, likelihood: Likelihood) -> OutputRoot | None:
        """Return the root of the curvature; None for the Hessian, which has none."""
        if self.kind == "GGN":
            return GaussNewton(likelihood)
        if self.kind == "EF":
            return EmpiricalFisher(likelihood)
        if self.kind == "Monte-Carlo GGN":
            return MonteCarloGaussNewton(likelihood, self.n_draws)
        return None

    def attached(self, network: Network, some: Batch, keys: MappingKeys, *, kfac: KfacApproximation | None) -> Network:
        """Return the network with the backend's derivatives where they are right on some samples.

        Args:
            network: without a backend.
            some: a few samples.
            keys: of batches that are mappings.
            kfac: K-FAC's approximation, if its factors are needed.

        Warns:
            UserWarning: for each feature that torch.func has to do instead, and why.
        """
        if self.backend is None:
            return network
        root = self.root(network.likelihood)
        features: list[BackendFeature] = (
            ["hessian"] if root is None else ["rows"] if self.kind != "Monte-Carlo GGN" else []
        )
        if kfac is not None and root is not None:
            features.append("kfac")
        if not features:
            return network
        derivatives = BackendDerivatives(self.backend, root, network, keys, of_mappings=isinstance(some.inputs, dict))
        for feature in features:
            reason = derivatives.try_feature(feature, network, some, kfac)
            if reason is not None:
                what = {"rows": "Jacobians or gradients", "kfac": "Kronecker factors", "hessian": "Hessian"}[feature]
                quiet = " backend=None does so without a warning." if self.kind == "GGN" else ""
                warnings.warn(
                    f"{self.backend.__name__} cannot compute the {what} of this model ({reason}); torch.func computes "
                    f"the same instead.{quiet}",
                    stacklevel=8,
                )
        return replace(network, backend=derivatives)


def _kind(backend: Any) -> CurvatureKind:
    names = "CurvlinopsGGN, CurvlinopsEF, CurvlinopsHessian, BackPackGGN, BackPackEF, AsdlGGN, AsdlEF, AsdlHessian"
    if backend is None:
        return "GGN"
    if not isinstance(backend, type) or not issubclass(backend, CurvatureInterface):
        raise ValueError(f"Expected backend as None or one of laplace-torch's classes {names}; got {backend!r}.")
    if "asdfghjkl" in backend.__name__.lower():
        raise ValueError(
            f"{backend.__name__} needs a package that is not on the package index; expected one of {names}."
        )
    kind = "Hessian" if issubclass(backend, CurvlinopsHessian | AsdlHessian) else _kind_by_interface(backend)
    if kind is None:
        raise ValueError(f"Expected backend as one of {names}; got {backend.__name__}, which says no curvature.")
    return kind


def _kind_by_interface(backend: type) -> CurvatureKind | None:
    if issubclass(backend, GGNInterface):
        return "GGN"
    return "EF" if issubclass(backend, EFInterface) else None
