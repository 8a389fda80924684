"""The samples of one sub-batch, to be gone through as often as needed."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from debiased_laplace.data.batches import Batch
from debiased_laplace.data.source import SampleSource


@dataclass(frozen=True, eq=False)
class Samples:
    """Batches of a fixed set of samples, held in memory or loaded anew at each pass.

    Attributes:
        source: where they are loaded from.
        indices: their positions in the source's data set.
        device: where batches are moved to.
        seed: of the loading (augmentations, workers).
        kept: the batches, if they were kept.
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

    def at(self, positions: Int64[Tensor, " m"]) -> "Samples":
        """Those at these positions, increasing, among the samples."""
        chosen = Samples(self.source, self.indices[positions], self.device, self.seed)
        if self.kept is None:
            return chosen
        parts, start = [], 0
        for batch in self.kept:
            inside = positions[(positions >= start) & (positions < start + len(batch))] - start
            parts += [batch.at(inside)] if len(inside) else []
            start += len(batch)
        return chosen.keeping(parts)

    def keeping(self, batches: list[Batch]) -> "Samples":
        """The same samples, held in memory."""
        return Samples(self.source, self.indices, self.device, self.seed, tuple(batches))
