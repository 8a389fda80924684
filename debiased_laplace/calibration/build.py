"""Calibration reports from predictions and targets."""

import hashlib
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from debiased_laplace.calibration.check import ThresholdSource
from debiased_laplace.calibration.comparisons import compare_methods, sum_scores
from debiased_laplace.calibration.contents import (
    ClassificationCurves,
    DataSummary,
    MethodResult,
    ReportFigure,
    ReportTable,
    Scalar,
    Task,
    check_text,
    read_scalar,
)
from debiased_laplace.calibration.counts import CountPredictions
from debiased_laplace.calibration.findings import summarize, warn_of_useless
from debiased_laplace.calibration.inputs import (
    Settings,
    as_tensor,
    check_whole_number,
    name_labels,
    name_validation,
    read_clusters,
    read_labels,
)
from debiased_laplace.calibration.intervals import Units
from debiased_laplace.calibration.metrics import classification, constant, out_of_distribution, regression
from debiased_laplace.calibration.metrics.definitions import CLASSIFICATION, DETECTION, REGRESSION
from debiased_laplace.calibration.positions import Positions, as_rows
from debiased_laplace.calibration.probabilities import (
    ClassificationPredictions,
    read_probabilities,
    reduce_classification,
)
from debiased_laplace.calibration.regression import RegressionPredictions, noise_of, read_regression, read_regressions
from debiased_laplace.calibration.report import CalibrationReport
from debiased_laplace.calibration.scaling import (
    Scaled,
    ScalingRequest,
    TemperatureScaling,
    scale_classification,
    scale_regression,
)
from debiased_laplace.calibration.temperature import attach_logits
from debiased_laplace.checks import one_of

Member = TypeVar("Member")

FEW_SAMPLES = FEW_CLUSTERS = 30
FEW_RESAMPLES = 200
FEW_POSTERIOR_SAMPLES = 100
SOFTWARE = ("debiased-laplace", "netcal", "torch", "numpy", "matplotlib")


