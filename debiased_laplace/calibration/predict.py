"""Predictions of several methods in one pass over a loader, with the same inputs and the same random numbers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Bool, Int
from laplace.baselaplace import BaseLaplace
from torch import Tensor, nn
from tqdm import tqdm

from debiased_laplace.calibration.contents import Task
from debiased_laplace.calibration.counts import Counts
from debiased_laplace.calibration.distributions import Gaussian, Samples
from debiased_laplace.calibration.methods import (
    TASKS,
    BatchPrediction,
    Method,
    PredictionOptions,
    check_posterior,
    network_of,
    predict_batch,
)
from debiased_laplace.calibration.probabilities import PosteriorPredictive
from debiased_laplace.checks import name_of, shown
from debiased_laplace.curvature.as_found import modules_reached
from debiased_laplace.curvature.positions import that_count
from debiased_laplace.data.batches import Batch, as_unweighted_batch
from debiased_laplace.data.inputs import MappingKeys, n_samples_of
from debiased_laplace.data.randomness import undisturbed_randomness
from debiased_laplace.data.sharing import loader_of_all, shared_batches
from debiased_laplace.posterior.laplace import DebiasedParametricLaplace
from debiased_laplace.processes import ALONE, Processes

MAP = "map"
_SMALLEST_RATE = 1e-130


@dataclass(frozen=True, eq=False)
class Collected:
    """Predictions of a set by method, with targets and, where rows are positions or labels, whose they are.

    Attributes:
        found: predictions by method, on the CPU.
        targets: on the CPU; None where they are not asked for.
        samples: sample of each row; None where each row is a sample.
        labels: binary label of each row; None of a single one.
        n_samples: number of samples, also of those without rows.
    """

    found: dict[str, BatchPrediction]
    targets: Tensor | None = None
    samples: Int[Tensor, " rows"] | None = None
    labels: Int[Tensor, " rows"] | None = None
    n_samples: int = 0

    def at(self, rows: Tensor) -> "Collected":
        """Return some of the rows."""
        targets, samples, labels = (None if x is None else x[rows] for x in (self.targets, self.samples, self.labels))
        found = {name: p.at(rows) for name, p in self.found.items()}
        return Collected(found, targets, samples, labels, self.n_samples)


def read_methods(methods: Any, baseline: str | None, include_map: bool | None) -> dict[str, Method]:
    """Return methods by name in the caller's order, after the network of the first posterior if MAP is to be added.

    With `include_map` None it is added where no network is given, and no baseline but MAP.
    """
    if isinstance(methods, BaseLaplace):
        methods = {"laplace": methods}
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError(f"posteriors must map at least one name to a method; got {methods!r:.60}.")
    wrong = {
        name: type(m).__name__ for name, m in methods.items() if not isinstance(m, BaseLaplace) and not callable(m)
    }
    if wrong:
        raise ValueError(
            f"Expected Laplace posteriors, networks, or callables from inputs to predictions; got {wrong}."
        )
    given = any(isinstance(m, nn.Module) or str(name).lower() == MAP for name, m in methods.items())
    by_default = baseline is None or (isinstance(baseline, str) and baseline == MAP)
    wanted = not given and by_default if include_map is None else include_map
    networks = [net for m in methods.values() if isinstance(m, BaseLaplace) and (net := network_of(m)) is not None]
    if wanted and networks and MAP not in methods:
        return {MAP: networks[0], **methods}
    if include_map:
        why = f"{MAP!r} is there already" if MAP in methods else "none of the posteriors has a network"
        raise ValueError(f"include_map=True adds the network of the first Laplace posterior as {MAP!r}; {why}.")
    return dict(methods)


def in_training_mode(methods: Mapping[str, Method]) -> list[str]:
    """Return a warning for each callable that has predicted with a network in training mode."""
    # Monte-Carlo dropout sets its dropout layers to training mode, not the network
    return [
        f"{name!r} evaluates a {type(module).__name__} in training mode, as it seems: dropout is random then, and "
        "batch normalization takes the statistics of each batch. Expected evaluation mode: call .eval() before; for "
        "Monte-Carlo dropout, set only the dropout layers to training mode."
        for name, method in methods.items()
        if not isinstance(method, BaseLaplace | nn.Module)
        for module in [m for m in modules_reached(method, skip=BaseLaplace) if m.training][:1]
    ]


def check_loader(loader: Any, name: str) -> None:
    """Check that batches can be read.

    Raises:
        ValueError: if it is no iterable of batches.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, str | bytes | Mapping | Tensor | np.ndarray):
        raise ValueError(f"{name} must be an iterable of batches, such as a DataLoader; got {shown(loader)}.")


