"""Samples that several processes share: the positions of all of them, and the part of a pass that is one's own."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from hashlib import sha256
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from debiased_laplace.data.batches import Batch, joined, sample_hashes
from debiased_laplace.data.randomness import undisturbed_randomness
from debiased_laplace.data.source import SampleSource, SampleStream, one_epoch, sample_source
from debiased_laplace.processes import Processes

Value = TypeVar("Value")

_PROBES = 16


def united(source: SampleSource, processes: Processes, seed: int) -> SampleSource:
    """Return the samples of all processes, each of which can load them all; a position of several counts once.

    Raises:
        ValueError: if the data sets differ.
    """
    if not processes.several:
        return source
    found = processes.gathered("positions of samples", (source.indices, source.batch_size))
    indices = torch.cat([positions for positions, _ in found]).unique()
    source = replace(source, batch_size=max(size for _, size in found))
    source = replace(source, indices=indices)
    if len(set(processes.gathered("some samples", described(source, seed)))) > 1:
        raise ValueError(
            f"Expected loaders over the same data set in all {processes.size} processes, of which each may yield a "
            f"part (DistributedSampler); some of the samples {_probes(source).tolist()} differ. Augmentation has to "
            "follow the seeds of torch, NumPy or Python. For a data set of its own in each process, yield its samples "
            "as a stream (IterableDataset)."
        )
    return source


def described(samples: SampleSource | SampleStream, seed: int) -> str:
    """Return a text that differs for samples at other positions, and as good as surely for other samples."""
    if isinstance(samples, SampleStream):
        return "a stream"
    probes = _probes(samples)
    with undisturbed_randomness(seed):
        try:
            some = [identified(batch) for batch in samples.batches(probes, seed)]
        except (IndexError, KeyError) as error:
            return f"none at {probes.tolist()} ({type(error).__name__})"
    every = digest((samples.indices.tolist(), some))
    return f"{len(samples.indices)} samples {every} in batches of {samples.batch_size}"


def identified(batch: Batch) -> str:
    """Return a text that differs for other samples or weights."""
    return digest((sample_hashes(batch).tolist(), None if batch.weights is None else batch.weights.tolist()))


def digest(value: object) -> str:
    """Return a short text that differs for a value of another text."""
    return sha256(str(value).encode()).hexdigest()[:16]


def _probes(source: SampleSource) -> Int64[Tensor, " p"]:
    """Return the positions of some samples, which stand for all of them."""
    return source.indices[torch.linspace(0, len(source.indices) - 1, _PROBES).long().unique()]


def own_part(samples: SampleSource | SampleStream, processes: Processes) -> SampleSource | SampleStream:
    """Return the samples that this process reads in a pass: every k-th batch of k processes; of a stream, its own."""
    if not processes.several or isinstance(samples, SampleStream):
        return samples
    batches = samples.indices.split(samples.batch_size)[processes.rank :: processes.size]
    return replace(samples, indices=torch.cat([samples.indices[:0], *batches]))


def first_of_all(
    numbered: Iterator[tuple[Int64[Tensor, " b"], Batch]], processes: Processes
) -> tuple[Batch, Iterator[tuple[Int64[Tensor, " b"], Batch]]]:
    """Return a few samples of the first process that has any, the same for all; and all samples of this process.

    Raises:
        ValueError: if no process has samples.
    """
    first = next(numbered, None)
    found = processes.gathered("first samples", None if first is None else first[1].first(8))
    some = next((one for one in found if one is not None), None)
    if some is None:
        raise ValueError("The loader yields no samples; expected at least 2.")
    return some, chain([] if first is None else [first], numbered)


def loader_of_all(loader: Any, processes: Processes, seed: int) -> Any:
    """Return the loader; where processes draw other positions of a data set, one over those of all, in their order."""
    plain = isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
    has_positions = plain and loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset)
    if not processes.several or not has_positions:
        return loader
    with undisturbed_randomness(seed):
        try:
            epoch = digest([batch.tolist() for batch in one_epoch(loader)])
        except ValueError:
            # keys of another kind
            return loader
    if len(set(processes.gathered("an epoch of a loader", epoch))) == 1:
        return loader
    source = sample_source(loader, seed, repeats=True)
    found = processes.gathered("positions of a loader", (source.indices, source.batch_size))
    positions = torch.cat([one for one, _ in found]).unique().tolist()
    size = max(size for _, size in found)
    return DataLoader(Subset(loader.dataset, positions), batch_size=size, **source.options)


def shared_batches(
    batches: Iterable[Batch], compute: Callable[[Batch], Value], processes: Processes, *, shared: bool = True
) -> Iterator[tuple[Batch, Value]]:
    """Yield batches that all processes read, with what a function returns for each.

    Each is computed by one of the processes; or, if not `shared`, by all of them together.

    Raises:
        ValueError: if processes read other batches.
    """
    if not processes.several:
        for batch in batches:
            yield batch, compute(batch)
        return
    remaining, size, rank = iter(batches), processes.size, processes.rank
    while True:
        together = list(islice(remaining, size))
        own = [identified(batch) for batch in together]
        if any(others != own for others in processes.gathered("batches", own)):
            raise ValueError(
                f"Expected the same batches in all {size} processes, or a DataLoader of which each yields a part; some "
                "differ. Of any other iterable each process yields all, and augmentation follows the seeds of torch, "
                "NumPy or Python."
            )
        if not together:
            return
        if shared:
            mine = compute(together[rank]) if rank < len(together) else None
            found = processes.gathered("a shared pass over batches", mine)[: len(together)]
        else:
            found = [compute(batch) for batch in together]
        yield from zip(together, found, strict=True)  # type: ignore[misc]


def batch_of_all(batch: Batch, processes: Processes) -> Batch:
    """Return the samples of the batches of all processes; batches that are all the same count once."""
    if not processes.several:
        return batch
    found = processes.gathered("a batch", batch)
    if len({identified(one) for one in found}) == 1:
        return batch
    return joined([one for one in found if len(one)])
