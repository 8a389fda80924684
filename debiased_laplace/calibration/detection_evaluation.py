"""From predictions on sets out of distribution to how well they are told from the test set."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.metrics.detection import ScoredSample, Separation
from debiased_laplace.calibration.metrics.out_of_distribution import (
    COMBINED,
    SCORES,
    OutOfDistributionSet,
    adjust_sets,
    combine_scores,
    measure_set,
)
from debiased_laplace.calibration.predictions.arrays import Task
from debiased_laplace.calibration.predictions.forms import Gaussian, as_form, noise_of_method
from debiased_laplace.calibration.predictions.pixels import lay_out
from debiased_laplace.calibration.predictions.probabilities import read_probabilities
from debiased_laplace.calibration.predictions.regression import RegressionPredictions, read_regression
from debiased_laplace.calibration.predictions.uncertainty import Uncertainty, measure_uncertainty

ROUNDING = 1e-6  # relative; below it scores differ by their precision only


@dataclass(frozen=True, eq=False)
class InsideScores:
    """What a method says of the test set, for comparison with other sets.

    Attributes:
        scores: name of a score to its values, larger where the method is less sure; float64 on the CPU.
        n_columns: number of classes, or of regression outputs.
        clusters: number of each test sample's cluster; None where all samples are independent.
    """

    scores: Mapping[str, Float[Tensor, " n"]]
    n_columns: int
    clusters: Int[Tensor, " n"] | None = None


def scores_of_probabilities(uncertainty: Uncertainty) -> dict[str, Float[Tensor, " n"]]:
    """Scores of classification, the posterior's own where they are known."""
    scores = {
        "mutual_information": uncertainty.mutual_information,
        "logit_variance": uncertainty.logit_variance,
        "entropy": uncertainty.entropy,
        "max_probability": 1 - uncertainty.confidence,
    }
    return {name: values for name, values in scores.items() if values is not None}


def scores_of_regression(predictions: RegressionPredictions) -> dict[str, Float[Tensor, " n"]]:
    """The predicted standard deviation, its geometric mean over several outputs."""
    return {"standard_deviation": predictions.standard_deviation.log().mean(dim=1).exp()}


@dataclass(frozen=True, eq=False)
class DetectionRequest:
    """Which sets are to be told from the test set, and how.

    Attributes:
        ood: name of a set to method to predictions there, in the forms of the test set; images as (N, C, H, W) or
            samples (S, N, C, H, W).
        baseline: the method that the others are compared with.
        confidence_level: of the intervals and verdicts.
        observation_noise: as for the test set (regression).
        max_samples: most pixels to draw of a set of images.
        seed: of that draw.
    """

    ood: Mapping[str, Mapping[str, Any]] | None
    baseline: str
    confidence_level: float
    observation_noise: Any = None
    max_samples: int = 1_000_000
    seed: int = 0


def evaluate_detection(
    request: DetectionRequest, test: Mapping[str, InsideScores], *, task: Task
) -> tuple[dict[str, OutOfDistributionSet], list[str]]:
    """Every set out of distribution against the test set, and what a reader must know of them.

    Args:
        request: the sets.
        test: the caller's methods to their scores on the test set.
        task: what is predicted.

    Raises:
        ValueError: for a set that lacks a method or names another one, methods with unequal numbers of samples, another
            number of classes or outputs than on the test set, or predictions that are not what they should be.
    """
    ood, methods = request.ood, list(test)
    if ood is None:
        return {}, []
    if not isinstance(ood, Mapping):
        raise ValueError(f"ood must map names of sets to methods and their predictions; got {type(ood).__name__}.")
    sets, warnings = {}, []
    for name, predictions in ood.items():
        _check_names(name, predictions, methods)
        rows, clusters = _lay_out_set(predictions, request, task=task)
        separations: dict[str, dict[str, Separation]] = {}
        for method in methods:
            where = f"{method} on the set {name}"  # readers of predictions put quotation marks around it
            noise = noise_of_method(request.observation_noise, method, rows[method], methods)
            outside, n_columns = _read_scores(where, rows[method], task, noise)
            _check_columns(name, method, n_columns, test[method].n_columns, task)
            separations[method] = _separate(test[method], outside, clusters)
            for score in (s for s in SCORES if (s in outside) != (s in test[method].scores)):
                where = "on the test set" if score in outside else f"on {name}"
                warnings.append(f"{method}: no {SCORES[score]} {where}, so that {name} is not judged by it.")
        _check_sizes(name, separations)
        sets[name] = measure_set(separations, request.baseline, confidence_level=request.confidence_level)
    return adjust_sets(sets, confidence_level=request.confidence_level), warnings


