"""Out-of-distribution detection: how well scores of uncertainty tell sets of another origin from the test set."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.contents import (
    SCORES,
    Detection,
    DetectionComparison,
    OutOfDistributionSet,
    ScoreBin,
    Task,
    Verdict,
)
from debiased_laplace.calibration.inputs import Settings
from debiased_laplace.calibration.intervals import (
    Units,
    adjust_by_holm,
    judge_difference,
    student_quantile,
    two_sided_p_value,
)
from debiased_laplace.calibration.metrics.detection import (
    Separation,
    combine_scores,
    estimate_aupr,
    estimate_auroc,
    estimate_fpr95,
)
from debiased_laplace.calibration.positions import as_rows
from debiased_laplace.calibration.probabilities import Probabilities, read_probabilities, uncertainty_scores
from debiased_laplace.calibration.regression import RegressionPredictions, noise_of, read_regression

STAND_IN = "entropy"  # used for a baseline that lacks the method's score
COMBINED = ("mutual_information", "logit_variance")  # uncertain label, uncertain function: OOD inputs show at least one
HISTOGRAM_BINS = 20
CHANCE = 0.5
ROUNDING = 1e-6  # relative; below it scores differ by their precision only


def scores_of_regression(predictions: RegressionPredictions) -> dict[str, Float[Tensor, " n"]]:
    """The predicted standard deviation, its geometric mean over several outputs."""
    return {"standard_deviation": predictions.standard_deviation.log().mean(dim=1).exp()}


def scores_of_probabilities(
    uncertainty: Mapping[str, Float[Tensor, " n"]], probabilities: Probabilities
) -> dict[str, Float[Tensor, " n"]]:
    """Scores of classification, the posterior's own where they are known."""
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
    observation_noise: Any = None,
    max_samples: int = 1_000_000,
) -> tuple[dict[str, OutOfDistributionSet], list[str]]:
    """Tell every set out of distribution from the test set.

    Args:
        ood: name of a set to method to predictions there, in the forms of the test set; images as (N, C, H, W) or
            samples (S, N, C, H, W), each image being a cluster.
        test: method to its scores on the test set.
        n_columns: classes or outputs of the predictions there.
        units: of the test samples.
        settings: options of the numbers.
        task: what is predicted.
        baseline: the method that the others are compared with.
        observation_noise: as for the test set (regression).
        max_samples: most positions to draw of a set of images.

    Returns:
        The sets with verdicts after Holm's adjustment over all of their comparisons, and warnings.
    """
    if not isinstance(ood, Mapping):
        raise ValueError(f"ood must map names of sets to methods and their predictions; got {type(ood).__name__}.")
    sets, warnings = {}, []
    for name, predictions in ood.items():
        _check_names(name, predictions, list(test))
        rows, ood_units = _lay_out(predictions, settings, task=task, max_samples=max_samples)
        separations: dict[str, dict[str, Separation]] = {}
        for method, known in test.items():
            noise = noise_of(method, rows[method], observation_noise) if task == "regression" else None
            given, found = _read_scores(f"{method} on the set {name}", rows[method], task, noise)
            if found != n_columns:
                what = "outputs" if task == "regression" else "classes"
                raise ValueError(
                    f"ood[{name!r}][{method!r}] must have the {n_columns} {what} of the test set's predictions; got "
                    f"{found}."
                )
            separations[method] = _separate(known, given, units, ood_units)
            for score in (s for s in SCORES if (s in given) != (s in known)):
                where = "on the test set" if score in given else f"on {name}"
                warnings.append(f"{method}: no {SCORES[score]} {where}, so that {name} is not judged by it.")
        sizes = {method: next(iter(s.values())).ood_units.n for method, s in separations.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"All methods of ood[{name!r}] must predict the same samples; got {sizes} of them.")
        sets[name] = measure_set(separations, baseline)
    return _adjust(sets, level=1 - settings.confidence_level), warnings


def measure_set(separations: Mapping[str, Mapping[str, Separation]], baseline: str) -> OutOfDistributionSet:
    """Metrics, histograms and comparisons of one set; p-values are not adjusted yet."""
    names = dict.fromkeys(score for scores in separations.values() for score in scores)
    edges = {n: _choose_edges([scores[n] for scores in separations.values() if n in scores]) for n in names}
    detections = tuple(
        Detection(
            method,
            score,
            {"auroc": estimate_auroc(s), "aupr": estimate_aupr(s), "fpr95": estimate_fpr95(s)},
            _count(s, edges[score]),
        )
        for method, scores in separations.items()
        for score, s in scores.items()
    )
    reference = separations[baseline]
    comparisons = tuple(
        _compare(s, reference, (method, baseline, score))
        for method, scores in separations.items()
        if method != baseline
        for score, s in scores.items()
        if score in reference or STAND_IN in reference
    )
    return OutOfDistributionSet(next(iter(reference.values())).ood_units.n, detections, comparisons)


