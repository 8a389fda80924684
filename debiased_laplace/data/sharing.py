"""Samples that several processes share: the positions of all of them, and the part of a pass that is one's own."""

from dataclasses import replace

import torch

from debiased_laplace.data.batches import sample_hashes
from debiased_laplace.data.randomness import undisturbed_randomness
from debiased_laplace.data.source import SampleSource, SampleStream
from debiased_laplace.processes import Processes

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
    # some samples stand for all of them
    probes = indices[torch.linspace(0, len(indices) - 1, _PROBES).long().unique()]
    with undisturbed_randomness(seed):
        try:
            known = str(torch.cat([sample_hashes(batch) for batch in source.batches(probes, seed)]).tolist())
        except (IndexError, KeyError) as error:
            known = f"none at {probes.tolist()} ({type(error).__name__})"
    if len(set(processes.gathered("some samples", known))) > 1:
        raise ValueError(
            f"Expected loaders over the same data set in all {processes.size} processes, of which each may yield a "
            f"part (DistributedSampler); some of the samples {probes.tolist()} differ. Augmentation has to follow the "
            "seeds of torch, NumPy or Python. For a data set of its own in each process, yield its samples as a stream "
            "(IterableDataset)."
        )
    return replace(source, indices=indices)


def own_part(samples: SampleSource | SampleStream, processes: Processes) -> SampleSource | SampleStream:
    """Return the samples that this process reads in a pass: every k-th batch of k processes; of a stream, its own."""
    if not processes.several or isinstance(samples, SampleStream):
        return samples
    batches = samples.indices.split(samples.batch_size)[processes.rank :: processes.size]
    return replace(samples, indices=torch.cat([samples.indices[:0], *batches]))