def _lay_out_set(
    predictions: Mapping[str, Any], request: DetectionRequest, *, task: Task
) -> tuple[Mapping[str, Any], Int[Tensor, " m"] | None]:
    """Images as rows of pixels with the image of each; what is no image stays as it is."""
    shapes = [tuple(getattr(p, "shape", ())) for p in predictions.values()]
    images = next((shape for shape in shapes if len(shape) >= 4), None)
    if images is None or task == "regression":
        return predictions, None
    labels = (images[0], *images[2:]) if len(images) == 4 else (images[1], *images[3:])
    nothing = torch.zeros(labels, dtype=torch.int64)  # only the shape of targets is asked for
    rows, _, pixels = lay_out(predictions, nothing, task=task, max_samples=request.max_samples, seed=request.seed)
    # numbered anew: an image may have no pixel that was drawn
    return rows, None if pixels is None else pixels.image.cpu().unique(return_inverse=True)[1]


def _read_scores(
    where: str, predictions: Any, task: Task, observation_noise: Any
) -> tuple[dict[str, Float[Tensor, " m"]], int]:
    """Scores and the number of classes or outputs."""
    if task != "regression":
        kind: Literal["binary", "multiclass"] = task
        probabilities = read_probabilities(where, predictions, task=kind)
        return scores_of_probabilities(measure_uncertainty(probabilities)), probabilities.n_classes
    form = as_form(predictions, f"Predictions of '{where}'")
    # no targets are needed: the spread is the score
    targets = form.mean if isinstance(form, Gaussian) else form.values[0]
    read = read_regression(where, form, targets, observation_noise=observation_noise)
    return scores_of_regression(read), read.n_outputs


def _separate(
    test: InsideScores, outside: Mapping[str, Float[Tensor, " m"]], clusters: Int[Tensor, " m"] | None
) -> dict[str, Separation]:
    pairs = {
        score: _merge_constant(inside, outside[score]) for score, inside in test.scores.items() if score in outside
    }
    if all(score in pairs for score in COMBINED):
        pairs = {"conformal": combine_scores([pairs[score] for score in COMBINED]), **pairs}
    return {
        score: Separation(ScoredSample(a, test.clusters), ScoredSample(b, clusters)) for score, (a, b) in pairs.items()
    }


def _merge_constant(
    inside: Float[Tensor, " n"], outside: Float[Tensor, " m"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
    """Equal scores where a constant came in two precisions: float32's 1.2 would lie above float64's."""
    low = min(inside.min().item(), outside.min().item())
    high = max(inside.max().item(), outside.max().item())
    if high - low > ROUNDING * max(abs(low), abs(high)):
        return inside, outside
    return torch.full_like(inside, low), torch.full_like(outside, low)


def _check_names(name: Any, predictions: Any, methods: list[str]) -> None:
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise ValueError(f"The name of a set out of distribution must be printable text; got {name!r}.")
    if not isinstance(predictions, Mapping):
        raise ValueError(f"ood[{name!r}] must map methods to predictions; got {type(predictions).__name__}.")
    missing = [m for m in methods if m not in predictions]
    unknown = [str(m) for m in predictions if m not in methods]
    if missing or unknown:
        lacks = f" It lacks {', '.join(map(repr, missing))}." if missing else ""
        has = f" It also has {', '.join(map(repr, unknown))}." if unknown else ""
        raise ValueError(
            f"ood[{name!r}] must have the methods of the test set, {', '.join(map(repr, methods))}.{lacks}{has}"
        )


def _check_columns(name: str, method: str, given: int, expected: int, task: Task) -> None:
    if given != expected:
        what = "outputs" if task == "regression" else "classes"
        raise ValueError(
            f"ood[{name!r}][{method!r}] must have the {expected} {what} of the test set's predictions; got {given}."
        )


def _check_sizes(name: str, separations: Mapping[str, Mapping[str, Separation]]) -> None:
    sizes = {method: next(iter(s.values())).outside.n for method, s in separations.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"All methods of ood[{name!r}] must predict the same samples; got {sizes} of them.")
