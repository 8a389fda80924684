"""Summaries of Laplace posteriors, and their differences in held-out KL."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from laplace.baselaplace import BaseLaplace
from torch import Tensor

from debiased_laplace.calibration.contents import (
    DirectionSummary,
    HeldOutDifference,
    KLVerdict,
    PosteriorSummary,
    Scalar,
    SpectrumPoint,
    Verdict,
)
from debiased_laplace.calibration.formatting import format_count, format_seconds
from debiased_laplace.calibration.intervals import adjust_by_holm, judge_difference, normal_quantile, two_sided_p_value
from debiased_laplace.calibration.predictors import preserve_state
from debiased_laplace.debiasing.held_out_kl import HeldOutKL, KLDifference
from debiased_laplace.errors import NotFittedError, OverlapError
from debiased_laplace.posterior.candidates import Candidate, debiased_candidate
from debiased_laplace.posterior.fitted import FittedPosterior
from debiased_laplace.posterior.judging import held_out_kl
from debiased_laplace.posterior.laplace_torch import laplace_torch_candidate
from debiased_laplace.posterior.parametric import DebiasedParametricLaplace

MOST_DIRECTIONS, MOST_SPECTRUM = 24, 100
ROUNDING = 1e-7  # of the largest value
LARGEST_DENSE = 3000  # parameters of a dense precision whose eigenvalues are still worth their time
FACTS = (
    *("class", "weights", "structure", "curvature", "computed by", "parameters", "data set, N"),
    *("samples for the curvature", "directions", "curvature along them", "curvature outside them", "metric"),
    *("prior precision", "observation noise", "temperature"),
    *("effective parameters", "log marginal likelihood", "time of the fit"),
)
"""The order in which facts are shown."""
CLOSENESS: dict[Verdict, KLVerdict] = {
    "better": "closer",
    "worse": "further",
    "no detectable difference": "no detectable difference",
}
MAGNITUDES = {
    "held_out": "from other samples (held_out)",
    "cross_fitted": "from other folds (cross_fitted)",
    "same_batch": "from the same samples (same_batch)",
}


def summarize_posteriors(posteriors: Mapping[str, Any], confidence_level: float) -> dict[str, PosteriorSummary]:
    """Summarize posteriors by name; what is a summary already stays as it is."""
    return {
        str(name): p if isinstance(p, PosteriorSummary) else summarize_posterior(str(name), p, confidence_level)
        for name, p in posteriors.items()
    }


def summarize_posterior(name: str, la: Any, confidence_level: float = 0.95) -> PosteriorSummary:
    """Summarize what was fitted, as far as it is known.

    Cost: no pass over data. Of a posterior with a dense precision of more than 3,000 parameters, whatever needs its
    eigenvalues is left out.
    """
    if not isinstance(la, BaseLaplace):
        raise ValueError(f"{name!r} must be a Laplace posterior or a PosteriorSummary; got {type(la).__name__}.")
    if not getattr(la, "n_data", True):
        raise NotFittedError(f"{name!r} is not fitted; call fit() first.")
    notes: list[str] = []
    directions: tuple[DirectionSummary, ...] = ()
    spectrum: tuple[SpectrumPoint, ...] = ()
    prior = torch.as_tensor(la.prior_precision).detach().double()
    prior_range = (float(prior.min()), float(prior.max()))
    with torch.inference_mode(False), preserve_state(getattr(la, "model", None)):
        facts = _describe(la, prior_range)
        facts["log marginal likelihood"] = _log_marginal_likelihood(la, notes)
        candidate = _find_candidate(la, notes)
        if candidate is not None:
            facts |= _describe_candidate(candidate)
        if isinstance(la, DebiasedParametricLaplace):
            facts |= _describe_fit(la)
            if la.fitted.estimate.magnitudes.n_floored:
                notes.append(f"{la.fitted.estimate.magnitudes.n_floored} curvatures were below zero and count as zero.")
            if la.fitted.options.magnitudes != "same_batch":
                directions = _select_directions(la, confidence_level, notes)
            scale = la.n_data / (_number(la.sigma_noise) ** 2 * la.temperature)
            spectrum = _select_spectrum(scale * la.directional_curvatures.detach().double())
        elif candidate is not None:
            spectrum = _select_spectrum(_data_precisions(la, candidate))
    known = {label: value for label in FACTS if (value := facts.get(label)) is not None}
    return PosteriorSummary(known, prior_range, directions, spectrum, notes=tuple(notes))


def compare_held_out(
    posteriors: Mapping[str, Any],
    summaries: Mapping[str, PosteriorSummary],
    held_out_loader: Iterable[Any],
    fitted_loader: Iterable[Any] | Mapping[str, Iterable[Any]] | None,
    confidence_level: float,
    progress_bar: bool = False,
) -> dict[str, PosteriorSummary]:
    """Add to summaries how much further from the full batch each posterior is than the first, by held-out KL.

    Posteriors of laplace-torch need the samples that were fitted, of all or by name; 1 minus `confidence_level` is the
    level of the verdicts.
    """
    found: dict[str, HeldOutKL] = {}
    notes: dict[str, list[str]] = {name: [] for name in summaries}
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
    compared = _subtract_first(found, notes, confidence_level)
    return {
        name: replace(s, held_out=compared.get(name), notes=(*s.notes, *notes[name])) for name, s in summaries.items()
    }


def _subtract_first(
    found: Mapping[str, HeldOutKL], notes: dict[str, list[str]], level: float
) -> dict[str, HeldOutDifference]:
    """Return each held-out KL minus the first one that there is, with verdicts after Holm's adjustment."""
    first, differences = next(iter(found), ""), dict[str, KLDifference]()
    for name in list(found)[1:]:
        try:
            difference = found[name] - found[first]
        except ValueError as error:
            notes[name].append(f"Not comparable with {first} by held-out KL: {error}")
            continue
        if difference.standard_error < float("inf"):
            differences[name] = difference
        else:
            notes[name].append("No held-out KL: one held-out sample has no spread.")
    single = [two_sided_p_value(d.value, d.standard_error, None) for d in differences.values()]
    compared = {}
    for (name, d), p in zip(differences.items(), adjust_by_holm([*single]), strict=True):
        assert p is not None  # for the type checker: every one is a test
        half = normal_quantile(level) * d.standard_error
        ends, verdict = (d.value - half, d.value + half), CLOSENESS[judge_difference(d.value, p, level=1 - level)]
        compared[name] = HeldOutDifference(first, d.value, d.standard_error, *ends, p, verdict, d.n)
    return compared