@dataclass(frozen=True)
class _TestSet:
    """Predictions of all methods on the test set, the scaled baseline, and the functions that measure predictions.

    `score` returns the per-sample scores of paired comparisons, `detect` those of out-of-distribution detection,
    `constant` holds the scores of a constant prediction.
    """

    read: Mapping[str, Any]
    scaled: Scaled
    measure: Callable[[Any], MethodResult]
    score: Callable[[Any], dict[str, Tensor]]
    detect: Callable[[Any], dict[str, Tensor]]
    data: DataSummary
    constant: Mapping[str, float]
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
    """Compare the calibration of several methods on one test set.

    Cost: a few passes over the predictions on their own device, then a few numbers per sample on the CPU
    (benchmarks/report_scale.py measures time and memory).

    Args:
        predictions: method name to its predictions on the same samples in the same order, as NumPy arrays, lists, or
            torch tensors on any device. Classification: probabilities (n, C), posterior samples (S, n, C) of them, or
            for a binary task (n,) = P(class 1); with positions (N, C, ...), (S, N, C, ...) or (N, ...). Regression: a
            pair (mean, standard deviation), each (n,) or (n, outputs), observation noise included; or, with
            `observation_noise`, a pair (mean, covariance) or samples; or `Gaussian` or `Samples`; of counts `Counts`.
        targets: labels (n,) as numbers or as names out of `class_names`, one-hot rows (n, C), or labels of positions
            (N, ...); for regression as the mean.
        task: "binary", "multiclass" or "regression".
        baseline: name of the method that the others are compared with; default: the first.
        n_bins: bins of equal width for the binned calibration errors, at least 2.
        confidence_level: coverage of all intervals; 1 minus it is the level of the verdicts.
        n_resamples: draws for the p-values of calibration, at least 2.
        seed: of these draws; no global generator is read or changed.
        class_names: one per class, for the table of classes.
        title: heading of the report.
        description: plain text under the findings; a blank line separates paragraphs.
        metadata: notes on the experiment, text or numbers, shown under the settings and stored in the JSON.
        tables: extra sections with tables.
        figures: extra sections with figures.
        observation_noise: standard deviation of the noise to add to covariances and samples (regression): a number,
            (outputs,) or (n, outputs) for all methods, or a mapping from methods to theirs.
        target_unit: unit of the targets, for labels (regression).
        posteriors: name to Laplace posterior, of this package or laplace-torch, or to its `PosteriorSummary`.
        temperature_scaling: whether to add the baseline after temperature scaling (regression: after multiplying its
            standard deviations by the scale of its errors), as a second reference. "cross_fitted": each fifth of the
            test set is scaled with the number fitted on the others. "validation": with the number fitted on
            `validation`. "auto": the latter if it is given, else the former from 100 samples on. "none": no such row.
        validation: the baseline's predictions (or logits) on labelled samples outside of the test set, and their
            targets.
        logits: method to its logits (n, C), for negative log-likelihood and temperature where probabilities are rounded
            to 0.
        ood: name of a set of samples out of distribution to the predictions there of every method, in the forms of
            `predictions`. Posterior samples on both sets also give mutual information as a score.
        clusters: one id of any kind per sample (a patient, a video): samples of one id may depend on each other, and
            every interval is over drawing other ids. By default the positions of an image are a cluster.
        max_samples: positions to draw at most, the same for every method.
        thresholds: gates as of `CalibrationReport.check`; the report shows their outcomes on top.

    Returns:
        The report; nothing is written before `save`.

    Raises:
        ValueError: if an argument is of the wrong type, shape or range, for example rows of probabilities that do not
            sum to 1 within 1e-3, or standard deviations of 0 or less.

    References:
        Gneiting and Raftery (2007), doi:10.1198/016214506000001437 (proper scores);
        Bröcker and Smith (2007), doi:10.1175/WAF993.1 (consistency of reliability diagrams);
        Kumar, Liang, Ma (2019), arXiv 1909.10155 (debiased calibration error).
    """
    _check_options(task, observation_noise, target_unit, logits, title=title, description=description)
    tables, figures = _read_members("tables", tables, ReportTable), _read_members("figures", figures, ReportFigure)
    names = tuple(check_text(str(c), "class_names") for c in _read_members("class_names", class_names, object))
    for name, mapping in (("metadata", metadata), ("logits", logits), ("posteriors", posteriors)):
        if mapping is not None and not isinstance(mapping, Mapping):
            raise ValueError(f"{name} must be a mapping; got {type(mapping).__name__}.")
    settings = Settings(n_bins, confidence_level, n_resamples, seed)
    max_samples = check_whole_number("max_samples", max_samples, 1)
    if task != "regression":
        targets, validation = name_labels(targets, names), name_validation(validation, names)
    first = _choose_baseline(predictions, baseline)
    request = ScalingRequest(first, temperature_scaling, validation)
    if task == "regression":
        units = _read_units(targets, clusters, None, settings)
        read = read_regressions(predictions, targets, observation_noise=observation_noise)
        test = _prepare_regression(read, request, units, settings, observation_noise)
    else:
        predictions, targets, drawn = as_rows(predictions, targets, task=task, max_samples=max_samples, seed=seed)
        units = _read_units(targets, clusters, drawn, settings)
        classified = _read_classification(predictions, targets, settings, task)
        classified = attach_logits(classified, {m: _pick_logits(m, z, drawn) for m, z in (logits or {}).items()})
        test = _prepare_classification(classified, request, units, settings, task)
    methods, scores = _measure_rows(test, first, units)
    if class_names is not None and len(names) != test.data.n_classes:
        n_classes = test.data.n_classes or "no"
        raise ValueError(f"class_names must have one name for each of {n_classes} classes; got {len(names)}.")
    data, record = replace(test.data, class_names=names or None, target_unit=target_unit), test.scaled.record
    sets, warnings_of_sets = out_of_distribution.evaluate_sets(
        {} if ood is None else ood,
        {method: test.detect(p) for method, p in test.read.items()},
        data.n_classes or data.n_outputs or 0,
        units,
        settings,
        task=task,
        baseline=first,
        observation_noise=observation_noise,
        max_samples=max_samples,
    )
    summaries = {}
    if posteriors:
        from debiased_laplace.calibration.posteriors import summarize_posteriors  # this imports laplace-torch

        summaries = summarize_posteriors(posteriors, settings.confidence_level)
    used = {name for result in methods.values() for name in result.metrics} | set(DETECTION if sets else ())
    definitions = (REGRESSION if task == "regression" else CLASSIFICATION) | DETECTION
    listed: dict[str, Scalar] = {"task": task, "baseline": first, **vars(settings)}
    if task == "regression":  # `n_bins` are bins of confidence
        del listed["n_bins"]
        listed["interval_level"] = regression.INTERVAL_LEVEL
    report = CalibrationReport(
        task=task,
        title="Calibration report" if title is None else title,
        description=description or "",
        created=_current_time(),
        software=_list_versions(),
        data=data,
        settings=listed,
        metadata={str(k): read_scalar(v, f"metadata {k!r}") for k, v in (metadata or {}).items()},
        baseline=first,
        methods=methods,
        definitions={name: definition for name, definition in definitions.items() if name in used},
        comparisons=compare_methods(
            scores,
            [first] if record is None else [first, record.method],
            units,
            fitting_errors={} if record is None else {record.method: test.scaled.fitting_error},
        ),
        tables=tables,
        figures=figures,
        warnings=(
            *_warn_of_little_data(units, settings, data, methods[first]),
            *test.warnings,
            *test.scaled.warnings,
            *warnings_of_sets,
        ),
        posteriors=summaries,
        scaling=record,
        ood=sets,
        constant=test.constant,
    )
    report = replace(report, summary=summarize(report), warnings=(*warn_of_useless(report), *report.warnings))
    return report if thresholds is None else replace(report, checks=report.check(thresholds).outcomes)