def _adjust(sets: Mapping[str, OutOfDistributionSet], *, level: float) -> dict[str, OutOfDistributionSet]:
    adjusted = iter(adjust_by_holm([c.p_value for s in sets.values() for c in s.comparisons]))

    def judge(c: DetectionComparison) -> DetectionComparison:
        p = next(adjusted)
        # a larger area is better, where a judged score is better if it is smaller
        return replace(c, adjusted_p_value=p, verdict=judge_difference(-c.difference, p, level=level))

    return {name: replace(one, comparisons=tuple(judge(c) for c in one.comparisons)) for name, one in sets.items()}


def _compare(s: Separation, reference: Mapping[str, Separation], names: tuple[str, str, str]) -> DetectionComparison:
    """Paired difference of two AUROCs on the same samples (DeLong)."""
    score = names[2] if names[2] in reference else STAND_IN
    influence = [a - b for a, b in zip(s.components, reference[score].components, strict=True)]
    difference, error = influence[1].mean().item(), s.standard_error((influence[0], influence[1]))
    low = high = p_value = None
    if error is not None:
        half = student_quantile(s.units.level, s.freedom) * error
        low, high = max(-1.0, difference - half), min(1.0, difference + half)
        p_value = two_sided_p_value(difference, error, s.freedom)
    below_chance = s.components[0].mean().item() < CHANCE
    verdict: Verdict = "no detectable difference"  # until `_adjust` has seen all p-values
    return DetectionComparison(*names, difference, low, high, error, p_value, None, verdict, score, below_chance)


def _lay_out(
    predictions: Mapping[str, Any], settings: Settings, *, task: Task, max_samples: int
) -> tuple[Mapping[str, Any], Int[Tensor, " m"] | None]:
    """Images as rows of pixels with the image of each; what is no image stays as it is."""
    shapes = [tuple(getattr(p, "shape", ())) for p in predictions.values()]
    images = next((shape for shape in shapes if len(shape) >= 4), None)
    if images is None or task == "regression":
        return predictions, None
    labels = (images[0], *images[2:]) if len(images) == 4 else (images[1], *images[3:])
    nothing = torch.zeros(labels, dtype=torch.int64)  # only the shape of targets is asked for
    rows, _, drawn = as_rows(predictions, nothing, task=task, max_samples=max_samples, seed=settings.seed)
    # numbered anew: an image may have no pixel that was drawn
    return rows, None if drawn is None else drawn.image.unique(return_inverse=True)[1]


def _read_scores(where: str, predictions: Any, task: Task, noise: Any) -> tuple[dict[str, Float[Tensor, " m"]], int]:
    """Scores of predictions out of distribution, and the number of their classes or outputs."""
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
    pairs = {name: _merge_constant(x, ood[name]) for name, x in test.items() if name in ood}
    if all(score in pairs for score in COMBINED):
        pairs = {"conformal": combine_scores([pairs[score] for score in COMBINED]), **pairs}
    return {name: Separation(a, b, units, Units(len(b), units.level, codes)) for name, (a, b) in pairs.items()}


def _merge_constant(
    test: Float[Tensor, " n"], ood: Float[Tensor, " m"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
    """Equal scores where a constant came in two precisions: float32's 1.2 would lie above float64's."""
    low, high = min(test.min().item(), ood.min().item()), max(test.max().item(), ood.max().item())
    if high - low > ROUNDING * max(abs(low), abs(high)):
        return test, ood
    return torch.full_like(test, low), torch.full_like(ood, low)


def _choose_edges(separations: list[Separation]) -> Float[Tensor, " edges"]:
    """Bins of equal width over the range of all methods."""
    scores = [x for s in separations for x in (s.test, s.ood)]
    low, high = min(x.min().item() for x in scores), max(x.max().item() for x in scores)
    if high <= low:
        margin = max(1e-6, 1e-6 * abs(low))
        low, high = low - margin, high + margin
    return torch.linspace(low, high, HISTOGRAM_BINS + 1, dtype=torch.float64)


def _count(s: Separation, edges: Float[Tensor, " edges"]) -> tuple[ScoreBin, ...]:
    test, ood = (
        torch.bincount(torch.bucketize(x, edges[1:-1], right=True), minlength=HISTOGRAM_BINS).tolist()
        for x in (s.test, s.ood)
    )
    ends = edges.tolist()
    return tuple(ScoreBin(*each) for each in zip(ends[:-1], ends[1:], test, ood, strict=True))


def _check_names(name: Any, predictions: Any, methods: list[str]) -> None:
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise ValueError(f"The name of a set out of distribution must be printable text; got {name!r}.")
    if not isinstance(predictions, Mapping):
        raise ValueError(f"ood[{name!r}] must map methods to predictions; got {type(predictions).__name__}.")
    if set(predictions) != set(methods):
        raise ValueError(
            f"ood[{name!r}] must have the methods of the test set, {', '.join(map(repr, methods))}; got "
            f"{', '.join(map(repr, predictions)) or 'none'}."
        )
