"""One call from predictions to a report that can be read, stored, checked and compared."""

import hashlib
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from debiased_laplace.calibration.check import ThresholdSource
from debiased_laplace.calibration.comparisons import compare_methods, sum_scores
from debiased_laplace.calibration.contents import (
    ClassificationCurves,
    DataSummary,
    MethodResult,
    MetricDefinition,
    OutOfDistributionSet,
    PosteriorSummary,
    ReportFigure,
    ReportTable,
    Scalar,
    Task,
    check_text,
    read_scalar,
)
from debiased_laplace.calibration.findings import summarize
from debiased_laplace.calibration.inputs import Settings, as_tensor, read_clusters, read_labels
from debiased_laplace.calibration.intervals import Units
from debiased_laplace.calibration.metrics import classification, regression
from debiased_laplace.calibration.metrics.definitions import CLASSIFICATION, DETECTION, REGRESSION
from debiased_laplace.calibration.metrics.out_of_distribution import (
    evaluate_sets,
    scores_of_probabilities,
    scores_of_regression,
)
from debiased_laplace.calibration.positions import Positions, as_rows
from debiased_laplace.calibration.probabilities import read_probabilities, reduce_classification
from debiased_laplace.calibration.regression import noise_of, read_regression, read_regressions
from debiased_laplace.calibration.report import CalibrationReport
from debiased_laplace.calibration.scaling import (
    Scaled,
    ScalingRequest,
    TemperatureScaling,
    scale_classification,
    scale_regression,
)
from debiased_laplace.calibration.temperature import attach_logits

Extra = TypeVar("Extra", ReportTable, ReportFigure)

FEW_SAMPLES = FEW_CLUSTERS = 30
FEW_RESAMPLES = 200
FEW_POSTERIOR_SAMPLES = 100
SOFTWARE = ("debiased-laplace", "netcal", "torch", "numpy", "matplotlib")