def _check_options(task: Task, observation_noise: Any, target_unit: Any, logits: Any, **texts: Any) -> None:
    one_of(task, Task, "task")
    if task != "regression" and not (observation_noise is None and target_unit is None):
        raise ValueError(f"observation_noise and target_unit belong to task='regression'; got task={task!r}.")
    if task == "regression" and logits:
        raise ValueError("logits belong to classification; got them for task='regression'.")
    for name, text in {**texts, "target_unit": target_unit}.items():
        if text is not None:
            check_text(text, name)


def _read_members(name: str, given: Sequence[Any] | None, kind: type[Member]) -> tuple[Member, ...]:
    if given is None:
        return ()
    if isinstance(given, str) or not isinstance(given, Sequence | np.ndarray):
        raise ValueError(f"{name} must be a sequence; got {type(given).__name__}.")
    for member in given:
        if not isinstance(member, kind):
            raise ValueError(f"{name} must hold {kind.__name__} objects; got {type(member).__name__}.")
    return tuple(given)


def _choose_baseline(predictions: Mapping[str, Any], baseline: str | None) -> str:
    """Return the name of the baseline, after a check of the names of all methods."""
    if not isinstance(predictions, Mapping) or not predictions:
        got = "an empty mapping" if isinstance(predictions, Mapping) else type(predictions).__name__
        raise ValueError(f"predictions must map names of methods to their predictions, at least one; got {got}.")
    for name in predictions:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ValueError(f"The name of a method must be printable text; got {name!r}.")
    if baseline is None:
        return next(iter(predictions))
    if not isinstance(baseline, str) or baseline not in predictions:
        raise ValueError(f"baseline must be one of {', '.join(map(repr, predictions))}; got {baseline!r}.")
    return baseline


def _read_units(targets: Any, clusters: Any, positions: Positions | None, settings: Settings) -> Units:
    """Return the units of the samples: the given clusters, else the images of positions, else the samples."""
    y = as_tensor(targets, "Targets")
    if y.ndim == 0:
        raise ValueError("Targets must hold one row for each sample; got a single number.")
    ids = None if clusters is None else read_clusters(clusters)
    if positions is not None:
        ids = positions.image if ids is None else positions.spread(ids)
    if ids is None:
        return Units(len(y), settings.confidence_level)
    if ids.numel() != len(y):
        raise ValueError(f"clusters must hold one id for each of {len(y)} samples; got {ids.numel()}.")
    codes = torch.unique(ids, return_inverse=True)[1]  # an image of which no position was drawn is no cluster
    return Units(len(y), settings.confidence_level, codes)


def _pick_logits(method: str, logits: Any, positions: Positions | None) -> Any:
    if positions is None:
        return logits
    z = as_tensor(logits, f"Logits of {method!r}")
    return positions.pick(z, "positions") if z.ndim > 2 else z


def _read_classification(
    predictions: Mapping[str, Any], targets: Any, settings: Settings, task: Literal["binary", "multiclass"]
) -> dict[str, ClassificationPredictions]:
    read = {}
    for method, p in predictions.items():
        probabilities = read_probabilities(method, p, task=task)
        n, C = probabilities.n, probabilities.n_classes
        labels = read_labels(targets, n=n, n_classes=C, where=f"Predictions of {method!r}")
        read[method] = reduce_classification(probabilities, labels, n_bins=settings.n_bins)
    n_classes = {method: p.source.n_classes for method, p in read.items()}
    if len(set(n_classes.values())) > 1:
        raise ValueError(f"All methods must have the same classes; got {n_classes}.")
    return read


def _prepare_classification(
    read: Mapping[str, ClassificationPredictions],
    request: ScalingRequest,
    units: Units,
    settings: Settings,
    task: Literal["binary", "multiclass"],
) -> _TestSet:
    one = read[request.baseline]
    return _TestSet(
        read,
        scale_classification(read, request, units, settings, task=task),
        lambda p: classification.measure_classification(p, units, settings),
        lambda p: classification.scores_of(p, units, n_bins=settings.n_bins),
        lambda p: out_of_distribution.scores_of_probabilities(p.uncertainty, p.source),
        DataSummary(one.n, one.source.n_classes, None, _digest(one.targets)),
        constant.score_class_frequencies(one.targets, one.source.n_classes),
        [
            f"{method}: {p.n_impossible} of {p.n} predictions gave the true class probability 0. Their negative "
            f"log-likelihood is infinite; it was counted as {classification.negative_log_likelihood(p).max():.1f} nats "
            "each, so the mean is a lower bound."
            for method, p in read.items()
            if p.n_impossible
        ],
    )


