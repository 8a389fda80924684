"""One call from predictions to a report that can be read, stored and compared."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, get_args

from debiased_laplace.calibration.changes.batches import sum_scores
from debiased_laplace.calibration.comparisons import compare_methods
from debiased_laplace.calibration.contents import (
    DataSummary,
    ReportFigure,
    ReportTable,
    read_scalar,
)
from debiased_laplace.calibration.detection_evaluation import DetectionRequest, evaluate_detection
from debiased_laplace.calibration.evaluation import (
    Settings,
    evaluate_classification,
    warn_about_classes,
    warn_about_size,
)
from debiased_laplace.calibration.finished import CalibrationReport
from debiased_laplace.calibration.gates.thresholds import ThresholdSource
from debiased_laplace.calibration.labelled_set import LabelledSet, lay_out_test_set
from debiased_laplace.calibration.metrics.groups import collect_groups
from debiased_laplace.calibration.metrics.regression import INTERVAL_LEVEL
from debiased_laplace.calibration.posteriors.summaries import PosteriorSummary
from debiased_laplace.calibration.predictions.arrays import Task
from debiased_laplace.calibration.predictions.classification import read_classification
from debiased_laplace.calibration.provenance import current_time, digest_targets, list_versions
from debiased_laplace.calibration.regression_evaluation import evaluate_regressions
from debiased_laplace.calibration.scaling.classification import Scaled, attach_logits, scale_classifications
from debiased_laplace.calibration.scaling.request import ScalingRequest, TemperatureScaling


def calibration_report(
    predictions: Mapping[str, Any],
    targets: Any,
    *,
    task: Task,
    baseline: str | None = None,
    n_bins: int = 15,
    confidence_level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    description: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    tables: Sequence[ReportTable] = (),
    figures: Sequence[ReportFigure] = (),
    levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    observation_noise: Any = None,
    target_unit: str | None = None,
    posteriors: Mapping[str, Any] | None = None,
    temperature_scaling: TemperatureScaling = "auto",
    validation: tuple[Any, Any] | None = None,
    logits: Mapping[str, Any] | None = None,
    ood: Mapping[str, Mapping[str, Any]] | None = None,
    clusters: Any = None,
    groups: Any = None,
    max_samples: int = 1_000_000,
    thresholds: ThresholdSource | None = None,
) -> CalibrationReport:
    """Compare how well several methods know what they do not know.

    Cost: a few passes over the predictions on their own device, then two vectors per method on the
    CPU, resampled `n_resamples` times (about half a second per method for 10,000 samples and
    1,000 draws).

    Args:
        predictions: method name to its predictions on the same samples in the same order. For
            classification probabilities (n, C), for a binary task also (n,) = P(class 1); for
            regression a pair (mean, standard deviation), each (n,) or (n, outputs), the observation
            noise included; or, with word on that noise, a pair (mean, covariance), samples, `Gaussian` or
            `Samples`. Numpy arrays, lists, or torch tensors on any device.
            Segmentation (N, C, ...), its samples (S, N, C, ...) and for a binary task (N, ...) are read as pixels.
        targets: labels (n,) or one-hot rows (n, C), of pixels labels (N, ...); for regression as the mean.
        task: "binary", "multiclass" or "regression".
        baseline: name of the method that the others are compared with; default: the first.
        n_bins: bins of equal width for the binned calibration errors, at least 2.
        confidence_level: coverage of all intervals; 1 minus it is the level of the verdicts.
        n_resamples: draws behind the p-value of calibration and the bootstrap, at least 2.
        seed: of these draws; no global generator is read or changed.
        class_names: one per class, for the table of classes.
        title: heading of the report.
        description: plain text under the verdict; a blank line separates paragraphs.
        metadata: notes on the experiment, text or numbers, shown under the settings and stored in the JSON.
        tables: extra sections with tables.
        figures: extra sections with figures.
        levels: of the central intervals whose coverage and width are reported, whole percents (regression).
        observation_noise: standard deviation of the noise to add to covariances and samples, which lack it: a number,
            (outputs,) or (n, outputs) for all methods, or a mapping from methods to theirs (regression).
        target_unit: unit of the targets, for labels (regression).
        posteriors: name to Laplace posterior, this package's or laplace-torch's, or to its `PosteriorSummary`: a
            section on what was fitted.
        temperature_scaling: a row for the baseline after temperature scaling (for regression, after multiplying its
            standard deviations by the scale of its errors), which every other method is compared with too.
            "cross_fitted": every fifth of the test set is scaled with what the other four fifths say. "validation":
            with what `validation` says. "auto": the latter where it is given, else the former from 100 samples on.
            "none": no such row.
        validation: the baseline's predictions on labelled samples outside of the test set, and their targets; for
            classification probabilities or logits.
        logits: method to its logits (n, C), for the temperature of methods whose probabilities are rounded to 0.
        ood: name of a set of samples out of distribution to the predictions there of every method, in the forms of
            `predictions`: how well they are told from the test set. Posterior samples (S, n, C) on both sets also give
            mutual information as a score.
        clusters: one id of any kind per sample (a patient, a video): samples of one id may depend on each other, and
            every interval speaks of drawing other ids. Pixels are clustered by image without asking.
        groups: name of a grouping to the group of every sample, or one such sequence: the main metrics on each group.
            For pixels one per image or one per pixel.
        max_samples: pixels to draw at most, the same for every method.
        thresholds: gates that the report is judged by, as of `CalibrationReport.check`; their outcomes stand on top.

    Returns:
        The report; nothing is written before `save`.

    Raises:
        ValueError: for input that is not what it should be: NaN or infinity, negative probabilities,
            rows that do not sum to 1 within 1e-3, labels out of range, unequal lengths, standard
            deviations of 0 or less, no samples, fewer than two classes, unknown names.

    References:
        Gneiting and Raftery (2007), doi:10.1198/016214506000001437 (proper scores);
        Bröcker and Smith (2007), doi:10.1175/WAF993.1 (consistency of reliability diagrams);
        Kumar, Liang, Ma (2019), arXiv 1909.10155 (debiased calibration error).
    """
    _check_task(task, observation_noise, target_unit)
    _check_texts(title=title, description=description, target_unit=target_unit)
    if isinstance(class_names, str) or isinstance(levels, (int, float)):
        raise ValueError(f"class_names and levels must be sequences; got {class_names!r} and {levels!r}.")
    settings = Settings(n_bins, confidence_level, n_resamples, seed, tuple(levels))
    first = _choose_baseline(predictions, baseline)
    test = lay_out_test_set(
        predictions, targets, task=task, groups=groups, clusters=clusters, max_samples=max_samples, seed=seed
    )
    settings = replace(settings, groups=test.groupings)
    request = ScalingRequest(first, temperature_scaling, validation, test.lay_out_logits(logits))
    if task == "regression":
        scaled, data = evaluate_regressions(
            predictions, targets, settings, request, observation_noise=observation_noise, target_unit=target_unit
        )
    else:
        scaled, data = _evaluate_classification(test, task, settings, request)
    evaluations = scaled.evaluations
    data = _name_classes(data, class_names)
    scores = {method: e.scores for method, e in evaluations.items()}
    references = (first,) if scaled.record is None else (first, scaled.record.method)
    detection = DetectionRequest(ood, first, confidence_level, observation_noise, max_samples, seed)
    inside = {method: evaluations[method].inside for method in predictions}
    sets, warnings_of_sets = evaluate_detection(detection, inside, task=task)
    warnings = (
        *warn_about_size(data.n, n_resamples),
        *test.warnings,
        *warn_about_classes(evaluations[first].result.curves, data.class_names),
        *(w for e in evaluations.values() for w in e.warnings),
        *scaled.warnings,
        *warnings_of_sets,
    )
    report = CalibrationReport(
        task=task,
        title=title if title is not None else "Calibration report",
        description=description or "",
        created=current_time(),
        software=list_versions(),
        data=data,
        settings=_list_settings(settings, task, first),
        metadata={str(k): read_scalar(v, f"metadata {k!r}") for k, v in (metadata or {}).items()},
        baseline=first,
        methods={m: replace(e.result, score_sums=sum_scores(e.scores, test.clusters)) for m, e in evaluations.items()},
        comparisons=compare_methods(
            scores,
            references,
            confidence_level=confidence_level,
            clusters=test.clusters,
            fitting_errors=scaled.fitting_errors,
        ),
        tables=tuple(tables),
        figures=tuple(figures),
        warnings=warnings,
        posteriors=_summaries(posteriors, confidence_level),
        scaling=scaled.record,
        ood=sets,
        groups=collect_groups(test.groupings, {method: e.groups for method, e in evaluations.items()}),
    )
    return report if thresholds is None else replace(report, checks=report.check(thresholds).outcomes)


def _check_task(task: Task, observation_noise: Any, target_unit: str | None) -> None:
    if task not in get_args(Task):
        expected = ", ".join(map(repr, get_args(Task)))
        raise ValueError(f"task must be one of {expected}; got {task!r}.")
    if task != "regression" and not (observation_noise is None and target_unit is None):
        raise ValueError(f"observation_noise and target_unit belong to task='regression'; got task={task!r}.")


def _check_texts(**given: Any) -> None:
    for name, text in given.items():
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{name} must be text; got {type(text).__name__}.")


def _summaries(posteriors: Mapping[str, Any] | None, confidence_level: float) -> Mapping[str, PosteriorSummary]:
    """What was fitted; laplace-torch is loaded only where there is something to summarize."""
    if not posteriors:
        return {}
    from debiased_laplace.calibration.posteriors.summarizing import summarize_posteriors

    return summarize_posteriors(posteriors, confidence_level=confidence_level)


def _choose_baseline(predictions: Mapping[str, Any], baseline: str | None) -> str:
    """The baseline's name; the names of the methods are checked on the way."""
    if not isinstance(predictions, Mapping) or not predictions:
        raise ValueError(
            "predictions must map names of methods to their predictions, at least one; got "
            f"{'an empty mapping' if isinstance(predictions, Mapping) else type(predictions).__name__}."
        )
    for name in predictions:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ValueError(f"The name of a method must be printable text; got {name!r}.")
    if baseline is None:
        return next(iter(predictions))
    if baseline not in predictions:
        raise ValueError(f"baseline must be one of {', '.join(map(repr, predictions))}; got {baseline!r}.")
    return baseline


