r"""The quadratics of some samples' losses around the weights, $d \mapsto \ell_n + d^\top g_n + \tfrac12 d^\top H_n d$.

Everything along a direction u follows from one derivative of the outputs, $J_n u$: the slope
$\nabla_f \ell_n^\top J_n u$ and, for a curvature with a root, $\|S_n^\top J_n u\|^2$. A product with the mean curvature
takes one backward pass more. Only the likelihood enters; the regularizer is a `Penalty`.
"""

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.memory import free_memory
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.roots import EmpiricalFisher, GaussNewton, OutputRoot
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.data.batches import Batch
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.quadratics.given import Curvature

_WORTH_TRACING = 4e9  # samples times products times parameters: below, tracing a network takes as long as it saves


class BatchQuadratic(ABC):
    """The quadratics of the samples of one batch, and their mean.

    Attributes:
        network: at the weights.
        batch: the samples.
    """

    def __init__(self, network: Network, batch: Batch):
        self.network, self.batch = network, batch
        self._linearized = network.linearized(batch.inputs)
        self._jacobians: Tensor | None = None

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def outputs(self) -> Float[Tensor, "n C"]:
        """Of the network."""
        return self._linearized.outputs

    @cached_property
    def losses(self) -> Float[Tensor, " n"]:
        """Of the samples."""
        return self.network.likelihood.per_sample_loss(self.outputs, self.batch.targets)

    @cached_property
    def output_gradients(self) -> Float[Tensor, "n C"]:
        """Of each sample's loss, with respect to the outputs."""
        return self.network.likelihood.gradient(self.outputs, self.batch.targets)

    @cached_property
    def gradient(self) -> Float[Tensor, " P"]:
        """Of the mean loss."""
        return self._linearized.pulled(self.output_gradients) / len(self)

    def pushed(self, directions: Float[Tensor, "P k"]) -> Float[Tensor, "n C k"]:
        """$J_n u_i$: by forward mode, or through the rows of the Jacobians where the model does not allow it."""
        if self.network.capabilities.columns:
            return self._linearized.pushed(directions)
        if self._jacobians is not None:
            return self._jacobians @ directions
        n_bytes = len(self) * self.network.n_outputs * self.network.bytes_of_a_row
        keep = n_bytes <= free_memory(directions.device) // 4
        parts = []
        for J, _ in self.network.jacobians(self.batch.inputs):
            parts.append(J if keep else J @ directions)
        if keep:
            self._jacobians = torch.cat(parts)
            return self._jacobians @ directions
        return torch.cat(parts)

    def slopes(self, pushed: Float[Tensor, "n C k"]) -> Float[Tensor, "n k"]:
        """Each sample's slope at the weights, along the directions that were pushed."""
        return torch.einsum("nc,nck->nk", self.output_gradients, pushed)

    @abstractmethod
    def product(self, x: Float[Tensor, " P"], pushed: Float[Tensor, "n C 1"] | None = None) -> Float[Tensor, " P"]:
        """The mean curvature times x, which may have been pushed already."""

    @abstractmethod
    def curvatures(self, directions: Float[Tensor, "P k"], pushed: Float[Tensor, "n C k"]) -> Float[Tensor, "n k"]:
        """Each sample's curvature along directions."""

    @abstractmethod
    def curvature_matrix(
        self, directions: Float[Tensor, "P k"], pushed: Float[Tensor, "n C k"]
    ) -> Float[Tensor, "k k"]:
        """The sum over the samples of U' H_n U, in double precision."""

    @abstractmethod
    def position(self) -> "Position":
        """At the weights."""


class Position(ABC):
    """A point on the quadratics of a batch, from which one looks along the next directions."""

    @abstractmethod
    def look(self, directions: Float[Tensor, "P k"], pushed: Float[Tensor, "n C k"] | None = None) -> None:
        """Get some directions ready, which may have been pushed already."""

    @abstractmethod
    def along(self, i: int) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Each sample's slope at this point and its curvature, along the i-th of the directions."""

    @abstractmethod
    def move(self, i: int, step: float) -> None:
        """Go so far along the i-th of the directions."""


class RootQuadratic(BatchQuadratic):
    """With a curvature that has a root: GGN, empirical Fisher."""

    def __init__(self, network: Network, batch: Batch, root: OutputRoot):
        super().__init__(network, batch)
        self.root = root
        # the roots that are used here draw nothing
        self._side = root.side(batch.targets, network.n_outputs, torch.Generator()).to(self.outputs.device)

    def product(self, x: Float[Tensor, " P"], pushed: Float[Tensor, "n C 1"] | None = None) -> Float[Tensor, " P"]:
        """One derivative along x, and one backward pass."""
        along = self.pushed(x[:, None]) if pushed is None else pushed
        weighted = self.root.product(self.outputs, self._side, along[..., 0])
        return self._linearized.pulled(weighted) / len(self)

    def projections(self, pushed: Float[Tensor, "n C k"]) -> Float[Tensor, "n r k"]:
        r"""$S_n^\top J_n u_i$."""
        return self.root.transposed(self.outputs, self._side, pushed)

    def curvatures(self, directions: Float[Tensor, "P k"], pushed: Float[Tensor, "n C k"]) -> Float[Tensor, "n k"]:  # noqa: ARG002
        r"""$\|S_n^\top J_n u_i\|^2$."""
        return self.projections(pushed).square().sum(1)

    def curvature_matrix(
        self,
        directions: Float[Tensor, "P k"],  # noqa: ARG002
        pushed: Float[Tensor, "n C k"],
    ) -> Float[Tensor, "k k"]:
        """From the projections."""
        V = self.projections(pushed).flatten(0, 1).to(accumulation_dtype(pushed))
        return V.mT @ V

    def position(self) -> "Position":
        """At the weights."""
        return _RootPosition(self)


