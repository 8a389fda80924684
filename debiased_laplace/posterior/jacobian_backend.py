"""Jacobians under the names of laplace-torch's backends."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from debiased_laplace.curvature.as_found import leaves_as_found

if TYPE_CHECKING:
    from debiased_laplace.posterior.laplace import DebiasedParametricLaplace


@dataclass(frozen=True, eq=False)
class JacobianBackend:
    """Jacobians of a fitted posterior's network, of the width P that `functional_variance` takes."""

    posterior: "DebiasedParametricLaplace"

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.posterior.model

    @leaves_as_found(waits=True)
    def chunks(
        self, x: Tensor | Mapping[str, Tensor], enable_backprop: bool = False
    ) -> list[tuple[Float[Tensor, "_ C P"], Float[Tensor, "_ C"]]]:
        """Return Jacobians and outputs of some inputs at a time, as many as fit into a chunk of memory."""
        inputs, _ = self.posterior._check_request(x, "glm", 1, None)
        # a list: a suspended generator would leave the model in evaluation mode
        with self.posterior._predictive(inputs) as predictive:
            return list(predictive.network.jacobians(predictive.inputs, create_graph=enable_backprop))

    def jacobians(
        self, x: Tensor | Mapping[str, Tensor], enable_backprop: bool = False
    ) -> tuple[Float[Tensor, "n C P"], Float[Tensor, "n C"]]:
        """Return Jacobians with respect to the parameters of the posterior, and outputs.

        Args:
            x: inputs, as of the posterior.
            enable_backprop: keep the graph.
        """
        parts = self.chunks(x, enable_backprop)
        return torch.cat([J for J, _ in parts]), torch.cat([f for _, f in parts])

    @leaves_as_found(waits=True)
    def outputs(self, x: Tensor | Mapping[str, Tensor]) -> Float[Tensor, "n C"]:
        """Return the outputs of the network at the mean."""
        inputs, _ = self.posterior._check_request(x, "glm", 1, None)
        with self.posterior._predictive(inputs) as predictive:
            return predictive.network.outputs(predictive.inputs)

    def last_layer_jacobians(
        self, x: Tensor | Mapping[str, Tensor], enable_backprop: bool = False
    ) -> tuple[Float[Tensor, "n C P"], Float[Tensor, "n C"]]:
        """Return Jacobians with respect to the last layer, and outputs.

        Raises:
            ValueError: if the posterior is over other parameters than a layer's.
        """
        if self.posterior.selection.last_layer is None:
            raise ValueError(
                f"Expected a posterior of the last layer; this one is over {self.posterior.selection.subset}. Take "
                "`jacobians`."
            )
        return self.jacobians(x, enable_backprop)