@dataclass(frozen=True)
class _Evaluation:
    """Results of all methods on a test set, the scaled baseline after the baseline.

    Attributes:
        scores: method to per-sample scores, for paired comparisons.
        test: out-of-distribution scores of the caller's methods on the test set.
        scaled: what scaling added.
    """

    data: DataSummary
    methods: dict[str, MethodResult]
    scores: dict[str, dict[str, Tensor]]
    test: dict[str, dict[str, Tensor]]
    scaled: Scaled
    warnings: list[str]


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
    observation_noise: Any = None,
    target_unit: str | None = None,
    posteriors: Mapping[str, Any] | None = None,
    temperature_scaling: TemperatureScaling = "auto",
    validation: tuple[Any, Any] | None = None,
    logits: Mapping[str, Any] | None = None,
    ood: Mapping[str, Mapping[str, Any]] | None = None,
    clusters: Any = None,
    max_samples: int = 1_000_000,
    thresholds: ThresholdSource | None = None,
) -> CalibrationReport:
    """Compare how well several methods know what they do not know.

    Cost: a few passes over the predictions on their own device, then a few numbers per sample on the CPU
    (examples/benchmarks/report_scale.py measures time and memory).

    Args:
        predictions: method name to its predictions on the same samples in the same order. For classification
            probabilities (n, C), or posterior samples (S, n, C) of them, for a binary task also (n,) = P(class 1); for
            regression a pair (mean, standard deviation), each (n,) or (n, outputs), the observation noise included; or,
            with word on that noise, a pair (mean, covariance), samples, `Gaussian` or `Samples`. Numpy arrays, lists,
            or torch tensors on any device. Predictions with positions (N, C, ...), samples (S, N, C, ...) of them and
            for a binary task (N, ...) are read position by position.
        targets: labels (n,) or one-hot rows (n, C), of positions labels (N, ...); for regression as the mean.
        task: "binary", "multiclass" or "regression".
        baseline: name of the method that the others are compared with; default: the first.
        n_bins: bins of equal width for the binned calibration errors, at least 2.
        confidence_level: coverage of all intervals; 1 minus it is the level of the verdicts.
        n_resamples: draws behind the p-values of calibration, at least 2.
        seed: of these draws; no global generator is read or changed.
        class_names: one per class, for the table of classes.
        title: heading of the report.
        description: plain text under the findings; a blank line separates paragraphs.
        metadata: notes on the experiment, text or numbers, shown under the settings and stored in the JSON.
        tables: extra sections with tables.
        figures: extra sections with figures.
        observation_noise: standard deviation of the noise to add to covariances and samples, which lack it: a number,
            (outputs,) or (n, outputs) for all methods, or a mapping from methods to theirs (regression).
        target_unit: unit of the targets, for labels (regression).
        posteriors: name to Laplace posterior, this package's or laplace-torch's, or to its `PosteriorSummary`: a
            section on what was fitted.
        temperature_scaling: a row for the baseline after temperature scaling (for regression, after multiplying its
            standard deviations by the scale of its errors), which every other method is compared with too.
            "cross_fitted": every fifth of the test set is scaled with the number fitted on the other four fifths.
            "validation": with the number fitted on `validation`. "auto": the latter where it is given, else the former
            from 100 samples on. "none": no such row.
        validation: the baseline's predictions on labelled samples outside of the test set, and their targets; for
            classification probabilities or logits.
        logits: method to its logits (n, C), for the temperature of methods whose probabilities are rounded to 0.
        ood: name of a set of samples out of distribution to the predictions there of every method, in the forms of
            `predictions`: how well they are told from the test set. Posterior samples (S, n, C) on both sets also give
            mutual information as a score.
        clusters: one id of any kind per sample (a patient, a video): samples of one id may depend on each other, and
            every interval speaks of drawing other ids. Positions are clustered by image without asking.
        max_samples: positions to draw at most, the same for every method.
        thresholds: gates that the report is judged by, as of `CalibrationReport.check`; their outcomes stand on top.

    Returns:
        The report; nothing is written before `save`.

    Raises:
        ValueError: for input that is not what it should be: NaN or infinity, negative probabilities, rows that do not
            sum to 1 within 1e-3, labels out of range, unequal lengths, standard deviations of 0 or less, no samples,
            fewer than two classes, unknown names.

    References:
        Gneiting and Raftery (2007), doi:10.1198/016214506000001437 (proper scores);
        Bröcker and Smith (2007), doi:10.1175/WAF993.1 (consistency of reliability diagrams);
        Kumar, Liang, Ma (2019), arXiv 1909.10155 (debiased calibration error).
    """
    _check_options(task, observation_noise, target_unit, logits, title=title, description=description)
    for name, value in (("class_names", class_names), ("tables", tables), ("figures", figures)):
        if value is not None and (isinstance(value, str) or not isinstance(value, Sequence | np.ndarray)):
            raise ValueError(f"{name} must be a sequence; got {type(value).__name__}.")
    for name, mapping in (("metadata", metadata), ("logits", logits), ("posteriors", posteriors)):
        if mapping is not None and not isinstance(mapping, Mapping):
            raise ValueError(f"{name} must be a mapping; got {type(mapping).__name__}.")
    settings = Settings(n_bins, confidence_level, n_resamples, seed)
    first = _choose_baseline(predictions, baseline)
    request = ScalingRequest(first, temperature_scaling, validation)
    if task == "regression":
        units = Units(_count_rows(targets), settings.confidence_level, _read_codes(clusters, None))
        found = _evaluate_regression(predictions, targets, units, settings, request, observation_noise)
    else:
        predictions, targets, drawn = as_rows(predictions, targets, task=task, max_samples=max_samples, seed=seed)
        units = Units(_count_rows(targets), settings.confidence_level, _read_codes(clusters, drawn))
        given = {m: _pick_logits(m, z, drawn) for m, z in (logits or {}).items()}
        found = _evaluate_classification(predictions, targets, units, settings, request, (task, given))
    record = found.scaled.record
    sets: dict[str, OutOfDistributionSet] = {}
    warnings_of_sets: list[str] = []
    if ood is not None:
        sets, warnings_of_sets = evaluate_sets(
            ood,
            found.test,
            found.data.n_classes or found.data.n_outputs or 0,
            units,
            settings,
            task=task,
            baseline=first,
            observation_noise=observation_noise,
            max_samples=max_samples,
        )
    report = CalibrationReport(
        task=task,
        title="Calibration report" if title is None else title,
        description=description or "",
        created=_current_time(),
        software=_list_versions(),
        data=_name_data(found.data, class_names, target_unit),
        settings=_list_settings(settings, task, first),
        metadata={str(k): read_scalar(v, f"metadata {k!r}") for k, v in (metadata or {}).items()},
        baseline=first,
        methods=found.methods,
        definitions=_choose_definitions(task, found.methods, sets),
        comparisons=compare_methods(
            found.scores,
            [first] if record is None else [first, record.method],
            units,
            fitting_errors={} if record is None else {record.method: found.scaled.fitting_error},
        ),
        tables=_check_kind("tables", tables, ReportTable),
        figures=_check_kind("figures", figures, ReportFigure),
        warnings=(
            *_warn_of_size(units, settings),
            *_warn_of_classes(found.methods[first], class_names),
            *found.warnings,
            *found.scaled.warnings,
            *warnings_of_sets,
        ),
        posteriors=_summarize_posteriors(posteriors, settings.confidence_level),
        scaling=record,
        ood=sets,
    )
    report = replace(report, summary=summarize(report))
    return report if thresholds is None else replace(report, checks=report.check(thresholds).outcomes)