def infer_task(posteriors: Mapping[str, BaseLaplace]) -> Task:
    """Return the task of the first Laplace posterior.

    Raises:
        ValueError: if there is none.
    """
    for posterior in posteriors.values():
        return TASKS.get(name_of(posterior.likelihood), "multiclass")
    raise ValueError(f"Expected task as one of {list(get_args(Task))}, since there is no Laplace posterior; got None.")


def collect(
    methods: Mapping[str, Method],
    loader: Iterable[Any],
    options: PredictionOptions,
    title: str,
    *,
    labelled: bool = True,
    processes: Processes = ALONE,
) -> Collected:
    """Predict with every method, batch by batch, in one pass.

    The global generators are seeded for the pass, and anew for each method and batch, so that what one method draws
    changes neither the loader's augmentation nor another method's draws; afterwards they are as they were. Of several
    processes, each predicts some of the batches.

    Returns:
        Predictions, and targets if `labelled`; else batches may be inputs alone. Of positions, those that count.
    """
    for name, method in methods.items():
        if isinstance(method, BaseLaplace):
            check_posterior(name, method, options.task)
    kept: dict[str, list[BatchPrediction]] = {name: [] for name in methods}
    targets: list[Tensor] = []
    owners: list[tuple[Tensor, Tensor]] = []
    has_rows, n_before = options.layout is not None or options.n_labels > 1, 0

    def batches() -> Iterator[Batch]:
        shown = options.progress_bar and processes.rank == 0
        whole = loader_of_all(loader, processes, options.seed)
        for loaded in tqdm(whole, desc=f"[Predicting {title}]", disable=not shown):
            batch = _read_batch(loaded, options.keys, labelled=labelled)
            if len(batch):
                batch.check_finite()
                yield batch

    def predicted(batch: Batch) -> dict[str, BatchPrediction]:
        found = {}
        for name, method in methods.items():
            with undisturbed_randomness(options.seed):
                found[name] = predict_batch(name, method, batch.inputs, options)
        return found

    with torch.inference_mode(False), undisturbed_randomness(options.seed):
        shared = not any(isinstance(m, DebiasedParametricLaplace) and m.is_sharded for m in methods.values())
        for batch, found in shared_batches(batches(), predicted, processes, shared=shared):
            y = batch.targets.detach().to("cpu", copy=True)
            counts: Tensor | None = None
            if has_rows and labelled:
                y, counts = _targets_of_rows(y, options)
                per_sample = len(counts) // len(batch)
                rows = n_before * per_sample + torch.arange(len(counts))
                owners.append((n_before + torch.arange(len(batch)).repeat_interleave(per_sample)[counts], rows[counts]))
            n_before += len(batch)
            # one label for each sample may be a column
            targets.append(y.reshape(-1) if options.task == "binary" and y.shape[1:] == (1,) else y)
            for name, one in found.items():
                kept[name].append(one if counts is None else one.at(counts, name))
    if not targets:
        raise ValueError(f"The loader yields no samples to predict; got {type(loader).__name__}.")
    # each method's batches are released before the next one's are joined
    joined = {name: _join_batches(name, kept.pop(name)) for name in methods}
    if not labelled or not owners:
        return Collected(joined, torch.cat(targets) if labelled else None, n_samples=n_before)
    samples, rows = (torch.cat(numbers) for numbers in zip(*owners, strict=True))
    labels = rows % options.n_labels if options.n_labels > 1 else None
    return Collected(joined, torch.cat(targets), samples, labels, n_before)


