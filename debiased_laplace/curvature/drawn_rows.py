r"""Curvature of drawn rows: one backward pass each, where the curvature is.

A sample's curvature is $J_n^\top \Lambda_n J_n = \sum_j v_{nj} v_{nj}^\top$ with the rows $v_{nj} = J_n^\top c_{nj}$ of
the cotangents $c_{nj}$, $\sum_j c_{nj} c_{nj}^\top = \Lambda_n$. One forward pass gives the size of every row before
any of them is computed.

References:
    Frieze, Kannan & Vempala (2004), J. ACM 51(6), doi 10.1145/1039488.1039494 (length-squared sampling); Xu, Yang,
    Roosta-Khorasani, Ré & Mahoney (2016), arXiv 1607.00559 (sub-sampled Newton methods with such samples).
"""

import warnings
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from tqdm import tqdm

from debiased_laplace.curvature.first_pass import checked_outputs, with_target_weights
from debiased_laplace.curvature.hessian_curvature import HessianCurvature
from debiased_laplace.curvature.linear_layer import features_of, output_layer
from debiased_laplace.curvature.memory import CHUNK_BYTES
from debiased_laplace.curvature.network import Network
from debiased_laplace.curvature.output_rows import cotangents, n_slots, row_sizes
from debiased_laplace.curvature.roots import GaussNewton, OutputRoot
from debiased_laplace.curvature.row_curvature import RowCurvature
from debiased_laplace.curvature.second_derivatives import SecondDerivatives
from debiased_laplace.curvature.sub_batch import DrawErrors, SubBatchCurvature
from debiased_laplace.data.batches import Batch, concatenated, sample_hashes
from debiased_laplace.data.drawing import RowDraw, RowDrawer
from debiased_laplace.data.source import SampleSource, SampleStream
from debiased_laplace.data.sub_batch import SubBatch
from debiased_laplace.fit_checkpoint import Intervals
from debiased_laplace.processes import Processes

Scores = Literal["norms", "equal"]
"""What rows are drawn in proportion to: their squared norms, as far as one forward pass tells; or nothing."""

_MOST_TOGETHER = 256
"""Largest number of rows in a batch."""

_AT_RANDOM = 256
"""Number of samples that are held whether or not a row was drawn of them."""


@dataclass(frozen=True)
class DrawnCotangents(OutputRoot):
    """Root with one column for each drawn row: its cotangent, which stands in for targets or noise.

    With positions, that of the row's position alone, and then the number of the position.
    """

    kind: str
    has_positions: bool = False

    def n_columns(self, n_outputs: int) -> int:  # noqa: ARG002
        """Return 1."""
        return 1

    def targets_or_noise(self, targets: Tensor, n_outputs: int, generator: torch.Generator) -> Tensor:
        """Raise, because cotangents belong to drawn rows and not to targets."""
        raise NotImplementedError("Cotangents of drawn rows are computed with the draw.")

    def columns(self, outputs: Tensor, targets_or_noise: Tensor, chosen: slice) -> Tensor:
        """Return the cotangent."""
        return self._cotangents(outputs, targets_or_noise)[..., None][..., chosen]

    def transposed(self, outputs: Tensor, targets_or_noise: Tensor, X: Tensor) -> Tensor:
        """Return the cotangent times X."""
        return self._cotangents(outputs, targets_or_noise)[..., None, :].to(X.dtype) @ X

    def product(self, outputs: Tensor, targets_or_noise: Tensor, x: Tensor) -> Tensor:
        """Return the cotangent times its inner product with x."""
        c = self._cotangents(outputs, targets_or_noise)
        return c * (c * x).sum(-1, keepdim=True)

    def _cotangents(self, outputs: Float[Tensor, "*n C"], targets_or_noise: Tensor) -> Float[Tensor, "*n C"]:
        if not self.has_positions:
            return targets_or_noise
        c, t = targets_or_noise[..., :-1], targets_or_noise[..., -1:]
        T = outputs.shape[-1] // c.shape[-1]
        is_own = torch.arange(T, device=t.device) == t
        return (is_own[..., None] * c[..., None, :]).flatten(-2)


