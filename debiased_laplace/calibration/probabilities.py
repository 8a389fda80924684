"""Class probabilities, checked, and reduced in portions: 100,000 samples of 1,000 classes never stand twice."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from debiased_laplace.calibration.inputs import as_tensor, first_bad

ROW_SUM_TOLERANCE = 1e-3
ROUNDING = 1e-12
NUMBERS_AT_ONCE = 1_000_000  # float64 numbers of one portion: 8 MB, about a processor's cache


@dataclass(frozen=True, eq=False)
class PosteriorPredictive:
    """Posterior mean of the class probabilities, with uncertainty scores that cannot be computed from it.

    Attributes:
        mean: over the posterior.
        mutual_information: between label and parameters, in nats.
        logit_variance: trace of the covariance of the centred logits; None where it is not known.
    """

    mean: Shaped[Tensor, "n C"]
    mutual_information: Float[Tensor, " n"]
    logit_variance: Float[Tensor, " n"] | None = None


@dataclass(frozen=True, eq=False)
class Probabilities:
    """Distributions over C classes of n samples, or of S posterior samples of each.

    Attributes:
        values: (n, C) or (S, n, C), in the dtype and on the device they came in; every row sums to 1 within 1e-3.
        mutual_information: of a posterior that was reduced to its mean before; None where it is not known.
        logit_variance: total variance of the centred logits; None where it is not known.
        temperature: by which the logits of every row are divided, after posterior samples were averaged; None where the
            probabilities stand as they came.
        logits: from which the probabilities came, where they are known; else these are logarithms.
    """

    values: Shaped[Tensor, "*S n C"]
    mutual_information: Float[Tensor, " n"] | None = None
    logit_variance: Float[Tensor, " n"] | None = None
    temperature: Float[Tensor, " n"] | None = None
    logits: Shaped[Tensor, "n C"] | None = None

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.values.shape[-2]

    @property
    def n_classes(self) -> int:
        """Number of classes C."""
        return self.values.shape[-1]

    @property
    def smallest(self) -> float:
        """Floor of a probability inside a logarithm: the smallest normal number of their dtype."""
        # half precision keeps subnormals below its own tiny; float32's floor is below all of them
        dtype = self.values.dtype
        return torch.finfo(dtype if dtype in (torch.float32, torch.float64) else torch.float32).tiny

    def portions(self) -> Iterator[slice]:
        """Slices of rows that fit in memory at once."""
        return portions_of(self.n, self.values.numel() // max(1, self.n))

    def read(self, rows: slice) -> Float[Tensor, "*S rows C"]:
        """Rows in float64 that sum to 1 exactly."""
        if self.temperature is None:
            return _normalize(self.values[..., rows, :])
        temperature = self.temperature.to(self.values.device)[rows]
        return (self.take_logits(rows) / temperature[:, None]).softmax(dim=1)

    def take_logits(self, rows: Int[Tensor, " m"] | slice) -> Float[Tensor, "m C"]:
        """Logits of chosen rows before any temperature, in float64, the largest of each row being 0.

        A probability of 0 counts as the smallest one.
        """
        rows = rows if isinstance(rows, slice) else rows.to(self.values.device)
        if self.logits is not None:
            z = self.logits[rows].to(self.values.device, torch.float64)
        else:
            z = mean_prediction(_normalize(self.values[..., rows, :])).clamp_min_(self.smallest).log_()
        return z - z.amax(dim=1, keepdim=True)


@dataclass(frozen=True, eq=False)
class ClassBins:
    """Each class's probability over bins of equal width, closed on the left, the last on both sides.

    `positives` counts a bin's samples of the class, `confidence` sums its probabilities p, `variance` p (1 - p).
    """

    positives: Float[Tensor, "C bins"]
    confidence: Float[Tensor, "C bins"]
    variance: Float[Tensor, "C bins"]


@dataclass(frozen=True, eq=False)
class ClassificationPredictions:
    """Class probabilities of one method on a labelled test set; vectors are float64 on the CPU.

    Attributes:
        predicted: most probable class, and `confidence`, its probability.
        squared_norm: sum of the squared probabilities.
        entropy: of the mean prediction, in nats.
        mutual_information: between label and parameters; None where only the mean is known.
        class_bins: every class's probability in bins.
        source: the probabilities as they came.
    """

    targets: Int[Tensor, " n"]
    predicted: Int[Tensor, " n"]
    confidence: Float[Tensor, " n"]
    true_class_probability: Float[Tensor, " n"]
    squared_norm: Float[Tensor, " n"]
    entropy: Float[Tensor, " n"]
    mutual_information: Float[Tensor, " n"] | None
    class_bins: ClassBins
    source: Probabilities

    @property
    def n(self) -> int:
        """Number of test samples."""
        return self.targets.numel()

    @property
    def uncertainty(self) -> dict[str, Float[Tensor, " n"]]:
        """What `uncertainty_scores` returns."""
        scores = {"confidence": self.confidence, "entropy": self.entropy}
        information = self.mutual_information
        return scores if information is None else scores | {"mutual_information": information}

    @cached_property
    def correct(self) -> Float[Tensor, " n"]:
        """1 where the predicted class is the true one, else 0."""
        return (self.predicted == self.targets).to(torch.float64)

    @property
    def n_impossible(self) -> int:
        """Samples whose true class was given probability 0, or less than a float can say."""
        return int((self.true_class_probability < self.source.smallest).sum())


def mean_prediction(p: Float[Tensor, "*S rows C"]) -> Float[Tensor, "rows C"]:
    """Average over posterior samples, where there are any."""
    return p.mean(dim=0) if p.ndim == 3 else p


def portions_of(n: int, numbers_per_row: int) -> Iterator[slice]:
    """Slices of n rows that fit in memory at once."""
    size = max(1, NUMBERS_AT_ONCE // max(1, numbers_per_row))
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def inner_edges(n_bins: int) -> Float[Tensor, " edges"]:
    """Edges between bins of equal width on [0, 1], netcal's: torch.linspace differs in the last digit."""
    return torch.from_numpy(np.linspace(0.0, 1.0, n_bins + 1)[1:-1].copy())


