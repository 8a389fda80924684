"""Sources of samples: loaders converted to positions in their data sets before anything is loaded."""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from debiased_laplace.data.batches import Batch, as_batch, joined, sample_hashes
from debiased_laplace.data.inputs import DEFAULT_KEYS, WEIGHTS, MappingKeys, on_each, shape_of
from debiased_laplace.data.randomness import undisturbed_randomness
from debiased_laplace.data.workers import Workers

_PROBES = 16  # samples loaded twice to detect random loading
_REPLACEMENT_HINT = (
    "Held-out curvature requires disjoint samples, which sampling with replacement does not give. Pass a "
    "loader over the same data set with shuffle=True or a sampler without replacement; to weight "
    "samples, yield their weights as a third element of each batch, (inputs, targets, sample_weights); to weight "
    "classes, use class_weights."
)


@dataclass(frozen=True, eq=False)
class SampleSource:
    """Samples of a loader, accessible by their positions in its data set.

    Attributes:
        dataset: map-style data set of the loader: any object with `__getitem__`, such as a list.
        indices: distinct positions that the loader yields, increasing.
        batch_size: samples per batch.
        options: workers, collate function and pinning of the loader.
        keys: keys of the inputs and targets in a mapping.
        workers: worker processes, shared by all sources that were derived from this one.
    """

    dataset: Any
    indices: Int64[Tensor, " n"]
    batch_size: int
    options: dict[str, Any]
    keys: MappingKeys = DEFAULT_KEYS
    workers: Workers = field(default_factory=Workers)

    def batches(self, indices: Int64[Tensor, " m"], seed: int) -> Iterator[Batch]:
        """Load the samples at these positions, in this order, as the loader does.

        Args:
            indices: positions in the data set.
            seed: seed of the workers.

        Yields:
            Batches of `batch_size` samples; the last may be smaller.

        Raises:
            ValueError: if a batch has another number of samples, or the data set ends early.
        """
        start = 0
        if not len(indices):
            return
        for loaded in self._loaded(array("q", indices.numpy().tobytes()), seed):
            batch = as_batch(loaded, self.keys)
            expected = min(self.batch_size, len(indices) - start)
            if len(batch) != expected:
                raise ValueError(
                    f"The loader's collate function made {len(batch)} samples out of {expected}; a sample must stay "
                    "one sample, as sub-batches could overlap otherwise."
                )
            start += expected
            yield batch
        if start < len(indices):
            raise ValueError(
                f"Expected {len(indices)} samples from the data set; loading stopped after {start} (a StopIteration "
                "in __getitem__ ends a loader without an error)."
            )

    def _loaded(self, positions: "array[int]", seed: int) -> Iterator[Any]:
        """Yield what the collate function makes of the samples at these positions."""
        if self.options.get("num_workers"):
            batches = [list(positions[i : i + self.batch_size]) for i in range(0, len(positions), self.batch_size)]
            return self.workers.load(self.dataset, batches, seed, self.options)
        generator = torch.Generator().manual_seed(seed)
        subset: Subset[Any] = Subset(self.dataset, positions)
        return iter(DataLoader(subset, batch_size=self.batch_size, generator=generator, **self.options))

    def numbered(self, seed: int) -> Iterator[tuple[Int64[Tensor, " b"], Batch]]:
        """Load all samples once, batch by batch, with their positions."""
        start = 0
        for batch in self.batches(self.indices, seed):
            yield self.indices[start : start + len(batch)], batch
            start += len(batch)

    def root(self) -> tuple[Any, Int64[Tensor, " n"]]:
        """Return the data set below all `Subset`s, and the position in it of each item of this data set."""
        dataset: Any = self.dataset
        chain = []
        while isinstance(dataset, Subset):
            chain.append(torch.as_tensor(dataset.indices, dtype=torch.int64))
            dataset = dataset.dataset
        positions = torch.arange(int(self.indices.max()) + 1)
        for step in chain:
            positions = step[positions]
        return dataset, positions

    def augments(self, seed: int) -> bool:
        """Return whether loading is random: whether a sample differs between two passes or depends on its batch."""
        # the second pass has batches of one sample: a collate function may pad or mix the samples of a batch
        probes = self.indices[torch.linspace(0, len(self.indices) - 1, _PROBES).long().unique()]
        with undisturbed_randomness(seed):
            # workers are seeded by the loader's generator: with the same seed the noise would repeat
            first, second = (
                torch.cat([sample_hashes(batch) for batch in source.batches(probes, each)])
                for source, each in ((self, seed), (replace(self, batch_size=1), seed + 1))
            )
        return not torch.equal(first, second)


@dataclass(frozen=True, eq=False)
class SampleStream:
    """Samples of an iterable of batches, which have no positions: they are numbered as they come, in one pass.

    Attributes:
        loader: any iterable of batches.
        keys: keys of the inputs and targets in a mapping.
    """

    loader: Iterable[Any]
    keys: MappingKeys = DEFAULT_KEYS

    def numbered(self, seed: int) -> Iterator[tuple[Int64[Tensor, " b"], Batch]]:  # noqa: ARG002
        """Read all samples once, batch by batch, with their numbers."""
        start = 0
        for loaded in self.loader:
            batch = as_batch(loaded, self.keys)
            yield torch.arange(start, start + len(batch)), batch
            start += len(batch)


