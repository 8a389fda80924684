r"""Curvature of drawn rows: one backward pass each, where the curvature is.

A sample's curvature is $J_n^\top \Lambda_n J_n = \sum_j v_{nj} v_{nj}^\top$ with the rows $v_{nj} = J_n^\top c_{nj}$ of
the cotangents $c_{nj} = \sqrt{\lambda_{nj}} q_{nj}$, from the eigenvectors of $\Lambda_n$. One forward pass gives all
$\lambda_{nj}$, and with them the size of every row before any of them is computed.

References:
    Frieze, Kannan & Vempala (2004), J. ACM 51(6), doi 10.1145/1039488.1039494 (length-squared sampling); Xu, Yang,
    Roosta-Khorasani, Ré & Mahoney (2016), arXiv 1607.00559 (sub-sampled Newton methods with such samples).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from debiased_laplace.curvature.first_pass import checked_outputs
from debiased_laplace.curvature.memory import CHUNK_BYTES
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.roots import EmpiricalFisher, OutputRoot
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.sub_batch import DrawErrors
from debiased_laplace.data.batches import Batch
from debiased_laplace.data.drawing import RowDraw
from debiased_laplace.data.inputs import Inputs
from debiased_laplace.data.source import SampleSource
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.linalg.accumulation import accumulation_dtype

_MOST_EIGENVECTORS = 128
"""Largest number of outputs whose curvature is decomposed for every sample."""

_ROUNDING = 1e-12
"""Eigenvalues of a sample's output curvature below this fraction of its largest are rounding errors."""


