"""Predictions of several methods in one pass over a loader, with the same inputs and the same random numbers."""

import time
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from laplace.baselaplace import BaseLaplace
from torch import Tensor, nn
from tqdm import tqdm

from debiased_laplace.calibration.distributions import Gaussian
from debiased_laplace.calibration.predictors import (
    BatchPrediction,
    CallablePredictor,
    LaplacePredictor,
    NetworkPredictor,
    PredictionOptions,
    Predictor,
)
from debiased_laplace.calibration.probabilities import PosteriorPredictive
from debiased_laplace.data.batches import as_batch
from debiased_laplace.data.inputs import Inputs, MappingKeys, n_samples_of, on_each, tensors_of
from debiased_laplace.data.randomness import undisturbed_randomness

Method = Any
"""A Laplace posterior (`BaseLaplace`), a network (`nn.Module`), or a callable from inputs to predictions."""
MAP = "map"


@dataclass(frozen=True, eq=False)
class CollectedPredictions:
    """Predictions of several methods by name for the samples of a loader, on the CPU; no targets if not asked for."""

    predictions: Mapping[str, BatchPrediction]
    targets: Tensor | None
    clocks: Mapping[str, "Clock"]


def read_methods(methods: Any, baseline: str | None, include_map: bool | None) -> dict[str, Method]:
    """Return methods by name in the caller's order, after the network of the first posterior where MAP is missing.

    With `include_map` None it is added where no network is given, and no baseline but MAP.
    """
    if isinstance(methods, BaseLaplace):
        methods = {"laplace": methods}
    if not isinstance(methods, Mapping) or not methods:
        got = "an empty mapping" if isinstance(methods, Mapping) else type(methods).__name__
        raise ValueError(f"posteriors must map names to methods, at least one; got {got}.")
    for name, method in methods.items():
        if not isinstance(method, BaseLaplace | nn.Module) and not callable(method):
            raise ValueError(
                f"{name!r} must be a Laplace posterior, a network, or a callable that maps inputs to predictions; got "
                f"{type(method).__name__}."
            )
    found: dict[str, Method] = dict(methods)
    if include_map is None:
        given = any(isinstance(m, nn.Module) or str(name).lower() == MAP for name, m in found.items())
        wanted = not given and baseline in (None, MAP)
    else:
        wanted = include_map
    if not wanted:
        return found
    models = [m.model for m in found.values() if isinstance(m, BaseLaplace) and hasattr(m, "model")]
    networks = [model for model in models if isinstance(model, nn.Module)]
    if networks and MAP not in found:
        return {MAP: networks[0], **found}
    if include_map:
        why = f"{MAP!r} is there already" if MAP in found else "none of the posteriors has a network"
        raise ValueError(f"include_map=True adds the network of the first Laplace posterior as {MAP!r}; {why}.")
    return found


def make_predictors(methods: Mapping[str, Method], options: PredictionOptions, baseline: str) -> dict[str, Predictor]:
    """Return a predictor of each method; that of the baseline keeps its logits, if it is a network."""
    predictors: dict[str, Predictor] = {}
    for name, method in methods.items():
        if isinstance(method, BaseLaplace):
            predictors[name] = LaplacePredictor(name, method, options)
        elif isinstance(method, nn.Module):
            predictors[name] = NetworkPredictor(name, method, options.task, keeps_logits=name == baseline)
        else:
            predictors[name] = CallablePredictor(name, method, options.task)
    return predictors


def collect(
    predictors: Mapping[str, Predictor],
    loader: Iterable[Any],
    keys: MappingKeys,
    *,
    seed: int,
    with_targets: bool = True,
    progress: str | None = None,
) -> CollectedPredictions:
    """Predict with every method, batch by batch, in one pass.

    The global generators are seeded for the pass, and anew for each method and batch, so that what one method draws
    changes neither the loader's augmentation nor another method's draws; afterwards they are as they were. Without
    targets batches may be inputs alone. `progress` is the title of a progress bar.
    """
    kept: dict[str, list[BatchPrediction]] = {name: [] for name in predictors}
    clocks = {name: Clock(p.device) for name, p in predictors.items()}
    targets = []
    with torch.inference_mode(False), undisturbed_randomness(seed):
        n_batches = len(loader) if isinstance(loader, Sized) else None
        for loaded in tqdm(loader, total=n_batches, desc=progress, disable=progress is None):
            inputs, y = _read_batch(loaded, keys, with_targets=with_targets)
            if n_samples_of(inputs) == 0:
                continue
            _check_finite(inputs)
            if y is not None:
                targets.append(y.detach().to("cpu", copy=True))
            for name, predictor in predictors.items():
                with undisturbed_randomness(seed), clocks[name]:
                    predicted = predictor.predict(_own_copy(inputs, predictor.device))
                kept[name].append(predicted.compact())
    if not all(kept.values()):
        raise ValueError(f"The loader yields no samples to predict; got {type(loader).__name__}.")
    return CollectedPredictions(
        # each method's batches are released before the next one's are joined
        {name: join_batches(name, kept.pop(name)) for name in predictors},
        torch.cat(targets) if with_targets else None,
        clocks,
    )