def _check_options(task: Task, observation_noise: Any, target_unit: Any, logits: Any, **texts: Any) -> None:
    if task not in get_args(Task):
        raise ValueError(f"task must be one of {', '.join(map(repr, get_args(Task)))}; got {task!r}.")
    if task != "regression" and not (observation_noise is None and target_unit is None):
        raise ValueError(f"observation_noise and target_unit belong to task='regression'; got task={task!r}.")
    if task == "regression" and logits:
        raise ValueError("logits belong to classification; got them for task='regression'.")
    for name, text in {**texts, "target_unit": target_unit}.items():
        if text is not None:
            check_text(text, name)


def _check_kind(name: str, given: Sequence[Any] | None, kind: type[Extra]) -> tuple[Extra, ...]:
    wrong = [x for x in given or () if not isinstance(x, kind)]
    if wrong:
        raise ValueError(f"{name} must hold {kind.__name__} objects; got {type(wrong[0]).__name__}.")
    return tuple(given or ())


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
    if not isinstance(baseline, str) or baseline not in predictions:
        raise ValueError(f"baseline must be one of {', '.join(map(repr, predictions))}; got {baseline!r}.")
    return baseline


def _count_rows(targets: Any) -> int:
    y = as_tensor(targets, "Targets")
    if y.ndim == 0:
        raise ValueError("Targets must hold one row for each sample; got a single number.")
    return len(y)


def _read_codes(clusters: Any, positions: Positions | None) -> Tensor | None:
    """Cluster of every sample, or of every position: its image where nothing else is given."""
    if clusters is None and positions is None:
        return None
    ids = None if clusters is None else read_clusters(clusters)
    if positions is not None:
        ids = positions.image if ids is None else positions.spread(ids)
    assert ids is not None  # for the type checker
    return torch.unique(ids, return_inverse=True)[1]  # an image of which no position was drawn is no cluster


def _pick_logits(method: str, logits: Any, positions: Positions | None) -> Any:
    if positions is None:
        return logits
    z = as_tensor(logits, f"Logits of {method!r}")
    return positions.pick(z, "positions") if z.ndim > 2 else z