def _prepare_regression(
    read: Mapping[str, RegressionPredictions],
    request: ScalingRequest,
    units: Units,
    settings: Settings,
    observation_noise: Any,
) -> _TestSet:
    first, validation = request.baseline, None
    if request.validation is not None:
        prediction, y = request.validation
        noise = noise_of(first, prediction, observation_noise)
        validation = read_regression(f"{first}, validation", prediction, y, observation_noise=noise)
    scaled = scale_regression(read, request, units, settings, validation=validation)

    def measure(p: RegressionPredictions) -> MethodResult:
        result = regression.measure_regression(p, units, settings)
        if p is not scaled.row:
            return result
        # one factor changes no order, and those of different folds only mix it
        metrics = {name: e for name, e in result.metrics.items() if name != "aurc"}
        return replace(result, metrics=metrics, selection=())

    one = read[first]
    is_count = isinstance(one, CountPredictions)
    score_constant = constant.score_constant_rate if is_count else constant.score_constant_gaussian
    return _TestSet(
        read,
        scaled,
        measure,
        regression.scores_of,
        out_of_distribution.scores_of_regression,
        DataSummary(one.n, None, one.n_outputs, _digest(one.targets)),
        score_constant(one.targets),
        [
            f"{method}: the predictive is known by {S} samples only, so its negative log-likelihood is on average "
            "larger than that of the predictive which they stand for."
            for method, p in read.items()
            if (S := p.n_samples) is not None and S < FEW_POSTERIOR_SAMPLES
        ],
    )


def _measure_rows(
    test: _TestSet, baseline: str, units: Units
) -> tuple[dict[str, MethodResult], dict[str, dict[str, Tensor]]]:
    """Return the results and the per-sample scores of all rows, the scaled one after the baseline."""
    rows, record = {}, test.scaled.record
    for method, p in test.read.items():
        rows[method] = p
        if method == baseline and record is not None:
            rows[record.method] = test.scaled.row
    scores = {name: test.score(p) for name, p in rows.items()}
    results = {name: replace(test.measure(p), score_sums=sum_scores(scores[name], units)) for name, p in rows.items()}
    if record is not None:
        results[record.method] = replace(results[record.method], description=record.description)
    return results, scores


def _warn_of_little_data(units: Units, settings: Settings, data: DataSummary, result: MethodResult) -> list[str]:
    """Return warnings of few samples, clusters or resamples, and of classes without a sample."""
    warnings, draws = [], settings.n_resamples
    if units.n < FEW_SAMPLES:
        warnings.append(f"Only {units.n} test samples: normal intervals and verdicts are rough below {FEW_SAMPLES}.")
    if draws < FEW_RESAMPLES:
        warnings.append(f"Only {draws} resamples: p-values of calibration are no finer than {1 / (draws + 1):.2g}.")
    if units.codes is not None:
        warnings.append(
            f"The {units.n} samples come in {units.count} clusters. Intervals and verdicts allow for samples of one "
            "cluster that depend on each other; noise floors and the p-value of calibration cannot, so that the "
            "p-value is too small."
        )
        if units.count < FEW_CLUSTERS:
            warnings.append(f"Only {units.count} clusters: intervals and verdicts are rough below {FEW_CLUSTERS}.")
    classes = result.curves.classes if isinstance(result.curves, ClassificationCurves) else ()
    if absent := [data.name_class(c.label) for c in classes if c.n == 0]:
        more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
        warnings.append(f"No test sample of {len(absent)} of {len(classes)} classes: {', '.join(absent[:10])}{more}.")
    return warnings


def _digest(targets: Tensor) -> str:
    """Return the SHA-256 of the targets as little-endian int64 or float64 in C order."""
    array = targets.cpu().numpy()
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


def _current_time() -> str:
    """Return the ISO 8601 time in UTC; `SOURCE_DATE_EPOCH`, where set, makes builds reproducible."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch and not (epoch.isascii() and epoch.isdigit()):
        raise ValueError(f"SOURCE_DATE_EPOCH must be a number of seconds; got {epoch!r}.")
    now = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch else datetime.now(timezone.utc)
    return now.replace(microsecond=0).isoformat()


def _list_versions() -> dict[str, str]:
    """Return the versions of Python and of what computes and draws, without importing any of it."""
    versions = {"python": platform.python_version()}
    for name in SOFTWARE:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed as a distribution"
    return versions