def join_batches(name: str, batches: Sequence[BatchPrediction]) -> BatchPrediction:
    """Concatenate the predictions of one method for several batches, which must be of the same form."""
    forms = {tuple(batch.tensors()) for batch in batches}
    if len(forms) > 1:
        shown = " and ".join(sorted(", ".join(form) for form in forms))
        raise ValueError(f"{name!r}: expected predictions of the same form for every batch; got {shown}.")
    draws = [batch.n_samples for batch in batches if batch.n_samples is not None]
    joined: dict[str, Any] = {key: torch.cat([getattr(batch, key) for batch in batches]) for key in next(iter(forms))}
    return BatchPrediction(**joined, n_samples=min(draws, default=None))


def as_prediction(
    name: str, predicted: BatchPrediction, sigma_noise: Any
) -> Tensor | PosteriorPredictive | Gaussian | tuple[Tensor, Tensor]:
    """Return predictions in a form that `calibration_report` reads; observation noise is added here only."""
    if predicted.probabilities is not None:
        if predicted.mutual_information is None:
            return predicted.probabilities
        return PosteriorPredictive(predicted.probabilities, predicted.mutual_information, predicted.logit_variance)
    mean, variance = predicted.mean, predicted.function_variance
    assert mean is not None  # for the type checker
    if predicted.standard_deviation is not None:
        return mean, predicted.standard_deviation
    if sigma_noise is None:
        raise ValueError(
            f"{name!r} has no observation noise; pass sigma_noise, the standard deviation of the targets around the "
            "function."
        )
    if variance is None:
        return mean, torch.as_tensor(sigma_noise, dtype=mean.dtype, device=mean.device).expand_as(mean).clone()
    if variance.ndim == 3:
        return Gaussian(mean, covariance=variance, observation_noise=sigma_noise)
    # rounding leaves tiny negative variances where the function is certain
    return Gaussian(mean, standard_deviation=variance.clamp_min(0).sqrt(), observation_noise=sigma_noise)


class Clock:
    """Sum of the wall times of the blocks that it is entered for, and their peak of GPU memory where they use one."""

    def __init__(self, device: torch.device | None):
        self.device = device if device is not None and device.type == "cuda" else None
        self.seconds = 0.0
        self.peak_bytes: int | None = None

    def __enter__(self) -> None:
        if self.device is not None:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.device is not None:
            torch.cuda.synchronize(self.device)
            self.peak_bytes = max(self.peak_bytes or 0, torch.cuda.max_memory_allocated(self.device))
        self.seconds += time.perf_counter() - self.started


def _read_batch(loaded: Any, keys: MappingKeys, *, with_targets: bool) -> tuple[Inputs, Tensor | None]:
    """Return inputs and targets of a batch, or inputs alone where targets are not asked for."""
    if with_targets:
        batch = as_batch(loaded, keys)
        return batch.inputs, batch.targets
    if isinstance(loaded, tuple | list) and len(loaded) in (1, 2):
        loaded = loaded[0]
    if isinstance(loaded, Mapping):
        return keys.inputs(loaded), None
    if isinstance(loaded, Tensor) and loaded.ndim > 0:
        return loaded, None
    raise ValueError(
        "Expected batches of inputs: tensors or mappings of tensors, with or without targets; got "
        f"{type(loaded).__name__}."
    )


def _check_finite(inputs: Inputs) -> None:
    for name, values in tensors_of(inputs).items():
        bad = ~values.isfinite()
        n_bad = int((bad.flatten(1).any(1) if bad.ndim > 1 else bad).sum())
        if n_bad:
            raise ValueError(f"Expected finite {name}; {n_bad} of {len(bad)} samples of a batch have NaN or infinity.")


def _own_copy(inputs: Inputs, device: torch.device | None) -> Inputs:
    """Copy inputs, so that a method may write into them without the next one seeing it."""
    return on_each(inputs, lambda t: t.to(device or t.device, copy=True))
