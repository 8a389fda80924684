"""A sub-batch: batches of a fixed set of samples, for any number of passes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from debiased_laplace.data.batches import Batch
from debiased_laplace.data.source import SampleSource


@dataclass(frozen=True, eq=False)
class SubBatch:
    """Iterable over the batches of a fixed set of samples, held in memory or loaded again at each pass.

    Attributes:
        source: source of the samples.
        indices: positions in the data set of the source.
        device: device of the batches.
        seed: seed of the loading (augmentations, workers).
        kept: the batches, if held in memory; else None.
    """

    source: SampleSource
    indices: Int64[Tensor, " n"]
    device: torch.device
    seed: int
    kept: tuple[Batch, ...] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Batch]:
        loaded = self.source.batches(self.indices, self.seed) if self.kept is None else self.kept
        for batch in loaded:
            yield batch.to(self.device)

    def at(self, positions: Int64[Tensor, " m"]) -> "SubBatch":
        """Return the sub-batch of the samples at these positions, counted within this one and increasing."""
        part = SubBatch(self.source, self.indices[positions], self.device, self.seed)
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
        return SubBatch(self.source, self.indices, self.device, self.seed, tuple(batches))
