"""Summaries of Laplace posteriors, and their differences in held-out KL."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from math import isfinite
from operator import sub
from typing import Any, TypeVar

import numpy as np
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
from debiased_laplace.calibration.intervals import (
    adjust_by_holm,
    find_holm_levels,
    judge_difference,
    normal_quantile,
    two_sided_p_value,
)
from debiased_laplace.checks import name_of
from debiased_laplace.curvature.as_found import raise_interrupt
from debiased_laplace.debiasing.held_out_kl import KLDifference
from debiased_laplace.errors import NotFittedError, OverlapError
from debiased_laplace.posterior.candidates import Candidate
from debiased_laplace.posterior.held_out_kl import candidate_of, held_out_kl
from debiased_laplace.posterior.laplace import DebiasedParametricLaplace
from debiased_laplace.posterior.laplace_torch import preserve_state

Result = TypeVar("Result")

REFUSALS = (NotImplementedError, ValueError)
FAILURES = (AttributeError, RuntimeError, TypeError, ValueError)  # of posteriors of any kind
MOST_DIRECTIONS, MOST_SPECTRUM = 24, 100
ROUNDING = 1e-7  # of the largest value
LARGEST_DENSE = 3000  # parameters of a dense precision whose eigenvalues are still worth their time
CLOSENESS: dict[Verdict, KLVerdict] = {"better": "closer", "worse": "further"}
MAGNITUDES = {"held_out": "other samples", "cross_fitted": "other folds", "same_batch": "the same samples"}


def summarize_posteriors(posteriors: Mapping[str, Any], confidence_level: float) -> dict[str, PosteriorSummary]:
    """Summarize posteriors by name; what is a summary already stays as it is."""
    return {
        str(name): p if isinstance(p, PosteriorSummary) else summarize_posterior(str(name), p, confidence_level)
        for name, p in posteriors.items()
    }


def summarize_posterior(name: str, la: Any, confidence_level: float = 0.95) -> PosteriorSummary:
    """Summarize what was fitted, as far as it is known without a pass over data or eigenvalues of large matrices."""
    if not isinstance(la, BaseLaplace):
        raise ValueError(f"{name!r} must be a Laplace posterior or a PosteriorSummary; got {type(la).__name__}.")
    if not getattr(la, "n_data", True):
        raise NotFittedError(f"{name!r} is not fitted; call fit() first.")
    notes: list[str] = []
    prior = torch.as_tensor(la.prior_precision).detach().double()
    prior_range = (float(prior.min()), float(prior.max()))
    with torch.inference_mode(False), preserve_state(getattr(la, "model", None)):
        evidence = _attempt("log marginal likelihood", partial(_log_marginal_likelihood, la), notes, FAILURES)
        candidate = _attempt("posterior precision", partial(_find_candidate, la), notes, FAILURES)
        facts = _list_facts(la, candidate, prior_range, evidence)
        directions = _select_directions(la, confidence_level, notes)
        spectrum = () if candidate is None else _select_spectrum(_data_precisions(la, candidate))
    return PosteriorSummary(facts, prior_range, directions, spectrum, notes=tuple(notes))


def compare_held_out(
    posteriors: Mapping[str, Any],
    summaries: Mapping[str, PosteriorSummary],
    held_out_loader: Iterable[Any],
    fitted_loader: Iterable[Any] | Mapping[str, Iterable[Any]] | None,
    confidence_level: float,
    progress_bar: bool = False,
) -> dict[str, PosteriorSummary]:
    """Add to summaries how much further from the full batch each posterior is than the first, by held-out KL.

    The samples that were fitted, of all or by name, are needed for posteriors of laplace-torch.
    """
    first, reference = "", None
    differences: dict[str, KLDifference] = {}
    notes: dict[str, list[str]] = {name: [] for name in summaries}
    for name, la in posteriors.items():
        fitted = fitted_loader.get(name) if isinstance(fitted_loader, Mapping) else fitted_loader
        complete = isinstance(la, DebiasedParametricLaplace) and la.split.n_samples == la.n_data
        held_out = None if complete else held_out_loader
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compute = partial(held_out_kl, la, held_out, fitted, progress_bar=progress_bar)
            found = _attempt("held-out KL", compute, notes[name])
        notes[name] += [str(w.message) for w in caught if w.category is UserWarning]
        if found is None:
            continue
        if reference is None:
            first, reference = name, found
            continue
        difference = _attempt(f"comparison with {first} by held-out KL", partial(sub, found, reference), notes[name])
        if difference is not None and isfinite(difference.standard_error):
            differences[name] = difference
        elif difference is not None:
            notes[name].append("No held-out KL: one held-out sample has no spread.")
    compared = _judge_differences(first, differences, confidence_level)
    return {
        name: replace(s, held_out=compared.get(name), notes=(*s.notes, *notes[name])) for name, s in summaries.items()
    }


def _judge_differences(
    first: str, differences: Mapping[str, KLDifference], level: float
) -> dict[str, HeldOutDifference]:
    single = [two_sided_p_value(d.value, d.standard_error, None) for d in differences.values()]
    compared = {}
    adjusted = zip(adjust_by_holm([*single]), find_holm_levels([*single], level), strict=True)
    for (name, d), (p, own) in zip(differences.items(), adjusted, strict=True):
        assert p is not None  # for the type checker: every one is a test
        assert own is not None
        half, wider = (normal_quantile(x) * d.standard_error for x in (level, own))
        verdict = CLOSENESS.get(judge_difference(d.value, p, level=1 - level), "no detectable difference")
        ends, shown = ((d.value - h, d.value + h) for h in (half, wider))
        compared[name] = HeldOutDifference(first, d.value, d.standard_error, *ends, p, verdict, d.n, *shown, own)
    return compared


def _attempt(
    what: str, compute: Callable[[], Result], notes: list[str], errors: tuple[type[Exception], ...] = REFUSALS
) -> Result | None:
    """Return a result, or None with a note on why it is missing, for some errors."""
    try:
        return compute()
    except (NotFittedError, OverlapError):
        raise
    except errors as error:
        raise_interrupt(error)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        notes.append(f"No {what}: {reason}")
        return None


def _list_facts(
    la: BaseLaplace, candidate: Candidate | None, prior_range: tuple[float, float], evidence: float | None
) -> dict[str, Scalar]:
    """Return what is known of a posterior, in the order in which it is shown."""
    weights, structure = getattr(type(la), "_key", (None, None))
    ours = la if isinstance(la, DebiasedParametricLaplace) else None
    target = None if candidate is None else candidate.target
    P = 0 if target is None else target.selection.n_parameters
    seconds = None if ours is None else ours.fit_result.seconds
    low, high = prior_range
    facts = {
        "class": type(la).__name__,
        "weights": weights if target is None else target.selection.subset,
        "structure": structure if ours is None else ours.fit_result.options.structure,
        "curvature": None if target is None else target.choice.kind,
        "computed by": None if ours is None else ours.curvature_source,
        "parameters": P or None,
        "data set, N": getattr(la, "n_data", None),
        **({} if ours is None else _describe_estimate(ours)),
        "prior precision": low if low == high else f"{low:.4g} to {high:.4g}",
        "observation noise": _show_noise(la) if name_of(la.likelihood) == "regression" else None,
        "temperature": float(la.temperature) if la.temperature != 1 else None,
        # P - tr(P0 P̂^-1) = tr(N τ H P̂^-1)
        "effective parameters": None if candidate is None else max(0.0, P - candidate.terms.prior_trace),
        "log marginal likelihood": evidence,
        "time of the fit": None if seconds is None else format_seconds(seconds),
    }
    return {label: value for label, value in facts.items() if value is not None}


def _show_noise(la: BaseLaplace) -> Scalar:
    values = la.sigma_noise.detach().reshape(-1).tolist()
    return float(values[0]) if len(values) == 1 else ", ".join(f"{value:.4g}" for value in values)


def _describe_estimate(la: DebiasedParametricLaplace) -> dict[str, Scalar | None]:
    """Return which samples the curvature of a posterior of this package comes from, and along which directions."""
    options, split = la.fit_result.options, la.fit_result.split
    n_directions, n_magnitudes = len(split.direction_indices), len(split.magnitude_indices)
    samples = f"{format_count(n_directions)} for directions, {format_count(n_magnitudes)} for magnitudes"
    facts: dict[str, Scalar | None] = {
        "samples for the curvature": n_directions if split.shared else samples,
        "directions": la.rank,
        "curvature along them": f"from {MAGNITUDES[options.magnitudes]} ({options.magnitudes})",
    }
    if options.structure == "lowrank":
        share = _share_outside(la) if options.complement != "none" else None
        of_trace = "" if share is None else f", {100 * share:.2g} % of the trace"
        facts["curvature outside them"] = f"{options.complement}{of_trace}"
        facts["metric"] = options.metric if options.metric != "euclidean" else None
    return facts


def _log_marginal_likelihood(la: BaseLaplace) -> float:
    evidence = float(la.log_marginal_likelihood().detach())
    if not isfinite(evidence):
        raise ValueError("it is not finite.")
    return evidence


def _find_candidate(la: BaseLaplace) -> Candidate:
    """Return the precision as an operator, where its eigenvalues can be afforded."""
    H = getattr(la, "H", None)
    if isinstance(H, Tensor) and H.ndim == 2 and len(H) > LARGEST_DENSE:
        raise ValueError(f"the eigenvalues of a dense one of {len(H):,} parameters take too long.")
    return candidate_of(la)


def _share_outside(la: DebiasedParametricLaplace) -> float | None:
    """Return the part of the trace that the directions leave to the complement."""
    curvature = la.fit_result.estimate.curvature
    if curvature.metric is not None:
        return None  # its directions are not orthogonal, so that curvatures along them make no trace
    diagonal = curvature.diagonal.double().expand(len(curvature.directions))
    total, along = (
        float(diagonal.sum() + curvature.weights.double().sum()),
        float(la.directional_curvatures.double().sum()),
    )
    return min(1.0, max(0.0, 1 - along / total)) if total > 0 else None


def _select_directions(la: BaseLaplace, level: float, notes: list[str]) -> tuple[DirectionSummary, ...]:
    """Select directions of a posterior of this package whose magnitudes come from other samples."""
    if not isinstance(la, DebiasedParametricLaplace):
        return ()
    if n := la.fit_result.estimate.magnitudes.n_floored:
        notes.append(f"{n} curvatures were below zero and count as zero.")
    if la.fit_result.options.magnitudes == "same_batch":
        return ()
    in_sample, values = la.in_sample_curvatures.detach(), la.directional_curvatures.detach()
    intervals = _attempt("intervals of the curvatures", partial(la.confidence_intervals, level=level), notes)
    order = in_sample.argsort(descending=True, stable=True)
    selected = []
    for place in _space_places(len(order), MOST_DIRECTIONS):
        i = order[place - 1]
        low, high = (None, None) if intervals is None or not intervals[i].isfinite().all() else intervals[i].tolist()
        selected.append(DirectionSummary(place, float(in_sample[i]), float(values[i]), low, high))
    return tuple(selected)


def _data_precisions(la: BaseLaplace, candidate: Candidate) -> Float[Tensor, " k"]:
    """Return the eigenvalues of the data's part of the precision, along the directions of one of this package."""
    if isinstance(la, DebiasedParametricLaplace):
        return candidate.target.likelihood_weight * la.directional_curvatures.detach().double()
    H, operator = getattr(la, "H", None), candidate.precision
    if isinstance(H, Tensor) and H.ndim == 2:
        return float(la._H_factor) * torch.linalg.eigvalsh(H.detach().double())
    if operator.rank == 0:  # a diagonal, or one in a Kronecker basis with a prior constant in each of its blocks
        return operator.diagonal.double() - candidate.target.prior_precision.double()
    return operator.magnitudes.double()


def _select_spectrum(precisions: Float[Tensor, " k"]) -> tuple[SpectrumPoint, ...]:
    """Select about a hundred values that are not zero up to rounding, evenly on a logarithmic scale of their place."""
    ordered = precisions.sort(descending=True).values
    n_positive = int((ordered > ROUNDING * ordered[:1].clamp_min(0)).sum())
    return tuple(SpectrumPoint(i, float(ordered[i - 1])) for i in _space_places(n_positive, MOST_SPECTRUM))


def _space_places(n: int, most: int) -> list[int]:
    """Return at most `most` places out of 1 to n, the first and the last among them, evenly on a logarithmic scale."""
    places = np.arange(1, n + 1) if n <= most else np.unique(np.geomspace(1, n, most).round().astype(int))
    found: list[int] = places.tolist()
    return found
