"""Samples at hand: those that were read, and those that still can be."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from debiased_laplace.data.batches import Batch, sample_hashes
from debiased_laplace.data.randomness import undisturbed_randomness
from debiased_laplace.data.source import SampleSource


@dataclass(frozen=True, eq=False)
class Pool:
    """All samples that loaders have yielded so far, and what became of them.

    A pool is not written into a pickle, since data sets and collate functions often cannot be.

    Attributes:
        source: of all samples.
        read: positions of those that an estimate was made of, increasing.
        fresh: positions of those that the last loader adds, increasing.
        n_data: size N of the data set that the likelihood stands for, as it was given; None: all samples of the pool.
    """

    source: SampleSource
    read: Int64[Tensor, " r"]
    fresh: Int64[Tensor, " f"]
    n_data: int | None

    @classmethod
    def of(cls, source: SampleSource, n_data: int | None) -> "Pool":
        """Samples of which none was read."""
        return cls(source, source.indices[:0], source.indices, n_data)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pool":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _not_pickled, ()

    @property
    def size(self) -> int:
        """N."""
        return len(self.source.indices) if self.n_data is None else self.n_data

    @property
    def at_hand(self) -> Int64[Tensor, " n"]:
        """Positions of what was read, and of what the last loader adds."""
        return torch.cat([self.read, self.fresh]).sort().values

    def in_order(self, seed: int) -> Int64[Tensor, " n"]:
        """What was read, then the fresh samples in an order that the seed fixes, whatever was read before."""
        indices = self.source.indices
        order = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))]
        return torch.cat([order[torch.isin(order, self.read)], order[torch.isin(order, self.fresh)]])

    def having_read(self, positions: Int64[Tensor, " r"]) -> "Pool":
        """The same samples, these of them read."""
        rest = self.source.indices
        return replace(self, read=positions, fresh=rest[~torch.isin(rest, positions)])

    def joined(self, new: SampleSource, n_data: int | None, seed: int) -> "Pool":
        """With the samples of one more loader, each sample once.

        Positions are those in the new loader's data set where it yields all the earlier samples too; in the data set
        that both loaders are over, or are `Subset`s of; otherwise in the earlier data set followed by the new one.
        There, samples are known by their hashes.

        Args:
            new: samples of the loader.
            n_data: N; None: as before.
            seed: of loading.

        Returns:
            The pool.

        Raises:
            ValueError: if the loader yields no sample that was not read, or nothing can tell.
        """
        old = self.source
        n_data = self.n_data if n_data is None else n_data
        shared, old_keys, new_keys = _keys(old, new, seed)
        read_keys = old_keys[torch.isin(old.indices, self.read)]
        fresh = ~torch.isin(new_keys, read_keys)
        if not bool(fresh.any()):
            raise ValueError(
                f"The loader yields {len(new_keys)} samples, all of them fitted before; expected others with "
                "override=False."
            )
        if bool(torch.isin(old_keys, new_keys).all()):
            return Pool(new, new.indices[~fresh], new.indices[fresh], n_data)
        if shared is not None:
            source = replace(new, dataset=shared, indices=torch.cat([old_keys, new_keys]).unique())
            return Pool(source, read_keys.sort().values, new_keys[fresh].sort().values, n_data)
        both = _Appended(old, new)
        unread = ~torch.isin(old.indices, self.read)
        again = old.indices[unread & torch.isin(old_keys, new_keys)]
        added = both.offset + new.indices[~torch.isin(new_keys, old_keys)]
        source = AppendedSource(
            both, torch.cat([old.indices, added]), max(old.batch_size, new.batch_size), new.options, new.keys
        )
        return Pool(source, self.read, torch.cat([again, added]), n_data)


def _not_pickled() -> None:
    return None


def _keys(old: SampleSource, new: SampleSource, seed: int) -> tuple[Any, Tensor, Tensor]:
    """The data set that both are over, if there is one, and by what the samples of each are known."""
    if old.dataset is new.dataset:
        return new.dataset, old.indices, new.indices
    (old_root, old_positions), (new_root, new_positions) = old.root(), new.root()
    if old_root is new_root:
        return new_root, old_positions[old.indices], new_positions[new.indices]
    if old.augments(seed) or new.augments(seed):
        raise ValueError(
            "The two loaders are over different data sets, and loading is random (augmentation, padding): nothing can "
            "tell whether they share samples. Expected both as Subsets of one data set, or one loader of all."
        )
    return None, _hashes(old, seed), _hashes(new, seed)


def _hashes(source: SampleSource, seed: int) -> Int64[Tensor, " n"]:
    with undisturbed_randomness(seed):
        return torch.cat([sample_hashes(batch) for batch in source.batches(source.indices, seed)])


class _Appended:
    """One data set after the other."""

    def __init__(self, first: SampleSource, second: SampleSource):
        self.first, self.second = first, second
        known = hasattr(first.dataset, "__len__")
        self.offset = len(first.dataset) if known else int(first.indices.max()) + 1

    def __len__(self) -> int:
        known = hasattr(self.second.dataset, "__len__")
        return self.offset + (len(self.second.dataset) if known else int(self.second.indices.max()) + 1)

    def __getitem__(self, i: int) -> Any:
        return self.first.dataset[i] if i < self.offset else self.second.dataset[i - self.offset]


class AppendedSource(SampleSource):
    """Samples of two data sets, each loaded with the machinery of its own loader."""

    def batches(self, indices: Int64[Tensor, " m"], seed: int) -> Iterator[Batch]:
        """Load the samples at these positions, in this order; no batch has samples of both."""
        both: _Appended = self.dataset
        of_second, counts = torch.unique_consecutive(indices >= both.offset, return_counts=True)
        for second, some in zip(of_second.tolist(), indices.split(counts.tolist()), strict=True):
            part = replace(both.second if second else both.first, batch_size=self.batch_size)
            yield from part.batches(some - both.offset if second else some, seed)
