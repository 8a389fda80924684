"""Which posterior is closer to the full batch, by training samples that none of them was fitted to."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import NormalDist
from typing import Any

from debiased_laplace.calibration.comparisons import adjust_by_holm
from debiased_laplace.calibration.estimates import normal_quantile
from debiased_laplace.calibration.posteriors.summaries import HeldOutDifference, KLVerdict, PosteriorSummary
from debiased_laplace.debiasing.held_out_kl import HeldOutKL, KLDifference
from debiased_laplace.errors import NotFittedError, OverlapError
from debiased_laplace.posterior.fitted import FittedPosterior
from debiased_laplace.posterior.judging import held_out_kl


def judge_posteriors(
    posteriors: Mapping[str, Any],
    summaries: Mapping[str, PosteriorSummary],
    held_out_loader: Iterable[Any],
    fitted_loader: Iterable[Any] | Mapping[str, Iterable[Any]] | None,
    *,
    confidence_level: float,
    progress_bar: bool,
) -> dict[str, PosteriorSummary]:
    """The summaries with each posterior's distance to the full batch beside the first one's.

    Args:
        posteriors: by name.
        summaries: of the same.
        held_out_loader: training samples left out of every fit.
        fitted_loader: the samples that were fitted, of all or by name; laplace-torch's posteriors need it.
        confidence_level: of the intervals; 1 minus it is the level of the verdicts.
        progress_bar: show progress.

    Raises:
        OverlapError: if a held-out sample was fitted.
    """
    found: dict[str, HeldOutKL] = {}
    notes: dict[str, list[str]] = {name: [] for name in posteriors}
    for name, la in posteriors.items():
        fitted = fitted_loader.get(name) if isinstance(fitted_loader, Mapping) else fitted_loader
        complete = isinstance(la, FittedPosterior) and la.split.n_samples == la.n_data
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found[name] = held_out_kl(la, None if complete else held_out_loader, fitted, progress_bar=progress_bar)
            notes[name] += [str(w.message) for w in caught if w.category is UserWarning]
        except (OverlapError, NotFittedError):
            raise
        except (NotImplementedError, ValueError) as error:
            notes[name].append(f"No held-out KL: {error}")
    differences = _differences(found, notes)
    p_values = adjust_by_holm([_p_value(d) for d in differences.values()])
    judged = {
        name: _judge(next(iter(found)), d, p, confidence_level)
        for (name, d), p in zip(differences.items(), p_values, strict=True)
        if p is not None
    }
    return {
        name: replace(s, held_out=judged.get(name), notes=(*s.notes, *notes.get(name, ())))
        for name, s in summaries.items()
    }


def _differences(found: Mapping[str, HeldOutKL], notes: dict[str, list[str]]) -> dict[str, KLDifference]:
    """Of every posterior to the first one that could be judged."""
    if not found:
        return {}
    first, *others = found
    differences = {}
    for name in others:
        try:
            difference = found[name] - found[first]
        except ValueError as error:
            notes[name].append(f"Not comparable with {first} by held-out KL: {error}")
            continue
        if difference.standard_error < float("inf"):
            differences[name] = difference
        else:
            notes[name].append("No held-out KL: one held-out sample has no spread.")
    return differences


def _p_value(d: KLDifference) -> float:
    if d.standard_error == 0:
        return 1.0 if d.value == 0 else 0.0
    return 2 * NormalDist().cdf(-abs(d.value) / d.standard_error)


def _judge(first: str, d: KLDifference, p: float, level: float) -> HeldOutDifference:
    half = normal_quantile(level) * d.standard_error
    verdict: KLVerdict = "no detectable difference"
    if p < 1 - level:
        verdict = "closer" if d.value < 0 else "further"
    return HeldOutDifference(first, d.value, d.standard_error, d.value - half, d.value + half, p, verdict, d.n)
