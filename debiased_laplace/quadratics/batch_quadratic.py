r"""Per-sample quadratic models of the loss at the weights, $d \mapsto \ell_n + d^\top g_n + \tfrac12 d^\top H_n d$.

Slope and curvature along a direction u follow from one Jacobian-vector product $J_n u$: the slope is
$\nabla_f \ell_n^\top J_n u$, the curvature $\|S_n^\top J_n u\|^2$ if it has a root $S_n$. A product with the mean
curvature takes one more backward pass. The likelihood alone enters; the regularizer is a `Penalty`.
"""

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.likelihood import Likelihood
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.roots import EmpiricalFisher, GaussNewton, OutputRoot
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.data.batches import Batch
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.quadratics.preparation import Curvature
from debiased_laplace.quadratics.shared_batch import SharedLinearizedBatch

# samples x products x parameters; below it, tracing a network takes as long as it saves
_MIN_WORK_FOR_TRACING = 4e9


class BatchQuadratic(ABC):
    """Quadratic models of the samples of one batch, and their mean.

    Attributes:
        network: the network, at the weights of the expansion.
        batch: the samples.
    """

    def __init__(self, network: Network, batch: Batch):
        self.network, self.batch = network, batch
        several = network.processes.several
        self._linearized = SharedLinearizedBatch(network, batch.inputs) if several else network.linearized(batch.inputs)
        self._jacobians: Tensor | None = None

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def outputs(self) -> Float[Tensor, "n C"]:
        """Outputs of the network."""
        return self._linearized.outputs

    @cached_property
    def losses(self) -> Float[Tensor, " n"]:
        """Loss of each sample, times its weight."""
        return self.batch.scaled(self.network.likelihood.per_sample_loss(self.outputs, self.batch.targets))

    @cached_property
    def output_gradients(self) -> Float[Tensor, "n C"]:
        """Gradient of each sample's weighted loss with respect to the outputs."""
        return self.batch.scaled(self.network.likelihood.gradient(self.outputs, self.batch.targets))

    @cached_property
    def gradient(self) -> Float[Tensor, " P"]:
        """Gradient of the mean loss with respect to the weights."""
        return self._linearized.pulled(self.output_gradients) / len(self)

    def pushed(self, directions: Float[Tensor, "P k"]) -> Float[Tensor, "n C k"]:
        """Return $J_n u_i$, by forward mode, or from the rows of the Jacobians if the model does not support it."""
        if self.network.capabilities.columns:
            return self._linearized.pushed(directions)
        if self._jacobians is not None:
            return self._jacobians @ directions
        n_bytes = len(self) * self.network.n_outputs * self.network.bytes_of_a_row
        keep = n_bytes <= self.network.available_memory
        parts = []
        for J, _ in self.network.jacobians(self.batch.inputs):
            parts.append(J if keep else J @ directions)
        if keep:
            self._jacobians = torch.cat(parts)
            return self._jacobians @ directions
        return torch.cat(parts)

    def slopes(self, pushed: Float[Tensor, "n C k"]) -> Float[Tensor, "n k"]:
        """Return each sample's slope at the weights, given $J_n u_i$ of the directions."""
        return torch.einsum("nc,nck->nk", self.output_gradients, pushed)

    @abstractmethod
    def product(self, x: Float[Tensor, " P"], pushed: Float[Tensor, "n C 1"] | None = None) -> Float[Tensor, " P"]:
        """Return the mean curvature times x; `pushed` is $J_n x$ if it is already computed."""

    @abstractmethod
    def curvatures(self, directions: Float[Tensor, "P k"], pushed: Float[Tensor, "n C k"]) -> Float[Tensor, "n k"]:
        """Return each sample's curvature along the directions, given $J_n u_i$."""

    @abstractmethod
    def curvature_matrix(
        self, directions: Float[Tensor, "P k"], pushed: Float[Tensor, "n C k"]
    ) -> Float[Tensor, "k k"]:
        r"""Return $\sum_n U^\top H_n U$ in double precision, given $J_n u_i$."""

    @abstractmethod
    def position(self) -> "Position":
        """Return a position at the weights."""


