"""Which samples do what in a diagnosis."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.roots import EmpiricalFisher, GaussNewton
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.data.source import SampleSource
from debiased_laplace.data.sub_batch import SubBatch


@dataclass(frozen=True, eq=False)
class Plan:
    """Which samples do what in a draw, and what is done with them.

    Attributes:
        source: of the samples.
        network: at the weights.
        sizes: of batches, increasing.
        n_reference: samples of the unbiased values.
        n_data: N.
        kind: of curvature.
        damping: of conjugate gradients.
        compared: sizes of batches whose posteriors are compared.
        prior_precision: of these posteriors; of no use where there are none.
        seed: of everything drawn.
    """

    source: SampleSource
    network: Network
    sizes: tuple[int, ...]
    n_reference: int
    n_data: int
    kind: Literal["ggn", "ef"]
    damping: float
    compared: tuple[int, ...]
    prior_precision: float
    seed: int

    @property
    def samples_a_draw(self) -> int:
        """Samples gone through, by which progress is counted: those of a batch once for each thing done with it."""
        return sum(self.sizes) + sum(self.compared) + self.n_reference

    def order(self, draw: int) -> Int64[Tensor, " n"]:
        """All positions, in the order of a draw: batches come from its front, reference samples after the largest."""
        indices = self.source.indices
        generator = torch.Generator().manual_seed(self.seed + 1000 * draw)
        return indices[torch.randperm(len(indices), generator=generator)]

    def batch(self, order: Int64[Tensor, " n"], size: int) -> Int64[Tensor, " size"]:
        """Positions of a batch, increasing; it has all samples of the smaller ones."""
        return order[:size].sort().values

    def reference(self, order: Int64[Tensor, " n"]) -> Int64[Tensor, " m"]:
        """Positions that no batch of the draw has."""
        return order[self.sizes[-1] : self.sizes[-1] + self.n_reference].sort().values

    def curvature(self, positions: Int64[Tensor, " m"]) -> RowCurvature:
        """Of some samples, loaded and kept: an augmenting loader must not give others the second time."""
        samples = SubBatch(self.source, positions, self.network.like.device, self.seed)
        root = (GaussNewton if self.kind == "ggn" else EmpiricalFisher)(self.network.likelihood)
        return RowCurvature(self.network, samples.keeping(list(samples)), root, seed=self.seed)
