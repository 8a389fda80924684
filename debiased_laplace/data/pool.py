"""Pool of all samples from the loaders of successive fits, with those already used."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from debiased_laplace.data.batches import Batch, sample_hashes
from debiased_laplace.data.identities import SampleIdentities
from debiased_laplace.data.inputs import dtype_of, shape_of
from debiased_laplace.data.randomness import undisturbed_randomness
from debiased_laplace.data.source import SampleSource, root_length


@dataclass(frozen=True, eq=False)
class Pool:
    """All samples that loaders have yielded so far, with those used by an estimate and those added last.

    Attributes:
        source: source of all samples.
        read: positions of the samples used by an estimate, increasing.
        fresh: positions of the samples added by the last loader, increasing.
        n_data: size N of the data set of the likelihood as given by the user; None: all samples of the pool.

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
                "n_data is the size of the data set, including the given samples: expected at least "
                f"{n}, got {self.size}."
            )

    @classmethod
    def of(cls, source: SampleSource, n_data: int | None) -> "Pool":
        """Return a pool of unread samples."""
        return cls(source, source.indices[:0], source.indices, n_data)

    @classmethod
    def resumed(cls, source: SampleSource, fitted: SampleIdentities, n_data: int | None, seed: int) -> "Pool":
        """Return the pool of a fit whose samples are known by identity only, and are yielded again with new ones.

        Args:
            source: samples of a loader, the fitted ones among them.
            fitted: identities of the fitted samples.
            n_data: size N of the data set of the likelihood; None: all samples of the source.
            seed: seed of the loading.

        Returns:
            The pool; read are the fitted samples, fresh all others.

        Raises:
            ValueError: if the loader does not yield all fitted samples, or no others.
        """
        root, positions = source.root()
        augmented = fitted.augmented or source.augments(seed)
        places = positions[source.indices]
        hashes = places if augmented else _hashes(source, seed)
        found = SampleIdentities(hashes, places, root_length(root, positions), augmented, root)
        # positions of a state or a pickle are of a data set of the same length, as far as can be known
        if augmented and found.n_root != fitted.n_root:
            raise ValueError(_INCOMPARABLE)
        keys, known = found.keys(fitted)
        n_missing = int((~torch.isin(known, keys)).sum())
        if n_missing:
            raise ValueError(missing_fitted(n_missing, len(known)))
        read = torch.isin(keys, known)
        _check_fresh(~read)
        return cls(source, source.indices[read], source.indices[~read], n_data)

    # Data sets and collate functions often cannot be copied or pickled: copies share the pool, a pickle has None.
    def __deepcopy__(self, memo: dict[int, Any]) -> "Pool":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()

    @property
    def size(self) -> int:
        """Size N of the data set of the likelihood."""
        return len(self.source.indices) if self.n_data is None else self.n_data

    @property
    def available(self) -> Int64[Tensor, " n"]:
        """Positions of the read and the fresh samples, increasing."""
        return torch.cat([self.read, self.fresh]).sort().values

    def reading_order(self, seed: int) -> Int64[Tensor, " n"]:
        """Return the read samples, then the fresh ones, each in an order that depends on the seed only."""
        indices = self.source.indices
        order = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))]
        return torch.cat([order[torch.isin(order, self.read)], order[torch.isin(order, self.fresh)]])

    def with_read(self, positions: Int64[Tensor, " r"]) -> "Pool":
        """Return the pool with these samples as the read ones and all others as fresh."""
        indices = self.source.indices
        return replace(self, read=positions.sort().values, fresh=indices[~torch.isin(indices, positions)])

    def join(self, new: SampleSource, n_data: int | None, seed: int) -> "Pool":
        """Return the pool with the samples of another loader added, each sample once.

        Positions in the new pool are positions in

        - the new loader's data set, if it yields all earlier samples;
        - the data set of both loaders or the common root of their `Subset`s, if there is one;
        - the earlier data set followed by the new one otherwise. Samples are then identified by hash, for which all are
          loaded, and each is loaded by its own loader; in the other cases by the new one.

        Args:
            new: samples of the new loader.
            n_data: size N of the data set of the likelihood; None: as before.
            seed: seed of the loading.

        Returns:
            The new pool.

        Raises:
            ValueError: if the loader yields no unread sample, the samples of two data sets cannot be compared because
                loading is random, the inputs differ in shape or dtype, or n_data is too small.
        """
        old = self.source
        n_data = self.n_data if n_data is None else n_data
        shared, old_keys, new_keys = _keys(old, new, seed)
        read_keys = old_keys[torch.isin(old.indices, self.read)]
        fresh = ~torch.isin(new_keys, read_keys)
        _check_fresh(fresh)
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