def _evaluate_classification(
    predictions: Mapping[str, Any],
    targets: Any,
    units: Units,
    settings: Settings,
    request: ScalingRequest,
    options: tuple[Literal["binary", "multiclass"], Mapping[str, Any]],
) -> _Evaluation:
    """Results of classifiers; `options` are the task, and the logits of methods."""
    task, logits = options
    read = {}
    for method, p in predictions.items():
        probabilities = read_probabilities(method, p, task=task)
        n, C = probabilities.n, probabilities.n_classes
        labels = read_labels(targets, n=n, n_classes=C, where=f"Predictions of {method!r}")
        read[method] = reduce_classification(probabilities, labels, n_bins=settings.n_bins)
    n_classes = {method: p.source.n_classes for method, p in read.items()}
    if len(set(n_classes.values())) > 1:
        raise ValueError(f"All methods must have the same classes; got {n_classes}.")
    _check_units(units, next(iter(read.values())).n)
    read = attach_logits(read, logits)
    losses = {method: classification.negative_log_likelihood(p) for method, p in read.items()}
    scaled = scale_classification(read, losses, request, units, settings, task=task)
    one = read[request.baseline]
    return _Evaluation(
        DataSummary(one.n, one.source.n_classes, None, _digest(one.targets)),
        *_evaluate_rows(
            read,
            scaled,
            request.baseline,
            units,
            lambda p: classification.measure_classification(p, units, settings),
            lambda p: classification.scores_of(p, units, n_bins=settings.n_bins),
        ),
        {m: scores_of_probabilities(p.uncertainty, p.source) for m, p in read.items()},
        scaled,
        [
            f"{method}: {p.n_impossible} of {p.n} predictions gave the true class probability 0. Their negative "
            f"log-likelihood is infinite; it was counted as {losses[method].max().item():.1f} nats each, so the mean "
            "is a lower bound."
            for method, p in read.items()
            if p.n_impossible
        ],
    )


def _evaluate_regression(
    predictions: Mapping[str, Any],
    targets: Any,
    units: Units,
    settings: Settings,
    request: ScalingRequest,
    observation_noise: Any,
) -> _Evaluation:
    read = read_regressions(predictions, targets, observation_noise=observation_noise)
    first, validation = request.baseline, None
    one = read[first]
    _check_units(units, one.n)
    if request.validation is not None:
        prediction, y = request.validation
        noise = noise_of(first, prediction, observation_noise)
        validation = read_regression(f"{first}, validation", prediction, y, observation_noise=noise)
    scaled = scale_regression(read, request, units, settings, validation=validation)
    methods, scores = _evaluate_rows(
        read,
        scaled,
        first,
        units,
        lambda p: regression.measure_regression(p, units, settings),
        regression.scores_of,
    )
    if scaled.record is not None:
        # one factor changes no order, and those of different folds only mix it
        row = methods[scaled.record.method]
        metrics = {name: e for name, e in row.metrics.items() if name != "aurc"}
        methods[scaled.record.method] = replace(row, metrics=metrics, selection=())
    warnings = []
    for method, p in read.items():
        S = p.distribution.n_samples
        if S is not None and S < FEW_POSTERIOR_SAMPLES:
            warnings.append(
                f"{method}: the predictive is known by {S} samples only, so its negative log-likelihood is on average "
                "larger than that of the predictive which they stand for."
            )
    return _Evaluation(
        DataSummary(one.n, None, one.n_outputs, _digest(one.targets)),
        methods,
        scores,
        {m: scores_of_regression(p) for m, p in read.items()},
        scaled,
        warnings,
    )


def _check_units(units: Units, n: int) -> None:
    if units.codes is not None and units.codes.numel() != n:
        raise ValueError(f"clusters must hold one id for each of {n} samples; got {units.codes.numel()}.")


def _evaluate_rows(
    read: Mapping[str, Any],
    scaled: Scaled,
    baseline: str,
    units: Units,
    measure: Callable[[Any], MethodResult],
    score: Callable[[Any], dict[str, Tensor]],
) -> tuple[dict[str, MethodResult], dict[str, dict[str, Tensor]]]:
    """Results and per-sample scores of all rows of the report, the scaled one after the baseline."""
    rows, record = {}, scaled.record
    for method, p in read.items():
        rows[method] = p
        if method == baseline and record is not None:
            rows[record.method] = scaled.row
    scores = {name: score(p) for name, p in rows.items()}
    results = {}
    for name, p in rows.items():
        result = measure(p)
        results[name] = replace(
            result,
            metrics={**result.metrics, **scaled.metrics.get(name, {})},
            description=record.description if record is not None and name == record.method else "",
            score_sums=sum_scores(scores[name], units),
        )
    return results, scores