def _targets_of_rows(y: Tensor, options: PredictionOptions) -> tuple[Tensor, Bool[Tensor, " rows"]]:
    """Return the targets of the rows that count, and which ones these are."""
    layout, n_labels = options.layout, options.n_labels
    if layout is not None:
        n_last = y.ndim - 1 - layout.n_dimensions
        if n_last < 0:
            raise ValueError(f"Expected a target for each position of the outputs; got shape {tuple(y.shape)}.")
        y = layout.rows_of(y, n_last)
    if n_labels > 1 and y.shape[1:] != (n_labels,):
        raise ValueError(f"Expected {n_labels} binary labels of each sample or position; got shape {tuple(y.shape)}.")
    counts = that_count(y, n_lead=1)
    if n_labels > 1:
        y, counts = y.reshape(-1), counts.repeat_interleave(n_labels)
    return y[counts], counts


def as_prediction(
    name: str, predicted: BatchPrediction, sigma_noise: Any
) -> Tensor | PosteriorPredictive | Gaussian | Samples | Counts | tuple[Tensor, Tensor]:
    """Return predictions in a form that `calibration_report` reads; observation noise is added here only."""
    if predicted.probabilities is not None:
        if predicted.mutual_information is None:
            return predicted.probabilities
        return PosteriorPredictive(predicted.probabilities, predicted.mutual_information, predicted.logit_variance)
    if predicted.draws is not None:
        draws = predicted.draws.double().movedim(1, 0)
        if predicted.noise is None:
            # a rate that underflows is a small one
            return Counts(draws.clamp_min(_SMALLEST_RATE))
        return Samples(draws, observation_noise=predicted.noise.double().movedim(1, 0))
    mean, variance = predicted.mean, predicted.function_variance
    assert mean is not None  # for the type checker
    if predicted.standard_deviation is not None:
        return mean, predicted.standard_deviation
    if sigma_noise is None:
        raise ValueError(f"{name!r} has no observation noise; pass sigma_noise, its standard deviation.")
    if variance is not None and variance.ndim == 3:
        return Gaussian(mean, covariance=variance, observation_noise=sigma_noise)
    # rounding leaves tiny negative variances where the function is certain
    deviation = torch.zeros_like(mean) if variance is None else variance.clamp_min(0).sqrt()
    return Gaussian(mean, standard_deviation=deviation, observation_noise=sigma_noise)


def _read_batch(loaded: Any, keys: MappingKeys, *, labelled: bool) -> Batch:
    """Return a loader's item as a batch; targets that are not asked for are zeros."""
    if labelled:
        return as_unweighted_batch(loaded, keys)
    inputs = loaded[0] if isinstance(loaded, tuple | list) and len(loaded) in (1, 2, 3) else loaded
    if isinstance(inputs, Mapping):
        inputs = keys.inputs(inputs)
    elif not isinstance(inputs, Tensor) or inputs.ndim == 0:
        raise ValueError(f"Expected inputs as tensors or mappings of tensors; got {type(loaded).__name__}.")
    return Batch(inputs, torch.zeros(n_samples_of(inputs)))


def _join_batches(name: str, batches: Sequence[BatchPrediction]) -> BatchPrediction:
    """Concatenate the predictions of one method for several batches, which must be of the same form."""
    forms = {tuple(batch.tensors()) for batch in batches}
    if len(forms) > 1:
        shown = " and ".join(sorted(", ".join(form) for form in forms))
        raise ValueError(f"{name!r}: expected predictions of the same form for every batch; got {shown}.")
    joined: dict[str, Any] = {key: torch.cat([getattr(batch, key) for batch in batches]) for key in next(iter(forms))}
    return BatchPrediction(
        **joined,
        n_samples=min((b.n_samples for b in batches if b.n_samples is not None), default=None),
        seconds=sum(b.seconds for b in batches),
        peak_bytes=max((b.peak_bytes for b in batches if b.peak_bytes is not None), default=None),
    )