def draw_rows(n: int, most: int, *, seed: int) -> Int[Tensor, " rows"]:
    """All rows, or `most` of them in rising order, each equally likely."""
    if n <= most:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def reduce_classification(
    probabilities: Probabilities, labels: Int[Tensor, " n"], *, n_bins: int
) -> ClassificationPredictions:
    """Reduce probabilities and labels to a few numbers per sample and class.

    Cost: one pass over the probabilities on their own device, in float64 and in portions of 8 MB.
    """
    labels = labels.to(probabilities.values.device)
    bins = _ClassBinSums(probabilities.n_classes, n_bins, labels.device)
    parts: dict[str, list[Tensor]] = {}
    for rows in probabilities.portions():
        p, true = probabilities.read(rows), labels[rows]
        mean = mean_prediction(p)
        squares = mean.square()
        bins.add(mean, squares, true)
        portion = _scores(p) | {
            "predicted": mean.argmax(dim=1),
            "true_class_probability": mean.gather(1, true[:, None])[:, 0],
            "squared_norm": squares.sum(dim=1),
        }
        for name, values in portion.items():
            parts.setdefault(name, []).append(values)
    vectors = {name: torch.cat(values).cpu() for name, values in parts.items()}
    information = vectors.pop("mutual_information", probabilities.mutual_information)
    return ClassificationPredictions(
        targets=labels.cpu(),
        mutual_information=information,
        class_bins=bins.finish(),
        source=probabilities,
        **vectors,
    )


def uncertainty_scores(probabilities: Probabilities) -> dict[str, Float[Tensor, " n"]]:
    """Confidence, entropy and, where it is known, mutual information of every sample, on the CPU.

    References:
        Houlsby, Huszár, Ghahramani, Lengyel (2011), arXiv 1112.5745 (mutual information).
    """
    portions = [_scores(probabilities.read(rows)) for rows in probabilities.portions()]
    scores = {name: torch.cat([portion[name] for portion in portions]).cpu() for name in portions[0]}
    if probabilities.mutual_information is not None:
        scores["mutual_information"] = probabilities.mutual_information
    return scores


def _scores(p: Float[Tensor, "*S rows C"]) -> dict[str, Float[Tensor, " rows"]]:
    mean = mean_prediction(p)
    entropy = torch.special.entr(mean).sum(dim=-1)
    scores = {"confidence": mean.max(dim=1).values, "entropy": entropy}
    if p.ndim == 3:
        # a difference of two entropies; rounding may leave it below zero
        scores["mutual_information"] = (entropy - torch.special.entr(p).sum(dim=-1).mean(dim=0)).clamp_min(0.0)
    return scores