class Position(ABC):
    """Point on the quadratic models of a batch, moved step by step along given directions."""

    @abstractmethod
    def prepare(self, directions: Float[Tensor, "P k"], pushed: Float[Tensor, "n C k"] | None = None) -> None:
        """Set the directions of the next calls; `pushed` is $J_n u_i$ if it is already computed."""

    @abstractmethod
    def along(self, i: int) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Return each sample's slope at this point and its curvature, along the i-th direction."""

    @abstractmethod
    def move(self, i: int, step: float) -> None:
        """Move by `step` times the i-th direction."""


class RootQuadratic(BatchQuadratic):
    """Quadratic models whose curvature has a root: GGN, empirical Fisher."""

    def __init__(self, network: Network, batch: Batch, root: OutputRoot):
        super().__init__(network, batch)
        self.root = root
        # neither of the two roots draws noise: the generator is not used
        self._targets = root.targets_or_noise(batch.targets, network.n_outputs, torch.Generator()).to(
            self.outputs.device
        )

    def product(self, x: Float[Tensor, " P"], pushed: Float[Tensor, "n C 1"] | None = None) -> Float[Tensor, " P"]:
        """Return the mean curvature times x, by one Jacobian-vector product and one backward pass."""
        along = self.pushed(x[:, None]) if pushed is None else pushed
        weighted = self.root.product(self.outputs, self._targets, along[..., 0])
        return self._linearized.pulled(self.batch.scaled(weighted)) / len(self)

    def projections(self, pushed: Float[Tensor, "n C k"]) -> Float[Tensor, "n r k"]:
        r"""Return $\sqrt{m_n} S_n^\top J_n u_i$, $m_n$ being the weights."""
        return self.batch.scaled(self.root.transposed(self.outputs, self._targets, pushed), 0.5)

    def curvatures(self, directions: Float[Tensor, "P k"], pushed: Float[Tensor, "n C k"]) -> Float[Tensor, "n k"]:  # noqa: ARG002
        r"""Return $\|S_n^\top J_n u_i\|^2$."""
        return self.projections(pushed).square().sum(1)

    def curvature_matrix(
        self,
        directions: Float[Tensor, "P k"],  # noqa: ARG002
        pushed: Float[Tensor, "n C k"],
    ) -> Float[Tensor, "k k"]:
        r"""Return $\sum_n (S_n^\top J_n U)^\top (S_n^\top J_n U)$ in double precision."""
        V = self.projections(pushed).flatten(0, 1).to(accumulation_dtype(pushed))
        return V.mT @ V

    def position(self) -> "Position":
        """Return a position at the weights."""
        return _RootPosition(self)


class _RootPosition(Position):
    r"""Position kept as $y_n = S_n^\top J_n d$, d being the displacement; slopes are inner products with it."""

    def __init__(self, quadratic: RootQuadratic):
        self._quadratic = quadratic
        self._y: Tensor | None = None

    def prepare(self, directions: Float[Tensor, "P k"], pushed: Float[Tensor, "n C k"] | None = None) -> None:
        pushed = self._quadratic.pushed(directions) if pushed is None else pushed
        self._projections = self._quadratic.projections(pushed)
        self._slopes = self._quadratic.slopes(pushed)
        if self._y is None:
            self._y = torch.zeros_like(self._projections[..., 0], dtype=accumulation_dtype(pushed))

    def along(self, i: int) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        y = self._displacement()
        a = self._projections[..., i].to(y.dtype)
        return self._slopes[:, i].to(y.dtype) + (a * y).sum(1), a.square().sum(1)

    def move(self, i: int, step: float) -> None:
        y = self._displacement()
        self._y = y + step * self._projections[..., i].to(y.dtype)

    def _displacement(self) -> Tensor:
        if self._y is None:
            raise RuntimeError("Expected a call of prepare before along and move; got none.")
        return self._y


