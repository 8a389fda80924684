r"""Per-sample quadratic models whose curvature is that of rows drawn where the curvature is.

Losses and gradients are those of all samples. Drawn with probability $\pi_r$, a row stands for $1 / \pi_r$ rows: the
curvature that the drawn rows of a sample give it, zero for most samples, has the sample's curvature as its mean.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.curvature.drawn_rows import RowSampler
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.roots import OutputRoot
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.data.batches import Batch
from debiased_laplace.linalg.accumulation import accumulation_dtype
from debiased_laplace.linalg.row_matrix import RowMatrix
from debiased_laplace.quadratics.batch_quadratic import BatchQuadratic, Position


class DrawnRowsQuadratic(BatchQuadratic):
    r"""Quadratic models with the curvature $\sum_{r \in n} \hat v_r \hat v_r^\top$ of drawn rows for each sample.

    The rows of equal samples are all given to the first of them.

    Attributes:
        rows: (R, 1, P).
        scale: factor of the rows that makes them $\hat v_r$.
        samples: sample of each row.

    Raises:
        ValueError: if no row was drawn although some have a curvature, or the rows do not fit into memory.
    """

    def __init__(self, network: Network, batch: Batch, root: OutputRoot, *, n_rows: int, seed: int):
        super().__init__(network, batch)
        sampler = RowSampler(network, root, batch.first(8), n_rows=n_rows, seeds=(seed,))
        sampler.read([(torch.arange(len(batch)), batch)], total=None, progress_bar=False)
        drawn = sampler.drawn()
        self.samples = drawn.positions.to(network.like.device)
        self.rows, self.scale = RowMatrix((network.like.new_zeros(0, 1, network.n_parameters),)), 1.0
        if len(drawn) == 0:
            if sampler.drawers[0].population.n_positive:
                raise ValueError(f"n_rows={n_rows} drew no row of {len(batch)} samples; expected more rows.")
            return
        curvature = drawn.curvature()
        assert isinstance(curvature, RowCurvature)  # for the type checker
        if curvature.bytes_of_rows > network.available_memory:
            raise ValueError(
                f"{len(drawn)} drawn rows take {curvature.bytes_of_rows / 2**30:.2g} GiB, and "
                f"{network.available_memory / 2**30:.2g} GiB may be used; expected a smaller n_rows."
            )
        self.rows = curvature.stacked_rows().rows
        # its mean is over rows, and the samples need not have a mean weight of 1
        self.scale = (drawn.scored.weight / len(drawn)) ** 0.5

    def projections(self, directions: Float[Tensor, "P k"]) -> Float[Tensor, "R k"]:
        r"""Return $\hat v_r^\top u_i$, whose squares are curvatures of the rows' samples."""
        return self.scale * self.rows.projected(directions)[:, 0]

    def of_samples(self, of_rows: Float[Tensor, "R *k"]) -> Float[Tensor, "n *k"]:
        """Return the sums over the rows of each sample, in double precision."""
        exact = accumulation_dtype(of_rows)
        zeros = of_rows.new_zeros(len(self), *of_rows.shape[1:], dtype=exact)
        return zeros.index_add_(0, self.samples, of_rows.to(exact))

    def product(self, x: Float[Tensor, " P"], pushed: Float[Tensor, "n C 1"] | None = None) -> Float[Tensor, " P"]:  # noqa: ARG002
        """Return the mean curvature times x, without a pass over the network."""
        return self.rows.combined(self.scale * self.projections(x[:, None]))[:, 0] / len(self)

    def curvatures(self, directions: Float[Tensor, "P k"], pushed: Float[Tensor, "n C k"]) -> Float[Tensor, "n k"]:  # noqa: ARG002
        """Return the curvature that each sample's drawn rows give it along the directions."""
        return self.of_samples(self.projections(directions).square())

    def curvature_matrix(
        self,
        directions: Float[Tensor, "P k"],
        pushed: Float[Tensor, "n C k"],  # noqa: ARG002
    ) -> Float[Tensor, "k k"]:
        r"""Return $\sum_n U^\top H_n U$ in double precision."""
        V = self.projections(directions).to(accumulation_dtype(directions))
        return V.mT @ V

    def position(self) -> Position:
        """Return a position at the weights."""
        return _DrawnPosition(self)


class _DrawnPosition(Position):
    """Position kept as the rows' projections of the displacement."""

    def __init__(self, quadratic: DrawnRowsQuadratic):
        self._quadratic = quadratic
        self._y = quadratic.network.like.new_zeros(len(quadratic.samples), dtype=accumulation_dtype(quadratic.losses))

    def prepare(self, directions: Float[Tensor, "P k"], pushed: Float[Tensor, "n C k"] | None = None) -> None:
        pushed = self._quadratic.pushed(directions) if pushed is None else pushed
        self._slopes = self._quadratic.slopes(pushed).to(self._y.dtype)
        self._projections = self._quadratic.projections(directions).to(self._y.dtype)

    def along(self, i: int) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        a = self._projections[:, i]
        moved, curvatures = self._quadratic.of_samples(torch.stack([a * self._y, a.square()], dim=1)).unbind(1)
        return self._slopes[:, i] + moved, curvatures

    def move(self, i: int, step: float) -> None:
        self._y = self._y + step * self._projections[:, i]