def _evaluate_classification(
    test: LabelledSet,
    task: Literal["binary", "multiclass"],
    settings: Settings,
    request: ScalingRequest,
) -> tuple[Scaled, DataSummary]:
    read = {
        method: replace(
            read_classification(method, p, test.targets, task=task, n_bins=settings.n_bins), clusters=test.clusters
        )
        for method, p in test.predictions.items()
    }
    n_classes = {method: p.n_classes for method, p in read.items()}
    if len(set(n_classes.values())) > 1:
        raise ValueError(f"All methods must have the same classes; got {n_classes}.")
    one = next(iter(read.values()))
    data = DataSummary(one.n, one.n_classes, None, digest_targets(one.targets), None)
    read = attach_logits(read, request)
    evaluations = {m: evaluate_classification(m, p, settings) for m, p in read.items()}
    return scale_classifications(read, evaluations, request, settings, task=task), data


def _name_classes(data: DataSummary, class_names: Sequence[str] | None) -> DataSummary:
    if class_names is None:
        return data
    names = tuple(str(name) for name in class_names)
    if len(names) != data.n_classes:
        raise ValueError(
            f"class_names must have one name for each of {data.n_classes or 'no'} classes; got {len(names)}."
        )
    return replace(data, class_names=names)


def _list_settings(settings: Settings, task: str, baseline: str) -> dict[str, str | int | float]:
    listed: dict[str, str | int | float] = {"task": task, "baseline": baseline}
    listed |= asdict(settings)
    del listed["levels"], listed["groups"]
    if task == "regression":  # bins of another kind there
        del listed["n_bins"]
        listed["levels"] = ", ".join(f"{100 * level:g} %" for level in settings.levels)
        listed["interval_level"] = INTERVAL_LEVEL
    return listed