class _RootPosition(Position):
    r"""Knows what it has walked by $y_n = S_n^\top J_n d$: a step moves y, and slopes are inner products with it."""

    def __init__(self, quadratic: RootQuadratic):
        self._quadratic = quadratic
        self._y: Tensor | None = None

    def look(self, directions: Float[Tensor, "P k"], pushed: Float[Tensor, "n C k"] | None = None) -> None:
        pushed = self._quadratic.pushed(directions) if pushed is None else pushed
        self._projections = self._quadratic.projections(pushed)
        self._slopes = self._quadratic.slopes(pushed)
        if self._y is None:
            self._y = torch.zeros_like(self._projections[..., 0], dtype=accumulation_dtype(pushed))

    def along(self, i: int) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        y = self._walked()
        a = self._projections[..., i].to(y.dtype)
        return self._slopes[:, i].to(y.dtype) + (a * y).sum(1), a.square().sum(1)

    def move(self, i: int, step: float) -> None:
        y = self._walked()
        self._y = y + step * self._projections[..., i].to(y.dtype)

    def _walked(self) -> Tensor:
        if self._y is None:
            raise RuntimeError("look comes before along and move.")
        return self._y


class HessianQuadratic(BatchQuadratic):
    """With the Hessian, indefinite away from a minimum."""

    def __init__(self, network: Network, batch: Batch, derivatives: SecondDerivatives):
        super().__init__(network, batch)
        self.derivatives = derivatives

    def product(self, x: Float[Tensor, " P"], pushed: Float[Tensor, "n C 1"] | None = None) -> Float[Tensor, " P"]:  # noqa: ARG002
        """A Hessian-vector product."""
        return self.derivatives.products(self.batch, x[:, None])[:, 0] / len(self)

    def curvatures(self, directions: Float[Tensor, "P k"], pushed: Float[Tensor, "n C k"]) -> Float[Tensor, "n k"]:  # noqa: ARG002
        """Second derivatives along the directions."""
        return self.derivatives.quadratics(self.batch, directions)

    def curvature_matrix(
        self,
        directions: Float[Tensor, "P k"],
        pushed: Float[Tensor, "n C k"],  # noqa: ARG002
    ) -> Float[Tensor, "k k"]:
        """From products."""
        exact = accumulation_dtype(directions)
        found = directions.mT.to(exact) @ self.derivatives.products(self.batch, directions).to(exact)
        return (found + found.mT) / 2

    def position(self) -> "Position":
        """At the weights."""
        return _HessianPosition(self)


class _HessianPosition(Position):
    """Knows what it has walked as a vector: every slope takes second derivatives along it."""

    def __init__(self, quadratic: HessianQuadratic):
        self._quadratic = quadratic
        self._walked: Tensor | None = None

    def look(self, directions: Float[Tensor, "P k"], pushed: Float[Tensor, "n C k"] | None = None) -> None:
        pushed = self._quadratic.pushed(directions) if pushed is None else pushed
        self._directions = directions
        self._slopes = self._quadratic.slopes(pushed)
        if self._walked is None:
            self._walked = torch.zeros_like(directions[:, 0])

    def along(self, i: int) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        u = self._directions[:, i]
        right = torch.stack([u if self._walked is None else self._walked, u], dim=1)
        found = self._quadratic.derivatives.bilinears(self._quadratic.batch, u[:, None].expand(-1, 2), right)
        exact = accumulation_dtype(found)
        return self._slopes[:, i].to(exact) + found[:, 0].to(exact), found[:, 1].to(exact)

    def move(self, i: int, step: float) -> None:
        if self._walked is not None:
            self._walked = self._walked + step * self._directions[:, i]


def ready_for_many_products(network: Network, batch: Batch, n_products: int) -> Network:
    """The network, linearized once for each batch where so many products with a batch of this size repay it."""
    worth = len(batch) * n_products * network.n_parameters >= _WORTH_TRACING
    return network.ready_for_products(batch.inputs) if worth and network.capabilities.columns else network


def batch_quadratic(
    network: Network,
    batch: Batch,
    curvature: Curvature,
    *,
    derivatives: SecondDerivatives | None = None,
) -> BatchQuadratic:
    """The quadratics of a batch's samples.

    Args:
        network: at the weights.
        batch: on the network's device.
        curvature: of which kind.
        derivatives: second ones, where they have been tried before.

    Returns:
        The quadratics.
    """
    if curvature == "hessian":
        if derivatives is None:
            derivatives = SecondDerivatives(network.selection, network.parameters, network.likelihood, batch)
        return HessianQuadratic(network, batch, derivatives)
    root = GaussNewton(network.likelihood) if curvature == "ggn" else EmpiricalFisher(network.likelihood)
    return RootQuadratic(network, batch, root)