def training_samples(
    loader: Any, seed: int, keys: MappingKeys, *, repeats: bool = False
) -> SampleSource | SampleStream:
    """Convert a loader to samples that are read once: by position where there are positions, or else as they come.

    Args:
        loader: of the samples.
        seed: of random samplers.
        keys: of mappings.
        repeats: as of `sample_source`.

    Raises:
        ValueError: as `sample_source`, for anything that is not iterable.
    """
    has_positions = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    known = isinstance(loader, Sequence | Tensor | str | Mapping) or not isinstance(loader, Iterable)
    if has_positions or known:
        return sample_source(loader, seed, keys, repeats=repeats)
    return SampleStream(loader, keys)


def root_length(root: Any, positions: Int64[Tensor, " n"]) -> int:
    """Return the length of a root data set, or a lower bound if it has none."""
    return len(root) if hasattr(root, "__len__") else int(positions.max()) + 1


def sample_source(loader: Any, seed: int, keys: MappingKeys = DEFAULT_KEYS, *, repeats: bool = False) -> SampleSource:
    """Convert a loader to a source of samples.

    The positions are those of one epoch of the loader's sampler, with `drop_last` taken into account. Random samplers
    are seeded; the global random state and the generators of the loader are restored.

    Args:
        loader: `DataLoader` over a map-style data set, or list of batches.
        seed: seed of random samplers.
        keys: keys of the inputs and targets in a mapping.
        repeats: whether samples may come more than once, as of samplers that give several processes as many; they count
            once.

    Returns:
        The source.

    Raises:
        ValueError: if the loader is empty, yields a sample twice, or its samples are not accessible by position.
    """
    if isinstance(loader, Sequence) and not isinstance(loader, str | DataLoader):
        return _from_batches(loader, keys)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        kind = type(getattr(loader, "dataset", loader)).__name__
        raise ValueError(
            "Expected a torch DataLoader over a map-style data set (one with __getitem__ and __len__), "
            f"or a list of (inputs, targets) batches; got {kind}. Samples are split by position before "
            "loading, so a stream has to be read first: pass list(stream)."
        )
    if loader.batch_size is None and loader.batch_sampler is None:
        raise ValueError(
            "Expected a loader that collates samples to batches; got batch_size=None. Pass a DataLoader with a "
            "batch_size whose data set yields one sample per item."
        )
    with undisturbed_randomness(seed):
        epoch = one_epoch(loader)
    if not epoch:
        raise ValueError("The loader yields no samples; expected at least 2.")
    indices = torch.from_numpy(np.concatenate([np.asarray(batch, dtype=np.int64) for batch in epoch]))
    unique = indices.unique()
    if len(unique) < len(indices) and not (repeats and not getattr(loader.sampler, "replacement", False)):
        raise ValueError(
            f"The loader's sampler yields {len(indices) - len(unique)} of its {len(indices)} samples "
            "more than once. " + _REPLACEMENT_HINT
        )
    options = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
    }
    size = loader.batch_size or max(len(batch) for batch in epoch)
    return SampleSource(loader.dataset, unique, size, options, keys)


def one_epoch(loader: DataLoader[Any]) -> list["array[int]"]:
    """Return the batches of positions of one epoch, without loading any sample."""
    inner = getattr(loader.batch_sampler, "sampler", None)
    generators = {
        id(g): g
        for owner in (loader, loader.sampler, loader.batch_sampler, inner)
        if isinstance(g := getattr(owner, "generator", None), torch.Generator)
    }
    states = {key: g.get_state() for key, g in generators.items()}
    try:
        return _until_repeated(loader)
    finally:
        for key, g in generators.items():
            g.set_state(states[key])


def _until_repeated(loader: DataLoader[Any]) -> list["array[int]"]:
    """Return one epoch of the batch sampler; of an infinite one, enough batches to contain repeats."""
    epoch, n = [], 0
    dataset: Any = loader.dataset
    limit = 2 * len(dataset) if hasattr(dataset, "__len__") else math.inf
    for batch in () if loader.batch_sampler is None else loader.batch_sampler:
        try:
            # eight bytes a position, where a list would take five times as much
            epoch.append(array("q", map(index, batch)))
        except TypeError as error:
            raise ValueError("Expected a sampler that yields integer positions in the data set.") from error
        n += len(epoch[-1])
        if n > limit:
            break
    return epoch


class _Stacked(Dataset[tuple[Any, ...]]):
    """Data set of the samples of a list of batches."""

    def __init__(self, parts: list[Batch]):
        # shapes without the first dimension, which counts samples
        shapes = {
            str((shape_of(on_each(part.inputs, lambda t: t[0])), tuple(part.targets.shape[1:]))) for part in parts
        }
        if len(shapes) > 1:
            raise ValueError(
                f"Expected batches of samples of one shape (input, target); got {' and '.join(sorted(shapes)[:2])}. "
                "Pad all batches to one length, or pass the DataLoader itself."
            )
        n_weighted = sum(part.weights is not None for part in parts)
        if n_weighted not in (0, len(parts)):
            raise ValueError(f"Expected {WEIGHTS} in all batches or in none; got {n_weighted} of {len(parts)}.")
        whole = joined(parts)
        self.inputs, self.targets, self.weights = whole.inputs, whole.targets, whole.weights

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        sample = on_each(self.inputs, lambda t: t[i]), self.targets[i]
        return sample if self.weights is None else (*sample, self.weights[i])


def _from_batches(batches: Sequence[Any], keys: MappingKeys) -> SampleSource:
    if len(batches) == 0:
        raise ValueError("The list of batches is empty; expected (inputs, targets) pairs or mappings.")
    parts = [part for part in (as_batch(batch, keys) for batch in batches) if len(part)]
    if not parts:
        raise ValueError("The list of batches has no samples; expected at least 2.")
    dataset = _Stacked(parts)
    size = max(len(part) for part in parts)
    return SampleSource(dataset, torch.arange(len(dataset)), size, {}, keys)
