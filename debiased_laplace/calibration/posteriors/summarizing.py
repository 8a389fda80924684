"""From a posterior to its summary: this package's own in full, laplace-torch's as far as it is known."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from laplace.baselaplace import BaseLaplace
from torch import Tensor

from debiased_laplace.calibration.posteriors.summaries import DirectionSummary, PosteriorSummary, SpectrumPoint
from debiased_laplace.calibration.predicting.untouched import untouched
from debiased_laplace.errors import NotFittedError
from debiased_laplace.posterior.candidates import Candidate, debiased_candidate
from debiased_laplace.posterior.laplace_torch import laplace_torch_candidate
from debiased_laplace.posterior.parametric import DebiasedParametricLaplace

MOST_DIRECTIONS, MOST_SPECTRUM = 24, 100
ROUNDING = 1e-7  # of the largest value
LARGEST_DENSE = 3000  # parameters of a dense precision whose eigenvalues are still worth their time


def summarize_posteriors(posteriors: Mapping[str, Any], *, confidence_level: float) -> dict[str, PosteriorSummary]:
    """Summaries by name; those that are summaries already stay as they are.

    Raises:
        NotFittedError: before `fit`.
        ValueError: for anything that is neither a posterior nor a summary.
    """
    return {
        str(name): p
        if isinstance(p, PosteriorSummary)
        else summarize_posterior(str(name), p, confidence_level=confidence_level)
        for name, p in posteriors.items()
    }


def summarize_posterior(name: str, la: Any, *, confidence_level: float = 0.95) -> PosteriorSummary:
    """What was fitted, and what is known of it.

    Cost: without a pass over data. Of a posterior with a dense precision of more than 3,000 parameters, whatever needs
    its eigenvalues is left out.

    Args:
        name: of the posterior, for messages.
        la: a posterior of this package or of laplace-torch.
        confidence_level: of the intervals of curvatures.

    Raises:
        NotFittedError: before `fit`.
        ValueError: if it is no posterior.
    """
    if not isinstance(la, BaseLaplace):
        raise ValueError(f"{name!r} must be a Laplace posterior or a PosteriorSummary; got {type(la).__name__}.")
    if not getattr(la, "n_data", True):
        raise NotFittedError(f"{name!r} is not fitted; call fit() first.")
    notes: list[str] = []
    known = _hyper_parameters(la)
    with torch.inference_mode(False), untouched(getattr(la, "model", None)):
        known["log_marginal_likelihood"] = _evidence(la, notes)
        candidate = _candidate(la, notes)
        if candidate is not None:
            known |= _of_candidate(candidate)
        if isinstance(la, DebiasedParametricLaplace):
            known |= _of_ours(la, confidence_level, notes)
        elif candidate is not None:
            known["spectrum"] = _select_spectrum(_data_precisions(la, candidate))
    return PosteriorSummary(type(la).__name__, notes=tuple(notes), **known)


def _hyper_parameters(la: BaseLaplace) -> dict[str, Any]:
    """What every posterior of laplace-torch's kind says of itself."""
    likelihood = str(getattr(la.likelihood, "value", la.likelihood))
    prior = torch.as_tensor(la.prior_precision).detach().double()
    key = getattr(type(la), "_key", (None, None))
    return {
        "likelihood": likelihood,
        "weights": None if key[0] is None else str(key[0]),
        "structure": None if key[1] is None else str(key[1]).removeprefix("debiased_"),
        "n_data": getattr(la, "n_data", None),
        "prior_low": float(prior.min()),
        "prior_high": float(prior.max()),
        "sigma_noise": _number(la.sigma_noise) if likelihood == "regression" else None,
        "temperature": _number(la.temperature),
    }


