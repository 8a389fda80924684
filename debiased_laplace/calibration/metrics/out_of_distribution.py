"""Out-of-distribution detection: separation of other sets from the test set by scores of uncertainty."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.contents import SCORES, DetectionComparison, OutOfDistributionSet, Task
from debiased_laplace.calibration.distributions import RegressionPredictions
from debiased_laplace.calibration.inputs import Settings
from debiased_laplace.calibration.intervals import Units, adjust_by_holm, find_holm_levels, judge_difference
from debiased_laplace.calibration.metrics.detection import (
    Pair,
    Separation,
    combine_scores,
    interval_of_difference,
    measure_set,
    range_of,
)
from debiased_laplace.calibration.metrics.regression import NEARLY_CONSTANT
from debiased_laplace.calibration.positions import as_rows
from debiased_laplace.calibration.probabilities import Probabilities, read_probabilities, uncertainty_scores
from debiased_laplace.calibration.regression import noise_of, read_regression
from debiased_laplace.calibration.ties import SINGLE, merge_ties

COMBINED = ("mutual_information", "logit_variance")  # uncertain label, uncertain function: OOD inputs show at least one
COMPUTED = ("logit_variance", "standard_deviation", "function_std")  # have a scale of their own, also in float32


def scores_of_regression(predictions: RegressionPredictions) -> dict[str, Float[Tensor, " n"]]:
    """Return geometric means over the outputs of the predicted standard deviation, and of the function's alone.

    The latter is left out where the noise is the same for all samples, so that both have one order, or unknown.
    """
    scores = {"standard_deviation": predictions.standard_deviation}
    if predictions.parts is not None:
        function, noise = predictions.parts
        varies = noise.amax(dim=0) - noise.amin(dim=0) > NEARLY_CONSTANT * noise.mean(dim=0)
        if bool(varies.any()) and bool((function > 0).any()):
            scores["function_std"] = function
    return {name: deviation.log().mean(dim=1).exp() for name, deviation in scores.items()}


def scores_of_probabilities(
    uncertainty: Mapping[str, Float[Tensor, " n"]], probabilities: Probabilities
) -> dict[str, Float[Tensor, " n"]]:
    """Return the scores of classification, including those of a posterior where they are known."""
    known = {
        "mutual_information": uncertainty.get("mutual_information"),
        "logit_variance": probabilities.logit_variance,
        "entropy": uncertainty["entropy"],
        "max_probability": 1 - uncertainty["confidence"],
    }
    return {name: values for name, values in known.items() if values is not None}


def evaluate_sets(
    ood: Mapping[str, Mapping[str, Any]],
    test: Mapping[str, Mapping[str, Float[Tensor, " n"]]],
    n_columns: int,
    units: Units,
    settings: Settings,
    *,
    task: Task,
    baseline: str,
    observation_noise: Any,
    max_samples: int,
) -> tuple[dict[str, OutOfDistributionSet], list[str]]:
    """Measure how well every set out of distribution is separated from the test set; return also warnings.

    `ood` maps the name of a set to methods to predictions there, in the forms of the test set, where each image is a
    cluster; `test` maps methods to their scores on the test set, whose predictions have `n_columns` classes or outputs.
    Verdicts allow for all comparisons of all sets (Holm).
    """
    if not isinstance(ood, Mapping):
        raise ValueError(f"ood must map names of sets to methods and their predictions; got {type(ood).__name__}.")
    sets, warnings = {}, []
    freedom: dict[str, int | None] = {}  # the same for all methods of a set
    for name, predictions in ood.items():
        _check_names(name, predictions, list(test))
        rows, codes = _lay_out(predictions, settings, task=task, max_samples=max_samples)
        separations: dict[str, dict[str, Separation]] = {}
        for method, known in test.items():
            noise = noise_of(method, rows[method], observation_noise) if task == "regression" else None
            given, found = _read_scores(f"{method} on the set {name}", rows[method], task, noise)
            if found != n_columns:
                what = f"{n_columns} {'outputs' if task == 'regression' else 'classes'}"
                raise ValueError(f"ood[{name!r}][{method!r}] must have the {what} of the test set; got {found}.")
            separations[method] = _separate(known, given, units, codes)
            for score in (s for s in SCORES if (s in given) != (s in known)):
                where = "on the test set" if score in given else f"on {name}"
                warnings.append(f"{method}: no {SCORES[score]} {where}, so that {name} is not judged by it.")
        sizes = {method: next(iter(s.values())).ood_units.n for method, s in separations.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"All methods of ood[{name!r}] must predict the same samples; got {sizes} of them.")
        sets[name] = measure_set(separations, baseline)
        freedom[name] = next(iter(separations[baseline].values())).freedom
    return _adjust(sets, freedom, settings.confidence_level), warnings


def _adjust(
    sets: Mapping[str, OutOfDistributionSet], freedom: Mapping[str, int | None], level: float
) -> dict[str, OutOfDistributionSet]:
    p_values = [c.p_value for s in sets.values() for c in s.comparisons]
    adjusted = iter(zip(adjust_by_holm(p_values), find_holm_levels(p_values, level), strict=True))

    def judge(c: DetectionComparison, freedom: int | None) -> DetectionComparison:
        p, own = next(adjusted)
        # a larger area is better, but `judge_difference` takes the smaller one as better
        c = replace(c, adjusted_p_value=p, verdict=judge_difference(-c.difference, p, level=1 - level))
        if own is None or c.standard_error is None:
            return c
        low, high = interval_of_difference(c.difference, c.standard_error, own, freedom)
        return replace(c, adjusted_low=low, adjusted_high=high, adjusted_level=own)

    return {
        name: replace(one, comparisons=tuple(judge(c, freedom[name]) for c in one.comparisons))
        for name, one in sets.items()
    }


def _lay_out(
    predictions: Mapping[str, Any], settings: Settings, *, task: Task, max_samples: int
) -> tuple[Mapping[str, Any], Int[Tensor, " m"] | None]:
    """Return images as rows of pixels with the image of each; other predictions stay as they are."""
    shapes = [tuple(getattr(p, "shape", ())) for p in predictions.values()]
    images = next((shape for shape in shapes if len(shape) >= 4), None)
    if images is None or task == "regression":
        return predictions, None
    labels = (images[0], *images[2:]) if len(images) == 4 else (images[1], *images[3:])
    shape_of_targets = torch.zeros(labels, dtype=torch.int64)
    rows, _, drawn = as_rows(predictions, shape_of_targets, task=task, max_samples=max_samples, seed=settings.seed)
    # numbered anew: an image may have no pixel that was drawn
    return rows, None if drawn is None else drawn.image.unique(return_inverse=True)[1]


def _read_scores(where: str, predictions: Any, task: Task, noise: Any) -> tuple[dict[str, Float[Tensor, " m"]], int]:
    """Return the scores of predictions out of distribution, and the number of their classes or outputs."""
    if task == "regression":
        read = read_regression(where, predictions, None, observation_noise=noise)
        return scores_of_regression(read), read.n_outputs
    probabilities = read_probabilities(where, predictions, task=task)
    return scores_of_probabilities(uncertainty_scores(probabilities), probabilities), probabilities.n_classes


def _separate(
    test: Mapping[str, Float[Tensor, " n"]],
    ood: Mapping[str, Float[Tensor, " m"]],
    units: Units,
    codes: Int[Tensor, " m"] | None,
) -> dict[str, Separation]:
    pairs = {name: _merge_pair(name, x, ood[name]) for name, x in test.items() if name in ood}
    if all(score in pairs for score in COMBINED):
        pairs = {"conformal": combine_scores([pairs[score] for score in COMBINED]), **pairs}
    return {name: Separation(a, b, units, Units(len(b), units.level, codes)) for name, (a, b) in pairs.items()}


def _merge_pair(score: str, test: Float[Tensor, " n"], ood: Float[Tensor, " m"]) -> Pair:
    """Merge scores that differ by rounding, also where both sets came in two precisions."""
    both = torch.cat([test, ood])
    low, high = range_of([both])
    is_constant = high - low <= SINGLE * max(abs(low), abs(high))
    tolerance = SINGLE * both.abs() if is_constant or score in COMPUTED else None
    test, ood = merge_ties(both, tolerance).split([len(test), len(ood)])
    return test, ood


def _check_names(name: Any, predictions: Any, methods: list[str]) -> None:
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise ValueError(f"The name of a set out of distribution must be printable text; got {name!r}.")
    if not isinstance(predictions, Mapping):
        raise ValueError(f"ood[{name!r}] must map methods to predictions; got {type(predictions).__name__}.")
    if set(predictions) != set(methods):
        raise ValueError(f"ood[{name!r}] must have the methods of the test set, {methods}; got {list(predictions)}.")