class HessianQuadratic(BatchQuadratic):
    """Quadratic models with the Hessian, which is indefinite away from a minimum."""

    def __init__(self, network: Network, batch: Batch, derivatives: SecondDerivatives):
        super().__init__(network, batch)
        self.derivatives = derivatives

    def product(self, x: Float[Tensor, " P"], pushed: Float[Tensor, "n C 1"] | None = None) -> Float[Tensor, " P"]:  # noqa: ARG002
        """Return the mean Hessian times x."""
        return self.derivatives.products(self.batch, x[:, None])[:, 0] / len(self)

    def curvatures(self, directions: Float[Tensor, "P k"], pushed: Float[Tensor, "n C k"]) -> Float[Tensor, "n k"]:  # noqa: ARG002
        """Return each sample's second derivative along the directions."""
        return self.derivatives.quadratics(self.batch, directions)

    def curvature_matrix(
        self,
        directions: Float[Tensor, "P k"],
        pushed: Float[Tensor, "n C k"],  # noqa: ARG002
    ) -> Float[Tensor, "k k"]:
        r"""Return $\sum_n U^\top H_n U$ in double precision, from Hessian-vector products."""
        exact = accumulation_dtype(directions)
        matrix = directions.mT.to(exact) @ self.derivatives.products(self.batch, directions).to(exact)
        return (matrix + matrix.mT) / 2

    def position(self) -> "Position":
        """Return a position at the weights."""
        return _HessianPosition(self)


class _HessianPosition(Position):
    """Position kept as the displacement; each slope takes a second derivative along it."""

    def __init__(self, quadratic: HessianQuadratic):
        self._quadratic = quadratic
        self._displacement: Tensor | None = None

    def prepare(self, directions: Float[Tensor, "P k"], pushed: Float[Tensor, "n C k"] | None = None) -> None:
        pushed = self._quadratic.pushed(directions) if pushed is None else pushed
        self._directions = directions
        self._slopes = self._quadratic.slopes(pushed)
        if self._displacement is None:
            self._displacement = torch.zeros_like(directions[:, 0])

    def along(self, i: int) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        u = self._directions[:, i]
        right = torch.stack([u if self._displacement is None else self._displacement, u], dim=1)
        products = self._quadratic.derivatives.bilinears(self._quadratic.batch, u[:, None].expand(-1, 2), right)
        exact = accumulation_dtype(products)
        return self._slopes[:, i].to(exact) + products[:, 0].to(exact), products[:, 1].to(exact)

    def move(self, i: int, step: float) -> None:
        if self._displacement is not None:
            self._displacement = self._displacement + step * self._directions[:, i]


def ready_for_many_products(network: Network, batch: Batch, n_products: int) -> Network:
    """Return the network, set to linearize once per batch if that is faster for this number of products."""
    worth = len(batch) * n_products * network.n_parameters >= _MIN_WORK_FOR_TRACING
    return network.ready_for_products(batch.inputs) if worth and network.capabilities.columns else network


def batch_quadratic(
    network: Network,
    batch: Batch,
    curvature: Curvature,
    *,
    derivatives: SecondDerivatives | None = None,
) -> BatchQuadratic:
    """Return the quadratic models of a batch.

    Args:
        network: the network, at the weights of the expansion.
        batch: samples on the network's device.
        curvature: "ggn", "ef" or "hessian".
        derivatives: second derivatives to reuse with "hessian"; None: new ones.
    """
    if curvature == "hessian":
        if derivatives is None:
            derivatives = SecondDerivatives(network.selection, network.parameters, network.likelihood, batch)
        return HessianQuadratic(network, batch, derivatives)
    return RootQuadratic(network, batch, root_of(curvature, network.likelihood))


def root_of(curvature: Curvature, likelihood: Likelihood) -> OutputRoot:
    """Return the root of a GGN or an empirical Fisher."""
    return GaussNewton(likelihood) if curvature == "ggn" else EmpiricalFisher(likelihood)