@dataclass(frozen=True, eq=False)
class Scored:
    """All samples that were scored.

    Attributes:
        positions: in the data set, or numbers as they came.
        hashes: of input and target.
        weights: on the CPU; None if all are 1.
        loss: sum of the weighted losses, in nats.
    """

    positions: Int64[Tensor, " n"]
    hashes: Int64[Tensor, " n"]
    weights: Float[Tensor, " n"] | None
    loss: float

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def weight(self) -> float:
        """Sum of the weights."""
        return len(self) if self.weights is None else float(self.weights.sum())


@dataclass(frozen=True, eq=False)
class ScoredRows:
    r"""Samples with the scores of their rows.

    Attributes:
        batch: on the network's device, with weights that include those of the targets, and the features of a last
            linear layer that all parameters belong to.
        outputs: of the network.
        sizes: $m \|c\|^2$ of every row, in double precision on the CPU; 0 for slots without a row.
        scores: likewise.
    """

    batch: Batch
    outputs: Float[Tensor, "n C"]
    sizes: Float[Tensor, "n r"]
    scores: Float[Tensor, "n r"]


class RowScorer:
    r"""Score of every row by one forward pass, $m \|c\|^2 (1 + \|\varphi\|^2)$.

    It is the squared norm of the row's part in the last linear layer with input $\varphi$, times the sample's weight m.
    Likelihoods without labels have $m \|c\|^2$ alone, as have networks without such a layer: rows of a regression
    differ little, and features say nothing about their norms. With equal scores, every row that is not 0 has m.
    """

    def __init__(self, network: Network, root: OutputRoot, first: Batch, scores: Scores = "norms"):
        self.network, self.root, self._scores = network, root, scores
        self._has_lengths = scores == "norms" and network.likelihood.gives_probabilities
        self._layer: nn.Linear | None = None
        if network.linear_layer is not None:
            self._layer = network.linear_layer.layer
        elif self._has_lengths:
            self._layer = output_layer(network.selection, network.parameters, first.inputs)

    def scored(self, loaded: Batch) -> ScoredRows:
        """Score the rows of samples.

        Raises:
            ValueError: if inputs, targets, weights or outputs are not finite, or targets do not fit.
        """
        batch = loaded.to(self.network.like.device)
        batch.check_finite()
        network = self.network
        found = None
        if self._layer is not None:
            found = features_of(network.selection, network.parameters, self._layer, batch.inputs)
            if found is None:
                raise ValueError(f"Expected {self._layer} to give the outputs of all samples, as of the first ones.")
        features, outputs = (None, network.outputs(batch.inputs)) if found is None else found
        checked_outputs(outputs, batch)
        self.network.likelihood.check(outputs, batch.targets)
        weighted = with_target_weights(batch, self.network.likelihood)
        sizes = weighted.scaled(row_sizes(self.root, outputs, batch.targets)).cpu().double()
        scores = sizes
        if self._scores == "equal":
            scores = (sizes > 0).double()
            if weighted.weights is not None:
                scores = scores * weighted.weights.cpu().double()[:, None]
        elif features is not None and self._has_lengths:
            scores = sizes * (1 + features.cpu().double().square().sum(1))[:, None]
        if self.network.linear_layer is not None:
            weighted = replace(weighted, features=features)
        return ScoredRows(weighted, outputs, sizes, scores)


