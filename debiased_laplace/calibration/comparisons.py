"""Paired differences between the methods of one report, with verdicts adjusted for their number."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration.contents import Comparison, Estimate
from debiased_laplace.calibration.intervals import (
    Units,
    adjust_by_holm,
    estimate_mean,
    estimate_skewed_mean,
    find_holm_levels,
    judge_difference,
    normal_quantile,
    skewed_p_value,
    two_sided_p_value,
)
from debiased_laplace.calibration.ties import SINGLE

N_BATCHES = 64
COUNTS = "samples"


def compare_methods(
    scores: Mapping[str, Mapping[str, Float[Tensor, " n"]]],
    references: Sequence[str],
    units: Units,
    *,
    fitting_errors: Mapping[str, float] | None = None,
) -> tuple[Comparison, ...]:
    """Compare every score of every method with every reference, paired by sample.

    Pairing removes the difficulty that a sample has for all methods, so a difference can be detectable although the
    methods' own intervals overlap.

    Args:
        scores: method to metric to per-sample scores; of a statistic that is no mean, the samples' influences on it.
        references: the baseline, followed by the scaled baseline if there is one. A method is compared with each of
            them but itself, and the baseline with none.
        units: of the samples; the verdicts have level 1 - `units.level`.
        fitting_errors: standard errors of methods' NLL from numbers that were fitted on other folds.
    """
    fitted = fitting_errors or {}
    compared = [
        (method, reference, metric)
        for method, metrics in scores.items()
        for reference in references
        if method not in (reference, references[0])
        for metric in metrics
        if metric in scores[reference] and not (metric == "error" and method in references)  # equal by construction
    ]

    def compare(names: tuple[str, str, str], level: float) -> Comparison:
        method, reference, metric = names
        error = max(fitted.get(method, 0.0), fitted.get(reference, 0.0)) if metric == "nll" else 0.0
        difference = _subtract(scores[method][metric], scores[reference][metric])
        return _compare(names, difference, replace(units, level=level), fitting_error=error)

    raw = [compare(names, units.level) for names in compared]
    p_values = [c.p_value for c in raw]
    judged = []
    for c, p, level in zip(raw, adjust_by_holm(p_values), find_holm_levels(p_values, units.level), strict=True):
        wide = c if level is None else compare((c.method, c.baseline, c.metric), level)
        verdict = judge_difference(c.difference, p, level=1 - units.level)
        c = replace(c, adjusted_p_value=p, verdict=verdict)
        judged.append(replace(c, adjusted_low=wide.low, adjusted_high=wide.high, adjusted_level=level))
    return tuple(judged)


def compare_shares(difference: Float[Tensor, " n"], level: float) -> tuple[Estimate, float]:
    """Return the difference of two paired proportions and its p-value, from a difference of -1, 0 or 1 per sample.

    One sample is added to each kind of disagreement, so that interval and p-value stay valid with few disagreements.

    References:
        Bonett and Price (2012), doi:10.3102/1076998611411915.
    """
    n = difference.numel()
    more, fewer = ((side * difference > 0).sum().item() for side in (1, -1))
    value, shrunk = (more - fewer) / n, (more - fewer) / (n + 2)
    error = sqrt(((more + fewer + 2) / (n + 2) - shrunk**2) / (n + 2))
    half = normal_quantile(level) * error
    low, high = max(-1.0, shrunk - half), min(1.0, shrunk + half)
    estimator = "proportions, Bonett and Price's interval"
    estimate = Estimate(value, min(low, value), max(high, value), error, n, estimator)
    return estimate, two_sided_p_value(shrunk, error, None)


def _subtract(scores: Float[Tensor, " n"], reference: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the differences; zeros where no two scores differ by more than the rounding of single precision."""
    difference = scores - reference
    is_rounding = difference.abs().max() <= SINGLE * reference.abs().max()
    return torch.zeros_like(difference) if bool(is_rounding) else difference


def _compare(
    names: tuple[str, str, str], difference: Float[Tensor, " n"], units: Units, *, fitting_error: float
) -> Comparison:
    metric, p_value = names[2], None
    if metric == "error" and units.codes is None:
        estimate, p_value = compare_shares(difference, units.level)
    elif metric in ("error", "rmsce2_debiased"):  # influences, whose skewness is not that of the statistic
        estimate = estimate_mean(difference, units)
        if estimate.standard_error is not None or estimate.known == 0:
            p_value = two_sided_p_value(estimate.known, estimate.standard_error or 0.0, units.freedom)
    else:
        estimate = estimate_skewed_mean(difference, units, fitting_error=fitting_error)
        p_value = skewed_p_value(difference, units, fitting_error=fitting_error)
    return Comparison(
        *names,
        difference=estimate.known,
        low=estimate.low,
        high=estimate.high,
        standard_error=estimate.standard_error,
        p_value=p_value,
        adjusted_p_value=None,
        verdict="no detectable difference",
        estimator=f"paired {estimate.estimator}",
    )


def sum_scores(scores: Mapping[str, Float[Tensor, " n"]], units: Units) -> dict[str, tuple[float, ...]]:
    """Sum every score over batches of the test set, and under "samples" return the sizes of the batches.

    Unit i is in batch i modulo 64, so the sums of two methods or two reports are paired as the samples are.

    Args:
        scores: name to one number per sample.
        units: of the samples.
    """
    if not scores:
        return {}
    n_batches = min(N_BATCHES, units.count)
    batch = (torch.arange(units.n) if units.codes is None else units.codes.cpu()) % n_batches
    named = {COUNTS: torch.ones(units.n), **scores}
    return {
        name: tuple(torch.bincount(batch, score.detach().cpu().to(torch.float64), n_batches).tolist())
        for name, score in named.items()
    }


def paired_spread(
    old: Mapping[str, Sequence[float]], new: Mapping[str, Sequence[float]], score: str
) -> tuple[float, int] | None:
    r"""Return the standard error of the difference of two means over the same samples, and its degrees of freedom.

    With batches b of n_b samples and sums D_b of the differences, mean $\bar D = \sum_b D_b / n$:
    $\frac{B}{B-1} \frac1{n^2} \sum_b (D_b - n_b \bar D)^2$.

    Returns:
        Both numbers; None where the sums of `sum_scores` are missing, of other batches, or of one batch.
    """
    sizes = old.get(COUNTS, ())
    if score not in old or score not in new or sizes != new.get(COUNTS) or len(sizes) < 2:
        return None
    n, B = sum(sizes), len(sizes)
    D = [after - before for after, before in zip(new[score], old[score], strict=True)]
    squares = sum((d - size * sum(D) / n) ** 2 for d, size in zip(D, sizes, strict=True))
    return sqrt(B / (B - 1) * squares) / n, B - 1
