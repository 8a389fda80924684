"""Class probabilities, checked, and reduced in portions: 100,000 samples of 1,000 classes are never copied whole."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from debiased_laplace.calibration.inputs import as_tensor, first_bad
from debiased_laplace.calibration.ties import RELATIVE, merge_ties

RANKED = ("confidence", "entropy", "mutual_information")
ROW_SUM_TOLERANCE = 1e-3
ROUNDING = 1e-12
NUMBERS_AT_ONCE = 1_000_000  # float64 numbers of one portion: 8 MB, about a processor's cache


@dataclass(frozen=True, eq=False)
class PosteriorPredictive:
    """Posterior mean of the class probabilities, with uncertainty scores that cannot be computed from it.

    Attributes:
        mean: over the posterior.
        mutual_information: between label and parameters, in nats.
        logit_variance: trace of the covariance of the centred logits; None if unknown.
    """

    mean: Shaped[Tensor, "n C"]
    mutual_information: Float[Tensor, " n"]
    logit_variance: Float[Tensor, " n"] | None = None


@dataclass(frozen=True, eq=False)
class Probabilities:
    """Distributions over C classes of n samples, or of S posterior samples of each.

    Attributes:
        values: in the dtype and on the device of the input; every row sums to 1 within 1e-3.
        mutual_information: of a `PosteriorPredictive`.
        logit_variance: of a `PosteriorPredictive`.
        temperature: divisor of the logits of every row, applied after averaging over posterior samples.
        logits: of the probabilities; None: their logarithms.
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
        """Floor of a probability inside a logarithm: the smallest normal number of the dtype, at least float32."""
        return torch.finfo(torch.float64 if self.values.dtype == torch.float64 else torch.float32).tiny

    def portions(self) -> Iterator[slice]:
        """Return slices of rows that fit in memory at once."""
        return portions_of(self.n, self.values.numel() // max(1, self.n))

    def read(self, rows: slice) -> Float[Tensor, "*S rows C"]:
        """Return rows in float64 that sum to 1 exactly."""
        if self.temperature is None:
            return _normalize(self.values[..., rows, :])
        temperature = self.temperature.to(self.values.device)[rows]
        return (self.take_logits(rows) / temperature[:, None]).softmax(dim=1)

    def take_logits(self, rows: Int[Tensor, " m"] | slice) -> Float[Tensor, "m C"]:
        """Return logits of some rows before scaling, in float64, shifted so that the largest of each row is 0.

        Probabilities below `smallest` count as `smallest`.
        """
        rows = rows if isinstance(rows, slice) else rows.to(self.values.device)
        if self.logits is not None:
            z = self.logits[rows].to(self.values.device, torch.float64)
        else:
            z = mean_prediction(_normalize(self.values[..., rows, :])).clamp_min_(self.smallest).log_()
        return z - z.amax(dim=1, keepdim=True)

    def log_probabilities(self, labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return the log probability of each row's label from the logits, on the CPU."""
        parts = []
        for rows in self.portions():
            z = self.take_logits(rows)
            z = z if self.temperature is None else z / self.temperature[rows].to(z.device)[:, None]
            parts.append(z.log_softmax(dim=1).gather(1, labels[rows].to(z.device)[:, None])[:, 0].cpu())
        return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class ClassBins:
    """Sums over bins of equal width of each class's probability p, closed on the left, the last on both sides.

    Attributes:
        positives: number of samples of the class.
        confidence: sum of p.
        variance: sum of p (1 - p).
    """

    positives: Float[Tensor, "C bins"]
    confidence: Float[Tensor, "C bins"]
    variance: Float[Tensor, "C bins"]


@dataclass(frozen=True, eq=False)
class ClassificationPredictions:
    """Class probabilities of one method on a labelled test set; vectors are float64 on the CPU.

    Attributes:
        predicted: most probable class.
        squared_norm: sum of the squared probabilities.
        uncertainty: as of `uncertainty_scores`.
        source: the probabilities as given.
    """

    targets: Int[Tensor, " n"]
    predicted: Int[Tensor, " n"]
    true_class_probability: Float[Tensor, " n"]
    squared_norm: Float[Tensor, " n"]
    uncertainty: dict[str, Float[Tensor, " n"]]
    class_bins: ClassBins
    source: Probabilities

    @property
    def n(self) -> int:
        """Number of test samples."""
        return self.targets.numel()

    @property
    def confidence(self) -> Float[Tensor, " n"]:
        """Probability of the predicted class."""
        return self.uncertainty["confidence"]

    @cached_property
    def correct(self) -> Float[Tensor, " n"]:
        """1 where the predicted class is the true one, else 0."""
        return (self.predicted == self.targets).to(torch.float64)

    @property
    def n_impossible(self) -> int:
        """Number of samples whose true class has a probability that counts as 0; none where logits are known."""
        return 0 if self.source.logits is not None else int((self.true_class_probability < self.source.smallest).sum())


def mean_prediction(p: Float[Tensor, "*S rows C"]) -> Float[Tensor, "rows C"]:
    """Average over posterior samples, if there are any."""
    return p.mean(dim=0) if p.ndim == 3 else p


def portions_of(n: int, numbers_per_row: int) -> Iterator[slice]:
    """Return slices of n rows that fit in memory at once."""
    size = max(1, NUMBERS_AT_ONCE // max(1, numbers_per_row))
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def inner_edges(n_bins: int) -> Float[Tensor, " edges"]:
    """Return the edges between bins of equal width on [0, 1]."""
    # netcal's: torch.linspace differs in the last digit
    return torch.from_numpy(np.linspace(0.0, 1.0, n_bins + 1)[1:-1].copy())


def draw_rows(n: int, most: int, *, seed: int) -> Int[Tensor, " rows"]:
    """Draw `most` of n rows without replacement, in rising order; return all where there are no more."""
    if n <= most:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def reduce_classification(
    probabilities: Probabilities, labels: Int[Tensor, " n"], *, n_bins: int
) -> ClassificationPredictions:
    """Reduce probabilities and labels to a few numbers per sample and class.

    Cost: one pass over the probabilities on their own device, in float64 and in portions of 8 MB.
    """
    device = probabilities.values.device
    labels, edges, portions = labels.to(device), inner_edges(n_bins).to(device), []
    bins = torch.zeros(3, probabilities.n_classes, n_bins, dtype=torch.float64, device=device)
    for rows in probabilities.portions():
        p, true = probabilities.read(rows), labels[rows]
        mean = mean_prediction(p)
        bins += _sum_over_bins(mean, true, edges)
        portion = _score(p) | {
            # the first of classes whose probabilities differ by rounding
            "predicted": (mean >= (1 - RELATIVE) * mean.amax(dim=1, keepdim=True)).int().argmax(dim=1),
            "true_class_probability": mean.gather(1, true[:, None])[:, 0],
            "squared_norm": mean.square().sum(dim=1),
        }
        portions.append(portion)
    vectors = _join(portions, probabilities)
    return ClassificationPredictions(
        labels.cpu(),
        predicted=vectors.pop("predicted"),
        true_class_probability=vectors.pop("true_class_probability"),
        squared_norm=vectors.pop("squared_norm"),
        uncertainty=vectors,
        class_bins=ClassBins(*bins.cpu()),
        source=probabilities,
    )


def uncertainty_scores(probabilities: Probabilities) -> dict[str, Float[Tensor, " n"]]:
    """Return confidence, entropy and, if known, mutual information of every sample, on the CPU.

    References:
        Houlsby, Huszár, Ghahramani, Lengyel (2011), arXiv 1112.5745 (mutual information).
    """
    return _join([_score(probabilities.read(rows)) for rows in probabilities.portions()], probabilities)


def _join(portions: list[dict[str, Tensor]], probabilities: Probabilities) -> dict[str, Tensor]:
    vectors = {name: torch.cat([portion[name] for portion in portions]).cpu() for name in portions[0]}
    vectors = {name: merge_ties(x) if name in RANKED else x for name, x in vectors.items()}
    known = probabilities.mutual_information
    return vectors if known is None else vectors | {"mutual_information": known}


def _score(p: Float[Tensor, "*S rows C"]) -> dict[str, Float[Tensor, " rows"]]:
    mean = mean_prediction(p)
    entropy = torch.special.entr(mean).sum(dim=-1)
    scores = {"confidence": mean.max(dim=1).values, "entropy": entropy}
    if p.ndim == 3:
        # a difference of two entropies; rounding may leave it below zero
        scores["mutual_information"] = (entropy - torch.special.entr(p).sum(dim=-1).mean(dim=0)).clamp_min(0.0)
    return scores


def _sum_over_bins(
    p: Float[Tensor, "rows C"], labels: Int[Tensor, " rows"], edges: Float[Tensor, " edges"]
) -> Float[Tensor, "3 C bins"]:
    """Return the sums of `ClassBins` over some rows."""
    C, n_bins = p.shape[1], len(edges) + 1
    # fewer than n_bins probabilities of a row lie beyond the first bin, and only these are sorted into bins
    place = (p >= edges[0]).flatten().nonzero()[:, 0]
    others, first = p.flatten()[place], p.flatten().index_fill(0, place, 0.0).view_as(p)
    cell = place % C * n_bins + torch.bucketize(others, edges, right=True)
    true = labels * n_bins + torch.bucketize(p.gather(1, labels[:, None])[:, 0], edges, right=True)
    sums = [torch.bincount(true, minlength=C * n_bins).to(p.dtype)]
    sums += [torch.bincount(cell, weights=x, minlength=C * n_bins) for x in (others, others * (1 - others))]
    bins = torch.stack(sums).view(3, C, n_bins)
    bins[1, :, 0] = first.sum(dim=0)
    bins[2, :, 0] = bins[1, :, 0] - first.square().sum(dim=0)
    return bins


def read_probabilities(method: str, probabilities: Any, *, task: Literal["binary", "multiclass"]) -> Probabilities:
    """Check class probabilities (n, C), samples (S, n, C) of them, or for a binary task (n,) = P(class 1)."""
    if isinstance(probabilities, PosteriorPredictive):
        mean = read_probabilities(method, probabilities.mean, task=task)
        scores = (probabilities.mutual_information, probabilities.logit_variance)
        return Probabilities(mean.values, *(s if s is None else s.detach().to("cpu", torch.float64) for s in scores))
    where = f"Predictions of {method!r}"
    p = as_tensor(probabilities, where)
    p = p if p.is_floating_point() else p.to(torch.float64)
    if task == "binary" and p.ndim == 2 and p.shape[1] == 1:
        p = p[:, 0]
    if task == "binary" and p.ndim == 1:
        _check_range(p[:, None], where, 0)
        p = torch.stack([1 - p.clamp(max=1), p.clamp(max=1)], dim=1)
    expected = "(n, C) with C >= 2" if task == "multiclass" else "(n,) or (n, 2)"
    if p.ndim not in (2, 3) or p.shape[-1] < 2 or (task == "binary" and p.shape[-1] != 2):
        hint = " For P(class 1) alone say task='binary'." if task == "multiclass" and p.shape[-1:] == (1,) else ""
        raise ValueError(
            f"{where}: task {task!r} takes probabilities of shape {expected}, or samples (S, n, C) of them; "
            f"got {tuple(p.shape)}.{hint}"
        )
    if p.numel() == 0:
        raise ValueError(f"{where}: at least one sample is needed; got shape {tuple(p.shape)}.")
    _check_rows(p.reshape(-1, p.shape[-1]), where)
    return Probabilities(p)


def _normalize(values: Shaped[Tensor, "*S rows C"]) -> Float[Tensor, "*S rows C"]:
    p = values.to(torch.float64).clamp_min(0.0)
    sums = p.sum(dim=-1, keepdim=True)
    # rows that sum to 1 up to rounding stay as they are: a last digit can move a value across a bin's edge
    return p.div_(torch.where((sums - 1).abs() <= ROUNDING, 1.0, sums))


def _check_rows(p: Tensor, where: str) -> None:
    """Check that rows are distributions."""
    for rows in portions_of(p.shape[0], p.shape[1]):
        low, high = torch.aminmax(p[rows])  # NaN if anything is
        if not bool((low >= 0) & (high <= 1)):
            _check_range(p[rows], where, rows.start)
        sums = p[rows].sum(dim=1, dtype=torch.float64)
        worst = int((sums - 1).abs().argmax())
        tolerance = max(ROW_SUM_TOLERANCE, 4 * torch.finfo(p.dtype).eps)  # of bfloat16 a few units in the last place
        if abs(sums[worst].item() - 1) > tolerance:
            raise ValueError(
                f"{where}: every row must sum to 1 within {tolerance:g}; row {rows.start + worst} sums to "
                f"{sums[worst].item():.6g}. Logits need a softmax first."
            )


def _check_range(p: Tensor, where: str, first_row: int) -> None:
    """Check that numbers are probabilities."""
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