def _describe(la: BaseLaplace, prior_range: tuple[float, float]) -> dict[str, Scalar | None]:
    """Return what every posterior knows of itself."""
    weights, structure = getattr(type(la), "_key", (None, None))
    low, high = prior_range
    temperature = _number(la.temperature)
    regression = str(getattr(la.likelihood, "value", la.likelihood)) == "regression"
    return {
        "class": type(la).__name__,
        "weights": None if weights is None else str(weights),
        "structure": None if structure is None else str(structure),
        "data set, N": getattr(la, "n_data", None),
        "prior precision": low if low == high else f"{low:.4g} to {high:.4g}",
        "observation noise": _number(la.sigma_noise) if regression else None,
        "temperature": temperature if temperature != 1 else None,
    }


def _describe_candidate(candidate: Candidate) -> dict[str, Scalar | None]:
    """Return what the precision as an operator, and the full batch that it belongs to, say."""
    target = candidate.target
    P = target.selection.n_parameters
    return {
        "weights": target.selection.subset,
        "curvature": target.choice.kind,
        "parameters": P,
        # P - tr(P0 P̂^-1) = tr(N τ H P̂^-1)
        "effective parameters": max(0.0, P - candidate.terms.prior_trace),
    }


def _describe_fit(la: DebiasedParametricLaplace) -> dict[str, Scalar | None]:
    """Return what a posterior of this package knows of its split and its directions."""
    options, split = la.fitted.options, la.fitted.split
    n_directions, n_magnitudes = len(split.direction_indices), len(split.magnitude_indices)
    samples = f"{format_count(n_directions)} for directions, {format_count(n_magnitudes)} for magnitudes"
    facts: dict[str, Scalar | None] = {
        "computed by": la.curvature_source,
        "structure": options.structure,
        "samples for the curvature": n_directions if split.shared else samples,
        "directions": la.rank,
        "curvature along them": MAGNITUDES[options.magnitudes],
        "time of the fit": None if la.fitted.seconds is None else format_seconds(la.fitted.seconds),
    }
    if options.structure == "lowrank":
        share = _share_outside(la) if options.complement != "none" else None
        of_trace = "" if share is None else f", {100 * share:.2g} % of the trace"
        facts["curvature outside them"] = options.complement + of_trace
        facts["metric"] = options.metric if options.metric != "euclidean" else None
    return facts