_INCOMPARABLE = (
    "Samples of different data sets cannot be compared if loading is random (augmentation, padding). Expected loaders "
    "over Subsets of one data set, or one loader of all samples."
)


def _check_fresh(fresh: Tensor) -> None:
    if not bool(fresh.any()):
        raise ValueError(nothing_new(len(fresh)))


def nothing_new(n: int | None) -> str:
    """Return the message for a loader of n samples (None: not known) that were all fitted."""
    return (
        f"The loader yields {'samples' if n is None else f'{n} samples'}, all of them fitted before; expected new "
        "samples with override=False."
    )


def missing_fitted(n_missing: int, n: int) -> str:
    """Return the message for a loader that lacks fitted samples."""
    return (
        "override=False after loading a state or a pickle, which do not hold the samples, expects a loader "
        f"that yields the fitted samples again, with new ones; {n_missing} of {n} are missing."
    )


def _nothing() -> None:
    return None


def _keys(old: SampleSource, new: SampleSource, seed: int) -> tuple[Any, Tensor, Tensor]:
    """Return the common data set, or None, and the keys of both sources: positions in it, or hashes."""
    if old.dataset is new.dataset:
        return new.dataset, old.indices, new.indices
    (old_root, old_positions), (new_root, new_positions) = old.root(), new.root()
    if old_root is new_root:
        return new_root, old_positions[old.indices], new_positions[new.indices]
    if old.augments(seed) or new.augments(seed):
        raise ValueError(_INCOMPARABLE)
    return None, _hashes(old, seed), _hashes(new, seed)


def _hashes(source: SampleSource, seed: int) -> Int64[Tensor, " n"]:
    with undisturbed_randomness(seed):
        return torch.cat([sample_hashes(batch) for batch in source.batches(source.indices, seed)])


class Appended(Dataset[Any]):
    """Concatenation of two data sets, the first of which may lack a length."""

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
    """Samples of two data sets, each loaded as its own loader does.

    Attributes:
        first: source of the earlier samples.
        second: source of the later samples.
    """

    first: SampleSource
    second: SampleSource

    def batches(self, indices: Int64[Tensor, " m"], seed: int) -> Iterator[Batch]:
        """Load the samples at these positions, in this order; no batch has samples of both data sets."""
        offset = self.dataset.offset
        of_second, counts = torch.unique_consecutive(indices >= offset, return_counts=True)
        for second, positions in zip(of_second.tolist(), indices.split(counts.tolist()), strict=True):
            part = replace(self.second if second else self.first, batch_size=self.batch_size)
            yield from part.batches(positions - offset if second else positions, seed)


def _appended(old: SampleSource, new: SampleSource, added: Int64[Tensor, " a"]) -> tuple[AppendedSource, Tensor]:
    """Append new samples to the old ones; return the joint source and the positions of the new samples in it.

    Raises:
        ValueError: if their inputs differ in shape or dtype.
    """
    (before, after) = (next(source.batches(source.indices[:1], 0)).inputs for source in (old, new))
    if (shape_of(before), dtype_of(before)) != (shape_of(after), dtype_of(after)):
        raise ValueError(
            "Expected inputs of one shape and dtype from both loaders; got batches of one sample with "
            f"{shape_of(before)} of {dtype_of(before)} from the earlier loader, {shape_of(after)} of "
            f"{dtype_of(after)} from the new one."
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