def _number(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _evidence(la: BaseLaplace, notes: list[str]) -> float | None:
    try:
        evidence = float(la.log_marginal_likelihood().detach())
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        notes.append(f"No log marginal likelihood: {_first_line(error)}")
        return None
    if not abs(evidence) < float("inf"):
        notes.append("No log marginal likelihood: it is not finite.")
        return None
    return evidence


def _candidate(la: BaseLaplace, notes: list[str]) -> Candidate | None:
    """The precision as an operator, where there is one that can be afforded."""
    H, ours = getattr(la, "H", None), isinstance(la, DebiasedParametricLaplace)
    if not ours and isinstance(H, Tensor) and H.ndim == 2 and len(H) > LARGEST_DENSE:
        notes.append(f"No eigenvalues: a dense precision of {len(H):,} parameters takes too long.")
        return None
    try:
        return debiased_candidate(la) if ours else laplace_torch_candidate(la, None, None)
    except NotFittedError:
        raise
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        notes.append(f"Little is known of it: {_first_line(error)}")
        return None


def _of_candidate(candidate: Candidate) -> dict[str, Any]:
    """What a precision as an operator, and the full batch that it belongs to, say."""
    target = candidate.target
    P = target.selection.n_parameters
    return {
        "weights": target.selection.subset,
        "curvature": target.choice.kind,
        "n_parameters": P,
        # P - tr(P0 P̂^-1) = tr(N τ H P̂^-1)
        "effective_parameters": max(0.0, P - candidate.terms.prior_trace),
    }


def _of_ours(la: DebiasedParametricLaplace, level: float, notes: list[str]) -> dict[str, Any]:
    """What a posterior of this package knows of its split, its directions and their errors."""
    fit, options = la.fitted, la.fitted.options
    split, lowrank = fit.split, options.structure == "lowrank"
    weight = la.n_data / (_number(la.sigma_noise) ** 2 * la.temperature)
    if fit.estimate.magnitudes.n_floored:
        notes.append(f"{fit.estimate.magnitudes.n_floored} curvatures were below zero and count as zero.")
    return {
        "source": la.curvature_source,
        "structure": options.structure,
        "n_direction_samples": len(split.direction_indices),
        "n_magnitude_samples": len(split.magnitude_indices),
        "shared_samples": split.shared,
        "rank": la.rank,
        "magnitudes": options.magnitudes,
        "complement": options.complement if lowrank else None,
        "metric": options.metric if lowrank else None,
        "share_outside": _share_outside(la) if lowrank else None,
        "fit_seconds": fit.seconds,
        "directions": _directions(la, level, notes),
        "spectrum": _select_spectrum(weight * la.directional_curvatures.detach().double()),
    }


def _share_outside(la: DebiasedParametricLaplace) -> float | None:
    """Part of the trace that the directions leave to the complement."""
    curvature = la.fitted.estimate.curvature
    if curvature.metric is not None:
        return None  # its directions are not orthogonal, so that curvatures along them make no trace
    D = curvature.diagonal.double()
    total = float(D.expand(len(curvature.directions)).sum() + curvature.weights.double().sum())
    inside = float(la.directional_curvatures.double().sum())
    return min(1.0, max(0.0, 1 - inside / total)) if total > 0 else None


def _directions(la: DebiasedParametricLaplace, level: float, notes: list[str]) -> tuple[DirectionSummary, ...]:
    in_sample, values = la.in_sample_curvatures.detach(), la.directional_curvatures.detach()
    intervals = None
    try:
        intervals = la.confidence_intervals(level=level).detach()
    except ValueError as error:
        notes.append(f"No intervals of the curvatures: {_first_line(error)}")
    order = in_sample.argsort(descending=True, stable=True)
    found = []
    for place in _log_spaced(len(order), MOST_DIRECTIONS):
        i = order[place - 1]
        ends: list[float | None] = [None, None]
        if intervals is not None:
            ends = [x if abs(x) < float("inf") else None for x in intervals[i].tolist()]
        low, high = ends if None not in ends else (None, None)
        found.append(DirectionSummary(place, float(in_sample[i]), float(values[i]), low, high))
    return tuple(found)


def _data_precisions(la: BaseLaplace, candidate: Candidate) -> Float[Tensor, " k"]:
    """Eigenvalues of the data's part of the precision of one of laplace-torch's posteriors."""
    H, operator = getattr(la, "H", None), candidate.precision
    if isinstance(H, Tensor) and H.ndim == 2:
        return _number(la._H_factor) * torch.linalg.eigvalsh(H.detach().double())
    if operator.rank == 0:  # a diagonal, or one in a Kronecker basis with a prior constant in each of its blocks
        return operator.diagonal.double() - candidate.target.prior_precision.double()
    return operator.magnitudes.double()


def _select_spectrum(precisions: Float[Tensor, " k"]) -> tuple[SpectrumPoint, ...]:
    """About a hundred of those that are not zero up to rounding, evenly on a logarithmic scale of their place."""
    ordered = precisions.sort(descending=True).values
    n_positive = int((ordered > ROUNDING * ordered[:1].clamp_min(0)).sum())
    return tuple(SpectrumPoint(i, float(ordered[i - 1])) for i in _log_spaced(n_positive, MOST_SPECTRUM))


def _log_spaced(n: int, most: int) -> list[int]:
    """Places out of 1 to n, the first and the last among them."""
    if n <= most:
        return list(range(1, n + 1))
    grid = torch.logspace(0, torch.log10(torch.tensor(float(n), dtype=torch.float64)).item(), most, dtype=torch.float64)
    return sorted({min(n, round(x)) for x in grid.tolist()})


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