def _number(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _log_marginal_likelihood(la: BaseLaplace, notes: list[str]) -> float | None:
    try:
        evidence = float(la.log_marginal_likelihood().detach())
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        notes.append(f"No log marginal likelihood: {_first_line(error)}")
        return None
    if not abs(evidence) < float("inf"):
        notes.append("No log marginal likelihood: it is not finite.")
        return None
    return evidence


def _find_candidate(la: BaseLaplace, notes: list[str]) -> Candidate | None:
    """Return the precision as an operator, where there is one that can be afforded."""
    H, ours = getattr(la, "H", None), isinstance(la, DebiasedParametricLaplace)
    if not ours and isinstance(H, Tensor) and H.ndim == 2 and len(H) > LARGEST_DENSE:
        notes.append(f"No eigenvalues: a dense precision of {len(H):,} parameters takes too long.")
        return None
    try:
        return debiased_candidate(la) if ours else laplace_torch_candidate(la, None, None)
    except NotFittedError:
        raise
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        notes.append(f"The posterior precision is not available: {_first_line(error)}")
        return None


def _share_outside(la: DebiasedParametricLaplace) -> float | None:
    """Return the part of the trace that the directions leave to the complement."""
    curvature = la.fitted.estimate.curvature
    if curvature.metric is not None:
        return None  # its directions are not orthogonal, so that curvatures along them make no trace
    D = curvature.diagonal.double()
    total = float(D.expand(len(curvature.directions)).sum() + curvature.weights.double().sum())
    along = float(la.directional_curvatures.double().sum())
    return min(1.0, max(0.0, 1 - along / total)) if total > 0 else None


def _select_directions(la: DebiasedParametricLaplace, level: float, notes: list[str]) -> tuple[DirectionSummary, ...]:
    in_sample, values = la.in_sample_curvatures.detach(), la.directional_curvatures.detach()
    intervals = None
    try:
        intervals = la.confidence_intervals(level=level).detach()
    except ValueError as error:
        notes.append(f"No intervals of the curvatures: {_first_line(error)}")
    order = in_sample.argsort(descending=True, stable=True)
    selected = []
    for place in _log_spaced(len(order), MOST_DIRECTIONS):
        i = order[place - 1]
        low, high = (None, None) if intervals is None or not intervals[i].isfinite().all() else intervals[i].tolist()
        selected.append(DirectionSummary(place, float(in_sample[i]), float(values[i]), low, high))
    return tuple(selected)


def _data_precisions(la: BaseLaplace, candidate: Candidate) -> Float[Tensor, " k"]:
    """Return the eigenvalues of the data's part of the precision of one of laplace-torch's posteriors."""
    H, operator = getattr(la, "H", None), candidate.precision
    if isinstance(H, Tensor) and H.ndim == 2:
        return _number(la._H_factor) * torch.linalg.eigvalsh(H.detach().double())
    if operator.rank == 0:  # a diagonal, or one in a Kronecker basis with a prior constant in each of its blocks
        return operator.diagonal.double() - candidate.target.prior_precision.double()
    return operator.magnitudes.double()


def _select_spectrum(precisions: Float[Tensor, " k"]) -> tuple[SpectrumPoint, ...]:
    """Select about a hundred values that are not zero up to rounding, evenly on a logarithmic scale of their place."""
    ordered = precisions.sort(descending=True).values
    n_positive = int((ordered > ROUNDING * ordered[:1].clamp_min(0)).sum())
    return tuple(SpectrumPoint(i, float(ordered[i - 1])) for i in _log_spaced(n_positive, MOST_SPECTRUM))


def _log_spaced(n: int, most: int) -> list[int]:
    """Return at most `most` places out of 1 to n, the first and the last among them."""
    if n <= most:
        return list(range(1, n + 1))
    return sorted({min(n, round(n ** (i / (most - 1)))) for i in range(most)})


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
