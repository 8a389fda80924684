"""One pass over a loader: every method sees the same inputs and the same random numbers."""

import time
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.calibration.predicting.pieces import Piece, compact, join_pieces
from debiased_laplace.calibration.predicting.predictors import Predictor
from debiased_laplace.data.batches import as_batch
from debiased_laplace.data.inputs import Inputs, MappingKeys, n_samples_of, on_each, tensors_of
from debiased_laplace.data.randomness import undisturbed_randomness


@dataclass(frozen=True, eq=False)
class Collected:
    """What the methods said of the samples of a loader; everything is on the CPU.

    Attributes:
        pieces: method to its predictions.
        targets: of the samples; None where they were not asked for.
        seconds: method to the wall time of its predictions.
        peak_bytes: method to the most GPU memory in use while it predicted; None for one that is on no GPU.
    """

    pieces: Mapping[str, Piece]
    targets: Tensor | None
    seconds: Mapping[str, float]
    peak_bytes: Mapping[str, int | None]


def collect(
    predictors: Mapping[str, Predictor],
    loader: Iterable[Any],
    keys: MappingKeys,
    *,
    with_targets: bool = True,
    seed: int,
    progress_bar: bool,
    label: str = "[Predicting]",
) -> Collected:
    """Predict with every method, batch by batch, in one pass.

    The global generators are seeded for the pass, and anew for each method and batch, so that what one method draws
    changes neither the loader's augmentation nor another method's draws; afterwards they are as they were.

    Args:
        predictors: the methods.
        loader: an iterable of batches.
        keys: where a mapping holds what.
        with_targets: whether batches have targets; otherwise inputs alone are taken too.
        seed: of everything that is drawn.
        progress_bar: show progress.
        label: of the progress bar.

    Raises:
        ValueError: if the loader yields nothing or something that is no batch, or a method fails on it.
    """
    kept: dict[str, list[Piece]] = {name: [] for name in predictors}
    clocks = {name: _Clock(p.device) for name, p in predictors.items()}
    targets = []
    with torch.inference_mode(False), undisturbed_randomness(seed):
        n_batches = len(loader) if isinstance(loader, Sized) else None
        for loaded in tqdm(loader, total=n_batches, desc=label, disable=not progress_bar):
            inputs, y = _read(loaded, keys, with_targets=with_targets)
            if n_samples_of(inputs) == 0:
                continue
            if y is not None:
                targets.append(y.detach().to("cpu", copy=True))
            for name, predictor in predictors.items():
                with undisturbed_randomness(seed), clocks[name]:
                    piece = predictor.predict(_own_copy(inputs, predictor.device))
                kept[name].append(compact(piece))
    if not next(iter(kept.values())):
        raise ValueError(f"The loader yields no samples to predict; got {type(loader).__name__}.")
    pieces = {}
    for name in predictors:
        pieces[name] = join_pieces(kept.pop(name))
    return Collected(
        pieces,
        torch.cat(targets) if with_targets else None,
        {name: clock.seconds for name, clock in clocks.items()},
        {name: clock.peak_bytes for name, clock in clocks.items()},
    )


class _Clock:
    """Adds up wall time, and the peak of the memory of a GPU, over the blocks that it is entered for."""

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


def _read(loaded: Any, keys: MappingKeys, *, with_targets: bool) -> tuple[Inputs, Tensor | None]:
    """Inputs and targets of a batch, or inputs alone where nobody asks for targets."""
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


def _own_copy(inputs: Inputs, device: torch.device | None) -> Inputs:
    """Inputs that a method may write into without the next one seeing it."""
    copies = on_each(inputs, lambda t: t.to(device or t.device, copy=True))
    for name, values in tensors_of(copies).items():
        if values.is_floating_point() and not bool(values.isfinite().all()):
            bad = (
                int((~values.isfinite()).flatten(1).any(1).sum())
                if values.ndim > 1
                else int((~values.isfinite()).sum())
            )
            raise ValueError(f"Expected finite {name}; {bad} of {len(values)} samples of a batch have NaN or infinity.")
    return copies