@dataclass(frozen=True)
class DrawnRows(OutputRoot):
    """Root with one column for each drawn row: its cotangent, which stands in for targets or noise."""

    kind: str

    def n_columns(self, n_outputs: int) -> int:  # noqa: ARG002
        """Return 1."""
        return 1

    def targets_or_noise(self, targets: Tensor, n_outputs: int, generator: torch.Generator) -> Tensor:
        """Raise, because cotangents belong to drawn rows and not to targets."""
        raise NotImplementedError("Cotangents of drawn rows are computed with the draw.")

    def columns(self, outputs: Tensor, targets_or_noise: Tensor, chosen: slice) -> Tensor:  # noqa: ARG002
        """Return the cotangent."""
        return targets_or_noise[..., None][..., chosen]

    def transposed(self, outputs: Tensor, targets_or_noise: Tensor, X: Tensor) -> Tensor:  # noqa: ARG002
        """Return the cotangent times X."""
        return targets_or_noise[..., None, :] @ X

    def product(self, outputs: Tensor, targets_or_noise: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        """Return the cotangent times its inner product with x."""
        return targets_or_noise * (targets_or_noise * x).sum(-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of all rows, from one forward pass.

    Attributes:
        scores: expected squared norm of every row, up to a factor, on the CPU.
        sizes: squared norms of the cotangents.
        loss: sum of the losses, in nats.
    """

    scores: Float[Tensor, "n r"]
    sizes: Float[Tensor, "n r"]
    loss: float


def cotangents_of(
    network: Network, root: OutputRoot, outputs: Float[Tensor, "n C"], targets: Tensor
) -> Float[Tensor, "n r C"]:
    r"""Return cotangents with $\sum_j c_{nj} c_{nj}^\top = \Lambda_n$, by decreasing norm, in double precision.

    Cotangents of eigenvalues within rounding are 0. Of many outputs, whose eigenvectors would take too long, the
    columns of the likelihood's root are taken: they are not orthogonal, and no row is null.
    """
    outputs = outputs.to(accumulation_dtype(outputs))
    if isinstance(root, EmpiricalFisher):
        return network.likelihood.gradient(outputs, targets)[:, None]
    S = network.likelihood.root(outputs, slice(None))
    if outputs.shape[1] > _MOST_EIGENVECTORS:
        return S.mT
    values, Q = torch.linalg.eigh(S @ S.mT)
    values = torch.where(values > _ROUNDING * values[:, -1:], values, 0.0)
    return (Q * values.sqrt()[:, None]).mT.flip(1)


def score_rows(network: Network, source: SampleSource, root: OutputRoot, *, seed: int, progress_bar: bool) -> Scored:
    r"""Score every row by $\|c\|^2 (1 + \|\varphi\|^2)$, the squared norm of its part in the last linear layer.

    Args:
        network: the network; without a last linear layer $\varphi$ is left out.
        source: all samples.
        root: of the GGN or the empirical Fisher.
        seed: of the loading.
        progress_bar: show progress.

    Raises:
        ValueError: if inputs, targets or outputs are not finite, or targets do not fit.
    """
    layer, sizes, features, loss = None, [], [], 0.0
    device = network.like.device
    with tqdm(total=len(source.indices), disable=not progress_bar, desc="[Scoring rows]") as bar:
        for loaded in source.batches(source.indices, seed):
            batch = loaded.to(device)
            batch.check_finite()
            if batch.weights is not None:
                raise ValueError(
                    "sampling='curvature' is not built for sample_weights; expected batches (inputs, targets), or "
                    "sampling='uniform'."
                )
            layer = _last_linear_layer(network, batch.inputs) if layer is None else layer
            outputs, squared = _outputs_and_features(network, layer, batch.inputs)
            checked_outputs(outputs, batch)
            network.likelihood.check(outputs, batch.targets)
            loss += float(network.likelihood.per_sample_loss(outputs, batch.targets).cpu().double().sum())
            parts = zip(outputs.split(_together(outputs)), batch.targets.split(_together(outputs)), strict=True)
            sizes += [cotangents_of(network, root, f, y).square().sum(2).cpu().double() for f, y in parts]
            features.append(squared.cpu().double())
            bar.update(len(batch))
    all_sizes = torch.cat(sizes)
    if network.likelihood.name == "regression":
        # rows differ little, and features say nothing about their norms
        return Scored(all_sizes, all_sizes, loss)
    return Scored(all_sizes * (1 + torch.cat(features))[:, None], all_sizes, loss)


def load_drawn(
    network: Network, source: SampleSource, draw: RowDraw, root: OutputRoot, *, seed: int
) -> tuple[SubBatch, RowCurvature]:
    r"""Load the drawn samples, and return them with the curvature $\frac1R \sum_r m_r v_r v_r^\top$, $m_r = R w_r$.

    The weights $w_r = 1 / (N' \pi_r)$ make it an unbiased estimate of the mean curvature of the N' samples scored.
    """
    chosen, owner = draw.samples.unique(return_inverse=True)
    samples = SubBatch(source, source.indices[chosen], network.like.device, seed)
    samples = samples.keeping(list(samples))
    batches: list[Batch] = []
    cotangents: list[Tensor] = []
    start = 0
    for batch in samples:
        mine = (owner >= start) & (owner < start + len(batch))
        local = owner[mine] - start
        start += len(batch)
        outputs, rows_of = network.outputs(batch.inputs), draw.rows[mine]
        for first in range(0, len(batch), _together(outputs)):
            these = (local >= first) & (local < first + _together(outputs))
            part = slice(first, first + _together(outputs))
            of_all = cotangents_of(network, root, outputs[part], batch.targets[part])
            cotangents.append(of_all[(local[these] - first).to(of_all.device), rows_of[these].to(of_all.device)])
        batches.append(batch.at(local))
    weights = len(draw) / (draw.n_scored * draw.probabilities)
    rows = SubBatch(source, source.indices[draw.samples], network.like.device, seed)
    rows = rows.keeping(batches).weighted(weights.to(network.like.dtype))
    curvature = RowCurvature(network, rows, DrawnRows(f"{root.kind}"), seed=seed)
    curvature._drawn = torch.cat(cotangents).to(network.like)
    curvature.draw = DrawErrors.of(draw.probabilities)
    return samples, curvature


def _together(outputs: Tensor) -> int:
    """Return how many samples' output curvatures, (C, C) each, are computed at once."""
    return max(1, CHUNK_BYTES // (4 * 8 * outputs.shape[1] ** 2))


def _last_linear_layer(network: Network, inputs: Inputs) -> nn.Linear | bool:
    """Return the linear layer that computes the outputs; False if there is none."""
    called: list[tuple[nn.Linear, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda m, arguments, output: called.append((m, output)))  # noqa: ARG005
        for module in network.selection.model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        outputs = network.outputs(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if called and called[-1][1].shape == outputs.shape and torch.equal(called[-1][1], outputs):
        return called[-1][0]
    return False


def _outputs_and_features(network: Network, layer: nn.Linear | bool, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the outputs (n, C), and the squared norm of each sample's input to the last linear layer."""
    if isinstance(layer, bool):
        outputs = network.outputs(inputs)
        return outputs, torch.zeros_like(outputs[:, 0])
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda m, arguments, output: seen.append(arguments[0]))  # noqa: ARG005
    try:
        outputs = network.outputs(inputs)
    finally:
        handle.remove()
    return outputs, seen[-1].detach().square().sum(-1)