class RowSampler:
    """Rows drawn from samples in one pass, by the scores of `RowScorer`.

    Only samples with drawn rows, and a few random ones, are held, as they were loaded. Without a root (a Hessian has
    none) samples are drawn as a whole, by the sum of the scores of the GGN's rows: as many as have `n_rows` of them.
    """

    def __init__(
        self,
        network: Network,
        root: OutputRoot | None,
        first: Batch,
        *,
        n_rows: int,
        seeds: tuple[int, ...],
        scores: Scores = "norms",
    ):
        self.network = network
        self.root = GaussNewton(network.likelihood) if root is None else root
        self.of_samples = root is None
        if self.of_samples:
            n_rows = max(2, n_rows // network.n_outputs)
        self._scorer, self._scores = RowScorer(network, self.root, first, scores), scores
        self.drawers = [RowDrawer(n_rows, seed) for seed in seeds]
        self._held: list[tuple[Tensor, Batch]] = []
        self._n_held = 0
        self._scored: list[tuple[Tensor, Tensor, Tensor | None]] = []
        # number and hash of the samples with the smallest hashes, which are as good as random numbers
        self._at_random = torch.zeros(2, 0, dtype=torch.int64)
        self._loss = 0.0

    def read(
        self, batches: Iterable[tuple[Int64[Tensor, " b"], Batch]], *, total: int | None, progress_bar: bool
    ) -> None:
        """Score samples, and draw from all that were read.

        Args:
            batches: positions and samples.
            total: number of samples, for the progress bar; None: not known.
            progress_bar: show progress.

        Raises:
            ValueError: if inputs, targets, weights or outputs are not finite, or targets do not fit.
        """
        intervals, checkpoint = Intervals(), self.network.checkpoint
        n_before = self.drawers[0].population.n_samples
        with tqdm(total=total, initial=n_before, disable=not progress_bar, desc="[Scoring rows]") as bar:
            for positions, batch in batches:
                for some, chunk in zip(positions.split(self._together), batch.chunks(self._together), strict=True):
                    self._add(some, chunk)
                bar.update(len(batch))
                bar.set_postfix_str(f"{len(self.drawers[0])} rows drawn")
                if checkpoint:
                    intervals.keep(self._keep)
        if checkpoint:
            self._keep()

    def resumed(
        self, own: SampleSource | SampleStream, numbered: Iterator[tuple[Int64[Tensor, " b"], Batch]], seed: int
    ) -> Iterator[tuple[Int64[Tensor, " b"], Batch]]:
        """Take over what an interrupted fit has read, and return the samples that it has not.

        Args:
            own: samples that this process reads.
            numbered: the same, with their positions.
            seed: of loading them.
        """
        state = self.network.checkpoint.read(self._name, self.network.like.device)
        if state is None:
            return numbered
        self.__dict__.update(state)
        if isinstance(own, SampleStream):
            return _skipping(numbered, self.scored.hashes)
        return replace(own, indices=own.indices[len(self.scored) :]).numbered(seed)

    def _keep(self) -> None:
        kept = ("drawers", "_held", "_n_held", "_scored", "_at_random", "_loss")
        self.network.checkpoint.write(self._name, {name: self.__dict__[name] for name in kept})

    @property
    def _name(self) -> str:
        processes = self.network.processes
        return f"samples scored by {self._scores}, process {processes.rank} of {processes.size}"

    def merge(self, processes: Processes, *, by_position: bool) -> None:
        """Become the sampler of all samples that processes have read, each some of them.

        Args:
            processes: that have read.
            by_position: whether samples have positions in one data set, which order them; else they are numbered by
                process as they came.
        """
        if not processes.several:
            return
        nothing = torch.zeros(0, dtype=torch.int64)
        own = self.scored if self._scored else Scored(nothing, nothing, None, 0.0)
        mine = own, self.drawers, self._held, self._at_random, self._loss
        parts = processes.gathered("drawn rows", mine, self.network.like.device)
        if not by_position:
            _check_distinct([part[0].hashes for part in parts])
        sizes = [len(part[0]) for part in parts]
        offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        positions = torch.cat([part[0].positions for part in parts])
        order = positions.argsort() if by_position else torch.arange(len(positions))
        number = order.argsort()
        renumbered = [number[start : start + size] for start, size in zip(offsets, sizes, strict=True)]
        hashes = torch.cat([part[0].hashes for part in parts])[order]
        weights = None
        if any(part[0].weights is not None for part in parts):
            own_weights = [torch.ones(len(s)).double() if s.weights is None else s.weights for s, *_ in parts]
            weights = torch.cat(own_weights)[order]
        self._scored = [(positions[order] if by_position else order, hashes, weights)]
        self._loss = sum(part[4] for part in parts)
        self.drawers = [RowDrawer.merged([part[1][i] for part in parts], renumbered) for i in range(len(self.drawers))]
        held = [(own[n], b) for part, own in zip(parts, renumbered, strict=True) for n, b in part[2]]
        self._held = sorted(held, key=lambda pair: int(pair[0][0]))
        candidates = [torch.stack([own[part[3][0]], part[3][1]]) for part, own in zip(parts, renumbered, strict=True)]
        at_random = torch.cat(candidates, dim=1)
        self._at_random = at_random[:, at_random[1].argsort()[:_AT_RANDOM]]
        self._n_held = sum(len(n) for n, _ in self._held)
        self._let_go()

    def alone(self) -> None:
        """Let go of the other processes, so that later passes are this one's own."""
        self.network = self._scorer.network = self.network.alone()

    @property
    def _together(self) -> int:
        """Number of samples that are scored at once: with positions, they may have millions of rows."""
        network = self.network
        if network.layout is None:
            return 2**62
        n_rows = network.n_outputs // network.n_classes * n_slots(network.n_classes)
        return max(1, CHUNK_BYTES // (8 * n_rows))

    def _add(self, positions: Int64[Tensor, " b"], loaded: Batch) -> None:
        scored = self._scorer.scored(loaded)
        batch, outputs, sizes, scores = scored.batch, scored.outputs, scored.sizes, scored.scores
        losses = batch.scaled(self.network.likelihood.per_sample_loss(outputs, batch.targets))
        self._loss += float(losses.cpu().double().sum())
        if self.of_samples:
            sizes, scores = sizes.sum(1, keepdim=True), scores.sum(1, keepdim=True)
        hashes = sample_hashes(loaded)

        def attach(samples: Int64[Tensor, " m"], rows: Int64[Tensor, " m"]) -> Tensor:
            if self.of_samples:
                return outputs.new_zeros(len(samples), 0)
            samples, rows = samples.to(outputs.device), rows.to(outputs.device)
            found = cotangents(self.root, outputs, batch.targets, samples, rows)
            if batch.weights is not None:
                found = found * batch.weights[samples].to(found).sqrt()[:, None]
            if batch.features is not None:
                found = torch.cat([found, batch.features[samples].to(found)], dim=1)
            return found.to(self.network.like)

        start = self.drawers[0].population.n_samples
        self.drawers = [drawer.adding(scores, sizes, hashes, attach) for drawer in self.drawers]
        weights = None if batch.weights is None else batch.weights.cpu().double()
        self._scored.append((positions, hashes, weights))
        numbers = torch.arange(start, start + len(batch))
        candidates = torch.cat([self._at_random, torch.stack([numbers, hashes])], dim=1)
        self._at_random = candidates[:, candidates[1].argsort()[:_AT_RANDOM]]
        new = torch.isin(numbers, self._needed())
        if bool(new.any()):
            self._held.append((numbers[new], loaded.at(new.nonzero().flatten()).weighted(None)))
            self._n_held += int(new.sum())
        if self._n_held > 2 * len(self._needed()) + _MOST_TOGETHER:
            self._let_go()

    def _needed(self) -> Int64[Tensor, " m"]:
        """Return the numbers of the samples that some row was drawn of, and of those held at random."""
        drawn = [drawer.held.samples for drawer in self.drawers if drawer.held is not None]
        return torch.cat([*drawn, self._at_random[0]]).unique()

    def _let_go(self) -> None:
        needed = self._needed()
        held = [(numbers, torch.isin(numbers, needed), batch) for numbers, batch in self._held]
        self._held = [(n[stay], batch.at(stay.nonzero().flatten())) for n, stay, batch in held if bool(stay.any())]
        self._n_held = sum(len(numbers) for numbers, _ in self._held)

    def continued(self, network: Network, *, empty: bool) -> "RowSampler":
        """Return a sampler that goes on from here and leaves this one as it is.

        Args:
            network: the same, as it is shared now.
            empty: whether the samples read so far are left out, as another process has them.
        """
        other = object.__new__(RowSampler)
        other.__dict__.update(self.__dict__)
        other.drawers, other._held, other._scored = list(self.drawers), list(self._held), list(self._scored)
        other._scorer = copy(self._scorer)
        other.network = other._scorer.network = network
        if empty:
            other.drawers = [RowDrawer(drawer.n_rows, drawer.seed) for drawer in self.drawers]
            other._held, other._n_held, other._scored, other._loss = [], 0, [], 0.0
            other._at_random = self._at_random[:, :0]
        return other

    @property
    def scored(self) -> Scored:
        """All samples read so far."""
        positions = torch.cat([part[0] for part in self._scored])
        hashes = torch.cat([part[1] for part in self._scored])
        weights = None
        if any(part[2] is not None for part in self._scored):
            weights = torch.cat([torch.ones(len(p)).double() if w is None else w for p, _, w in self._scored])
        # joined once
        self._scored = [(positions, hashes, weights)]
        return Scored(positions, hashes, weights, self._loss)

    def drawn(self, n_rows: int | None = None, *, which: int = 0) -> "DrawnRows":
        """Return the drawn rows, those of equal samples as one with the sum of their weights.

        Args:
            n_rows: expected number of rows, at most that of the sampler; None: its own.
            which: number of the seed.
        """
        draw, probabilities = self.drawers[which].drawn(n_rows)
        scored = self.scored
        if not self.of_samples:
            draw, probabilities = _merged(draw, probabilities, scored, self.network.n_classes)
        return DrawnRows(self, draw, probabilities, self.drawers[which].expected(n_rows), scored)

    def random_samples(self, n: int) -> list[Batch]:
        """Return up to n samples, at most 256, chosen independently of their curvature."""
        return [batch for _, batch in self.samples(self._at_random[0, :n].sort().values)]

    def samples(self, numbers: Int64[Tensor, " m"]) -> list[tuple[Int64[Tensor, " b"], Batch]]:
        """Return held samples by their increasing numbers, in batches."""
        found, start = [], 0
        held = [(n, torch.isin(n, numbers), batch) for n, batch in self._held]
        parts = [(n[stay], batch.at(stay.nonzero().flatten())) for n, stay, batch in held if bool(stay.any())]
        for batch in concatenated(batch for _, batch in parts):
            for chunk in batch.chunks(_MOST_TOGETHER):
                found.append((numbers[start : start + len(chunk)], chunk))
                start += len(chunk)
        return found


@dataclass(frozen=True, eq=False)
class DrawnRows:
    """Rows drawn from the scored samples.

    Attributes:
        sampler: holds the samples.
        draw: rows, with their cotangents attached, and then the features of a last linear layer.
        probabilities: inclusion probability of each.
        expected: expected number of rows.
        scored: all samples.
    """

    sampler: RowSampler
    draw: RowDraw
    probabilities: Float[Tensor, " R"]
    expected: int
    scored: Scored

    def __len__(self) -> int:
        return len(self.draw)

    # Models often cannot be copied or pickled: copies share the rows, a pickle has None.
    def __deepcopy__(self, memo: dict[int, Any]) -> "DrawnRows":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()

    @property
    def positions(self) -> Int64[Tensor, " R"]:
        """Position of each row's sample in the data set."""
        return self.scored.positions[self.draw.samples]

    def curvature(self, *, progress_bar: bool = False) -> SubBatchCurvature:
        r"""Return the curvature $\frac1R \sum_r R w_r v_r v_r^\top$ of the rows.

        The weights $w_r = 1 / (N' \pi_r)$ make it an unbiased estimate of the mean curvature of the samples scored,
        whose weights sum to N'.
        """
        network, draw = self.sampler.network, self.draw
        C = network.n_classes
        batches = []
        for numbers, batch in self.sampler.samples(draw.samples.unique()):
            # the rows of these samples, each with a copy of its sample
            mine = torch.isin(draw.samples, numbers).nonzero().flatten()
            for chosen in mine.split(_MOST_TOGETHER):
                owners = torch.searchsorted(numbers, draw.samples[chosen])
                rows = batch.at(owners).to(network.like.device)
                if network.linear_layer is not None:
                    rows = replace(rows, features=draw.attached[chosen.to(draw.attached.device), C:].to(network.like))
                batches.append(rows)
        weights = len(draw) / (self.scored.weight * self.probabilities)
        samples = SubBatch(None, self.positions, network.like.device, 0, tuple(batches), weights.to(network.like.dtype))
        errors = DrawErrors.of(self.probabilities)
        if self.sampler.of_samples:
            if self.scored.weights is not None:
                weights = weights * self.scored.weights[draw.samples]
            second = SecondDerivatives(network.selection, network.parameters, network.likelihood, batches[0].first(8))
            samples = samples.weighted(weights.to(network.like.dtype))
            return HessianCurvature(network, samples, second, draw=errors, progress_bar=progress_bar)
        found, has_positions = draw.attached[:, :C].to(network.like), network.layout is not None
        if has_positions:
            found = torch.cat([found, (draw.rows // n_slots(C)).to(found)[:, None]], dim=1)
        return RowCurvature(
            network,
            samples,
            DrawnCotangents(self.sampler.root.kind, has_positions),
            targets_or_noise=found,
            draw=errors,
            progress_bar=progress_bar,
        )


def _skipping(
    numbered: Iterator[tuple[Int64[Tensor, " b"], Batch]], read: Int64[Tensor, " n"]
) -> Iterator[tuple[Int64[Tensor, " b"], Batch]]:
    """Yield all samples of a stream but the first ones, given their hashes.

    Raises:
        ValueError: if they come in another order, or are others.
    """
    n = len(read)
    for positions, batch in numbered:
        known = positions < n
        if not torch.equal(sample_hashes(batch)[known], read[positions[known]]):
            raise ValueError(
                "The stream yields other samples, or another order, than the interrupted fit has read; expected the "
                "same, or another checkpoint_dir."
            )
        new = (positions >= n).nonzero().flatten()
        if len(new):
            yield positions[new], batch.at(new)


def _check_distinct(hashes: list[Int64[Tensor, " _n"]]) -> None:
    """Check that processes have read samples of their own.

    Raises:
        ValueError: if more than half of the samples of a process are also those of another.

    Warns:
        UserWarning: if some are.
    """
    for rank, own in enumerate(hashes):
        others = torch.cat([*hashes[:rank], *hashes[rank + 1 :]])
        n = int(torch.isin(own, others).sum())
        if 2 * n > len(own):
            raise ValueError(
                f"Expected a stream of its own in each process; {n} of the {len(own)} samples of process {rank} are "
                "also those of another. A torch DataLoader over a data set with positions is shared out by them; of "
                "any other iterable, each process yields its part."
            )
        if n:
            warnings.warn(
                f"{n} of the {len(own)} samples of process {rank} are also those of another, and count in both.",
                stacklevel=2,
            )


def _nothing() -> None:
    return None


def _merged(
    draw: RowDraw, probabilities: Float[Tensor, " R"], scored: Scored, n_outputs: int
) -> tuple[RowDraw, Float[Tensor, " merged"]]:
    """Merge the rows of equal samples, whose random numbers are the same, into one with the sum of their weights."""
    keys = torch.stack([scored.hashes[draw.samples], draw.rows], dim=1)
    kinds, kind = keys.unique(dim=0, return_inverse=True)
    if len(kinds) == len(keys):
        return draw, probabilities
    order = torch.arange(len(keys))
    first = order.new_full((len(kinds),), len(keys)).scatter_reduce(0, kind, order, "amin")
    weights = torch.ones(len(scored)).double() if scored.weights is None else scored.weights
    own = weights[draw.samples]
    together = own.new_zeros(len(kinds)).index_add(0, kind, own)
    stay = first[kind] == order
    draw = draw.at(stay)
    factors = (together[kind] / own)[stay].sqrt()
    attached = draw.attached.clone()
    attached[:, :n_outputs] *= factors.to(attached)[:, None]
    return replace(draw, attached=attached), probabilities[stay]