class _ClassBinSums:
    """Sums of `ClassBins` over portions of rows.

    A row sums to 1, so that fewer than `n_bins` of its probabilities lie beyond the first bin. Only these are sorted
    into bins; the first bin is the rest of each class's total. At 1,000 classes that spares most of the work.
    """

    def __init__(self, n_classes: int, n_bins: int, device: torch.device) -> None:
        self.shape = (n_classes, n_bins)
        self.sums = torch.zeros(4, n_classes * n_bins, dtype=torch.float64, device=device)
        self.totals = torch.zeros(2, n_classes, dtype=torch.float64, device=device)
        self.edges = inner_edges(n_bins).to(device)
        self.n = 0

    def add(self, p: Float[Tensor, "rows C"], squares: Float[Tensor, "rows C"], labels: Int[Tensor, " rows"]) -> None:
        n_classes, n_bins = self.shape
        self.n += len(p)
        self.totals += torch.stack([p.sum(dim=0), squares.sum(dim=0)])
        place = (p >= self.edges[0]).flatten().nonzero()[:, 0]
        high = p.flatten()[place]
        cell = (place % n_classes) * n_bins + torch.bucketize(high, self.edges, right=True)
        self.sums[:3].index_add_(1, cell, torch.stack([high, high.square(), torch.ones_like(high)]))
        true = p.gather(1, labels[:, None])[:, 0]
        cell = labels * n_bins + torch.bucketize(true, self.edges, right=True)
        self.sums[3].index_add_(0, cell, torch.ones_like(true))

    def finish(self) -> ClassBins:
        confidence, squares, counts, positives = self.sums.cpu().view(4, *self.shape)
        occupied = self.n > counts[:, 1:].sum(dim=1)
        for sums, total in zip((confidence, squares), self.totals.cpu(), strict=True):
            rest = (total - sums[:, 1:].sum(dim=1)).clamp_min(0.0)
            sums[:, 0] = torch.where(occupied, rest, torch.zeros_like(rest))  # an empty bin has no rounding
        return ClassBins(positives, confidence, (confidence - squares).clamp_min(0.0))


def read_probabilities(method: str, probabilities: Any, *, task: Literal["binary", "multiclass"]) -> Probabilities:
    """Check class probabilities (n, C), samples (S, n, C) of them, or for a binary task (n,) = P(class 1)."""
    if isinstance(probabilities, PosteriorPredictive):
        mean = read_probabilities(method, probabilities.mean, task=task)
        scores = (probabilities.mutual_information, probabilities.logit_variance)
        return Probabilities(mean.values, *(s if s is None else s.detach().to("cpu", torch.float64) for s in scores))
    where = f"Predictions of {method!r}"
    p = as_tensor(probabilities, where)
    p = p if p.is_floating_point() else p.to(torch.float64)
    if task == "binary" and p.ndim == 1:
        _check_range(p[:, None], where, 0)
        p = torch.stack([1 - p.clamp(max=1), p.clamp(max=1)], dim=1)
    expected = "(n, C) with C >= 2" if task == "multiclass" else "(n,) or (n, 2)"
    if p.ndim not in (2, 3) or p.shape[-1] < 2 or (task == "binary" and p.shape[-1] != 2):
        raise ValueError(
            f"{where}: task {task!r} takes probabilities of shape {expected}, or samples (S, n, C) of them; "
            f"got {tuple(p.shape)}."
        )
    if p.numel() == 0:
        raise ValueError(f"{where}: at least one sample is needed; got shape {tuple(p.shape)}.")
    _check_rows(p.reshape(-1, p.shape[-1]), where)
    return Probabilities(p)


def _normalize(values: Shaped[Tensor, "*S rows C"]) -> Float[Tensor, "*S rows C"]:
    p = values.to(torch.float64).clamp_min(0.0)
    sums = p.sum(dim=-1, keepdim=True)
    # rows that sum to 1 up to rounding stay as they are: a last digit can move a value across a bin's edge
    return p.div_(torch.where((sums - 1).abs() <= ROUNDING, torch.ones_like(sums), sums))


def _check_rows(p: Tensor, where: str) -> None:
    """Refuse rows that are no distributions. A row is looked at closely only where a quick look finds something."""
    for rows in portions_of(p.shape[0], p.shape[1]):
        low, high = torch.aminmax(p[rows])  # NaN if anything is
        sums = p[rows].sum(dim=1, dtype=torch.float64)
        if bool((low >= 0) & (high <= 1) & ((sums - 1).abs() <= ROW_SUM_TOLERANCE).all()):
            continue
        _check_range(p[rows], where, rows.start)
        worst = int((sums - 1).abs().argmax())
        if abs(sums[worst].item() - 1) > ROW_SUM_TOLERANCE:
            raise ValueError(
                f"{where}: every row must sum to 1 within {ROW_SUM_TOLERANCE}; row {rows.start + worst} sums to "
                f"{sums[worst].item():.6g}. Logits need a softmax first."
            )


def _check_range(p: Tensor, where: str, first_row: int) -> None:
    """Refuse numbers that are no probabilities."""
    p = p.to(torch.float64)
    if not bool(p.isfinite().all()):
        raise ValueError(f"{where}: probabilities must be finite; {first_bad(~p.isfinite(), first_row)}.")
    outside = (p < 0) | (p > 1 + ROW_SUM_TOLERANCE)
    if bool(outside.any()):
        looks_like = "If these are logits, apply a softmax (or a sigmoid) first."
        if p.shape[1] > 1 and bool(((p.exp().sum(dim=1) - 1).abs() <= ROW_SUM_TOLERANCE).all()):
            looks_like = "These look like log-probabilities: take their exponential first."
        raise ValueError(
            f"{where}: probabilities must lie in [0, 1]; {first_bad(outside, first_row)} "
            f"(range {p.min().item():.6g} to {p.max().item():.6g}). {looks_like}"
        )