def _name_data(data: DataSummary, class_names: Sequence[str] | None, target_unit: str | None) -> DataSummary:
    if class_names is None:
        return replace(data, target_unit=target_unit)
    names = tuple(check_text(str(name), "class_names") for name in class_names)
    if len(names) != data.n_classes:
        raise ValueError(
            f"class_names must have one name for each of {data.n_classes or 'no'} classes; got {len(names)}."
        )
    return replace(data, class_names=names)


def _choose_definitions(
    task: Task, methods: Mapping[str, MethodResult], sets: Mapping[str, OutOfDistributionSet]
) -> dict[str, MetricDefinition]:
    """The definitions of the metrics that a report has."""
    used = {name for result in methods.values() for name in result.metrics}
    used |= set(DETECTION) if sets else set()
    known = (REGRESSION if task == "regression" else CLASSIFICATION) | DETECTION
    return {name: definition for name, definition in known.items() if name in used}


def _list_settings(settings: Settings, task: str, baseline: str) -> dict[str, Scalar]:
    listed: dict[str, Scalar] = {"task": task, "baseline": baseline, **vars(settings)}
    if task == "regression":  # bins of another kind there
        del listed["n_bins"]
        listed["interval_level"] = regression.INTERVAL_LEVEL
    return listed


def _summarize_posteriors(posteriors: Mapping[str, Any] | None, level: float) -> dict[str, PosteriorSummary]:
    """What was fitted; laplace-torch is loaded only where there is something to summarize."""
    if not posteriors:
        return {}
    from debiased_laplace.calibration.posteriors import summarize_posteriors

    return summarize_posteriors(posteriors, confidence_level=level)


def _warn_of_size(units: Units, settings: Settings) -> list[str]:
    """What few samples, clusters or draws mean for the numbers."""
    warnings = []
    if units.n < FEW_SAMPLES:
        warnings.append(f"Only {units.n} test samples: normal intervals and verdicts are rough below {FEW_SAMPLES}.")
    if settings.n_resamples < FEW_RESAMPLES:
        finest = 1 / (settings.n_resamples + 1)
        warnings.append(
            f"Only {settings.n_resamples} resamples: p-values of calibration are no finer than {finest:.2g}."
        )
    if units.codes is not None:
        warnings.append(
            f"The {units.n} samples come in {units.count} clusters. Intervals and verdicts allow for samples of one "
            "cluster that depend on each other; noise floors and the p-value of calibration cannot, so that the "
            "p-value is too small."
        )
        if units.count < FEW_CLUSTERS:
            warnings.append(f"Only {units.count} clusters: intervals and verdicts are rough below {FEW_CLUSTERS}.")
    return warnings


def _warn_of_classes(result: MethodResult, names: Sequence[str] | None) -> list[str]:
    """Classes that the test set lacks."""
    if not isinstance(result.curves, ClassificationCurves):
        return []
    absent = [c.label for c in result.curves.classes if c.n == 0]
    if not absent:
        return []
    shown = ", ".join(names[label] if names else str(label) for label in absent[:10])
    more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
    return [f"No test sample of {len(absent)} of {len(result.curves.classes)} classes: {shown}{more}."]


def _digest(targets: Tensor) -> str:
    """SHA-256 of the targets as little-endian int64 or float64 in C order."""
    array = targets.cpu().numpy()
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


def _current_time() -> str:
    """ISO 8601 time in UTC; `SOURCE_DATE_EPOCH`, where set, makes builds reproducible."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch and not (epoch.isascii() and epoch.isdigit()):
        raise ValueError(f"SOURCE_DATE_EPOCH must be a number of seconds; got {epoch!r}.")
    now = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch else datetime.now(timezone.utc)
    return now.replace(microsecond=0).isoformat()


def _list_versions() -> dict[str, str]:
    """Versions of Python and of what computes and draws, without importing any of it."""
    versions = {"python": platform.python_version()}
    for name in SOFTWARE:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed as a distribution"
    return versions
