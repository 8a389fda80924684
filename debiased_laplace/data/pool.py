"""Samples at hand: those that were read, and those that still can be."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from debiased_laplace.data.batches import Batch, sample_hashes
from debiased_laplace.data.inputs import dtype_of, shape_of
from debiased_laplace.data.randomness import undisturbed_randomness
from debiased_laplace.data.source import SampleSource, root_length


@dataclass(frozen=True, eq=False)
class Pool:
    """All samples that loaders have yielded so far, and what became of them.

    A pool is not written into a pickle, since data sets and collate functions often cannot be; a copy shares it.

    Attributes:
        source: of all samples.
        read: positions of those that an estimate was made of, increasing.
        fresh: positions of those that the last loader adds, increasing.
        n_data: size N of the data set that the likelihood stands for, as it was given; None: all samples of the pool.

    Raises:
        ValueError: if n_data is below the number of samples.
    """

    source: SampleSource
    read: Int64[Tensor, " r"]
    fresh: Int64[Tensor, " f"]
    n_data: int | None

    def __post_init__(self) -> None:
        n = len(self.source.indices)
        if self.size < n:
            raise ValueError(
                "n_data is the size of the data set that the likelihood stands for, the given samples "
                f"being part of it: expected at least {n}, got {self.size}."
            )

    @classmethod
    def of(cls, source: SampleSource, n_data: int | None) -> "Pool":
        """Samples of which none was read."""
        return cls(source, source.indices[:0], source.indices, n_data)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pool":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()

    @property
    def size(self) -> int:
        """N."""
        return len(self.source.indices) if self.n_data is None else self.n_data

    @property
    def at_hand(self) -> Int64[Tensor, " n"]:
        """Positions of what was read, and of what the last loader adds."""
        return torch.cat([self.read, self.fresh]).sort().values

    def in_order(self, seed: int) -> Int64[Tensor, " n"]:
        """What was read, then the fresh samples, in an order that the seed fixes whatever was read before."""
        indices = self.source.indices
        order = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))]
        return torch.cat([order[torch.isin(order, self.read)], order[torch.isin(order, self.fresh)]])

    def having_read(self, positions: Int64[Tensor, " r"]) -> "Pool":
        """The same samples, these of them read."""
        rest = self.source.indices
        return replace(self, read=positions.sort().values, fresh=rest[~torch.isin(rest, positions)])

    def joined(self, new: SampleSource, n_data: int | None, seed: int) -> "Pool":
        """With the samples of one more loader, each sample once; loaded the way that the new loader does.

        Positions are those in the new loader's data set where it yields all the earlier samples too; in the data set
        that both loaders are over, or are `Subset`s of; otherwise in the earlier data set followed by the new one.
        There, samples are known by their hashes, for which all are loaded, and each keeps its own loader.

        Args:
            new: samples of the loader.
            n_data: N; None: as before.
            seed: of loading.

        Returns:
            The pool.

        Raises:
            ValueError: if the loader yields no sample that was not read, or nothing can tell, if the inputs differ in
                shape or dtype, or if n_data is too small.
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
        added = new.indices[~torch.isin(new_keys, old_keys)]
        source, added = _appended(old, new, added)
        unread = ~torch.isin(old.indices, self.read)
        again = old.indices[unread & torch.isin(old_keys, new_keys)]
        return Pool(source, self.read, torch.cat([again, added]), n_data)


def _nothing() -> None:
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


class Appended(Dataset[Any]):
    """One data set after the other, the first of which need not have a length."""

    def __init__(self, first: SampleSource, second: SampleSource):
        self.datasets = first.dataset, second.dataset
        self.offset, n_second = (root_length(source.dataset, source.indices) for source in (first, second))
        self.n = self.offset + n_second

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        first, second = self.datasets
        return first[i] if i < self.offset else second[i - self.offset]


@dataclass(frozen=True, eq=False, kw_only=True)
class AppendedSource(SampleSource):
    """Samples of two data sets, each loaded by the machinery of its own loader.

    Attributes:
        first: the earlier ones.
        second: the later ones.
    """

    first: SampleSource
    second: SampleSource

    def batches(self, indices: Int64[Tensor, " m"], seed: int) -> Iterator[Batch]:
        """Load the samples at these positions, in this order; no batch has samples of both."""
        offset = self.dataset.offset
        of_second, counts = torch.unique_consecutive(indices >= offset, return_counts=True)
        for second, some in zip(of_second.tolist(), indices.split(counts.tolist()), strict=True):
            part = replace(self.second if second else self.first, batch_size=self.batch_size)
            yield from part.batches(some - offset if second else some, seed)


def _appended(old: SampleSource, new: SampleSource, added: Int64[Tensor, " a"]) -> tuple[AppendedSource, Tensor]:
    """All the old samples and some of the new ones, and the positions of the latter.

    Raises:
        ValueError: if their inputs differ in shape or dtype.
    """
    (before, after) = (next(source.batches(source.indices[:1], 0)).inputs for source in (old, new))
    if (shape_of(before), dtype_of(before)) != (shape_of(after), dtype_of(after)):
        raise ValueError(
            "Expected inputs of one shape and dtype from both loaders; a batch of one sample has "
            f"{shape_of(before)} of {dtype_of(before)} from the earlier one, {shape_of(after)} of {dtype_of(after)} "
            "from this one."
        )
    dataset = Appended(old, new)
    added = added + dataset.offset
    source = AppendedSource(
        dataset,
        torch.cat([old.indices, added]),
        max(old.batch_size, new.batch_size),
        new.options,
        new.keys,
        first=old,
        second=new,
    )
    return source, added
