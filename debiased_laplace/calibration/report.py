"""One call from predictions to a report that can be read, stored and compared."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

from debiased_laplace.calibration.comparisons import compare_to_baseline
from debiased_laplace.calibration.contents import (
    DataSummary,
    ReportContents,
    ReportFigure,
    ReportTable,
    read_scalar,
)
from debiased_laplace.calibration.evaluation import (
    Evaluation,
    Settings,
    evaluate_classification,
    evaluate_regression,
    warn_about_classes,
    warn_about_size,
)
from debiased_laplace.calibration.metrics.regression import INTERVAL_LEVEL
from debiased_laplace.calibration.predictions.arrays import Task
from debiased_laplace.calibration.predictions.classification import read_classification
from debiased_laplace.calibration.predictions.regression import read_regression
from debiased_laplace.calibration.provenance import current_time, digest_targets, list_versions
from debiased_laplace.calibration.rendering.html import render_html
from debiased_laplace.calibration.rendering.json_document import render_json
from debiased_laplace.calibration.rendering.markdown import render_markdown, render_text

Format = Literal["html", "json", "md"]


class CalibrationReport(ReportContents):
    """Calibration of several methods on one test set, with error bars and verdicts.

    `metrics[method][name]` is an `Estimate`; `comparisons` holds the paired differences to the
    baseline, `warnings` what a reader must know before trusting a number.
    """

    def __str__(self) -> str:
        return render_text(self)

    def __repr__(self) -> str:
        methods = ", ".join(self.methods)
        return f"CalibrationReport({self.task}, n={self.data.n}, methods: {methods})"

    def to_json(self) -> str:
        """The report as JSON text: every number, its interval or the reason why it has none."""
        return render_json(self)

    def to_html(self) -> str:
        """The report as one page without scripts or external files."""
        return render_html(self)

    def to_markdown(self) -> str:
        """Headline table, comparisons and extra tables in Markdown."""
        return render_markdown(self)

    def save(
        self, folder: str | os.PathLike[str], *, formats: Sequence[Format] = ("html", "json", "md")
    ) -> tuple[Path, ...]:
        """Write report.html, report.json and report.md into a folder, which is made if missing.

        Args:
            folder: where to write; present files of these names are replaced.
            formats: which of the three.

        Returns:
            The paths, in the order of `formats`.

        Raises:
            ValueError: for no format or an unknown one.
        """
        writers = {"html": self.to_html, "json": self.to_json, "md": self.to_markdown}
        chosen = () if isinstance(formats, str) else tuple(formats)
        if not chosen or any(f not in writers for f in chosen):
            raise ValueError(f"formats must be a sequence out of 'html', 'json' and 'md'; got {formats!r}.")
        Path(folder).mkdir(parents=True, exist_ok=True)
        paths = []
        for name in chosen:
            path = Path(folder) / f"report.{name}"
            path.write_text(writers[name](), encoding="utf-8", newline="\n")
            paths.append(path)
        return tuple(paths)


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
) -> CalibrationReport:
    """Compare how well several methods know what they do not know.

    Cost: a few passes over the predictions on their own device, then two vectors per method on the
    CPU, resampled `n_resamples` times (about half a second per method for 10,000 samples and
    1,000 draws).

    Args:
        predictions: method name to its predictions on the same samples in the same order. For
            classification probabilities (n, C), for a binary task also (n,) = P(class 1); for
            regression a pair (mean, standard deviation), each (n,) or (n, outputs), the observation
            noise included. Numpy arrays, lists, or torch tensors on any device.
        targets: labels (n,) or one-hot rows (n, C); for regression as the mean.
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
    if task not in get_args(Task):
        expected = ", ".join(map(repr, get_args(Task)))
        raise ValueError(f"task must be one of {expected}; got {task!r}.")
    settings = Settings(n_bins, confidence_level, n_resamples, seed)
    first = _choose_baseline(predictions, baseline)
    if task == "regression":
        evaluations, data = _evaluate_regression(predictions, targets, settings)
    else:
        evaluations, data = _evaluate_classification(predictions, targets, task, settings)
    data = _name_classes(data, class_names)
    scores = {method: e.scores for method, e in evaluations.items()}
    warnings = warn_about_size(data.n, n_resamples)
    warnings += warn_about_classes(evaluations[first].result.curves, data.class_names)
    warnings += [w for e in evaluations.values() for w in e.warnings]
    return CalibrationReport(
        task=task,
        title=title if title is not None else "Calibration report",
        description=description or "",
        created=current_time(),
        software=list_versions(),
        data=data,
        settings=_list_settings(settings, task, first),
        metadata={str(k): read_scalar(v, f"metadata {k!r}") for k, v in (metadata or {}).items()},
        baseline=first,
        methods={method: e.result for method, e in evaluations.items()},
        comparisons=compare_to_baseline(scores, first, confidence_level=confidence_level),
        tables=tuple(tables),
        figures=tuple(figures),
        warnings=tuple(warnings),
    )


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
    predictions: Mapping[str, Any],
    targets: Any,
    task: Literal["binary", "multiclass"],
    settings: Settings,
) -> tuple[dict[str, Evaluation], DataSummary]:
    read = {
        method: read_classification(method, p, targets, task=task, n_bins=settings.n_bins)
        for method, p in predictions.items()
    }
    n_classes = {method: p.n_classes for method, p in read.items()}
    if len(set(n_classes.values())) > 1:
        raise ValueError(f"All methods must have the same classes; got {n_classes}.")
    one = next(iter(read.values()))
    data = DataSummary(one.n, one.n_classes, None, digest_targets(one.targets), None)
    return {m: evaluate_classification(m, p, settings) for m, p in read.items()}, data


def _evaluate_regression(
    predictions: Mapping[str, Any], targets: Any, settings: Settings
) -> tuple[dict[str, Evaluation], DataSummary]:
    read = {method: read_regression(method, p, targets) for method, p in predictions.items()}
    one = next(iter(read.values()))
    data = DataSummary(one.n, None, one.n_outputs, digest_targets(one.targets), None)
    return {m: evaluate_regression(p, settings) for m, p in read.items()}, data


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
    if task == "regression":  # no bins and no draws there
        del listed["n_bins"], listed["n_resamples"], listed["seed"]
        listed["interval_level"] = INTERVAL_LEVEL
    return listed
