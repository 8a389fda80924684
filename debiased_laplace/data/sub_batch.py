"""A sub-batch: batches of a fixed set of samples, for any number of passes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from debiased_laplace.data.batches import Batch
from debiased_laplace.data.source import SampleSource


@dataclass(frozen=True, eq=False)
class SubBatch:
    """Iterable over the batches of a fixed set of samples, held in memory or loaded again at each pass.

    Attributes:
        source: source of the samples; None where they are held in memory and cannot be loaded again.
        indices: positions in the data set of the source.
        device: device of the batches.
        seed: seed of the loading (augmentations, workers).
        kept: the batches, if held in memory; else None.
        weights: weight of each sample; None: as loaded.
    """

    source: SampleSource | None
    indices: Int64[Tensor, " n"]
    device: torch.device
    seed: int
    kept: tuple[Batch, ...] | None = None
    weights: Float[Tensor, " n"] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Batch]:
        loaded: Iterable[Batch] = self.kept or ()
        if self.kept is None and self.source is not None:
            loaded = self.source.batches(self.indices, self.seed)
        start = 0
        for batch in loaded:
            if self.weights is not None:
                batch = batch.weighted(self.weights[start : start + len(batch)])
            yield batch.to(self.device)
            start += len(batch)

    @classmethod
    def of(cls, batch: Batch) -> "SubBatch":
        """Return the samples of one batch, held in memory."""
        return cls(None, torch.arange(len(batch)), batch.targets.device, 0, (batch,))

    def at(self, positions: Int64[Tensor, " m"]) -> "SubBatch":
        """Return the sub-batch of the samples at these positions, counted within this one and increasing."""
        weights = None if self.weights is None else self.weights[positions]
        part = replace(self, indices=self.indices[positions], kept=None, weights=weights)
        if self.kept is None:
            return part
        batches, start = [], 0
        for batch in self.kept:
            inside = positions[(positions >= start) & (positions < start + len(batch))] - start
            batches += [batch.at(inside)] if len(inside) else []
            start += len(batch)
        return part.keeping(batches)

    def keeping(self, batches: list[Batch]) -> "SubBatch":
        """Return the same samples held in memory."""
        return replace(self, kept=tuple(batches))

    def weighted(self, weights: Float[Tensor, " n"]) -> "SubBatch":
        """Return the same samples with other weights."""
        return replace(self, weights=weights)
