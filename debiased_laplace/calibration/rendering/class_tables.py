"""Which classes a method recognises least, and whose probabilities are furthest off."""

from html import escape

from debiased_laplace.calibration.contents import ClassificationCurves, ReportContents, ReportTable, curves_of
from debiased_laplace.calibration.metrics.classwise import ClassCount
from debiased_laplace.calibration.rendering.formatting import NOTHING, format_interval, format_number
from debiased_laplace.calibration.rendering.sections import render_table

MAX_CLASSES = 20


def render_classes(contents: ReportContents) -> str:
    """Accuracy and calibration of each class, the baseline's worst first; empty for regression."""
    curves = curves_of(contents.methods, ClassificationCurves)
    if not curves:
        return ""
    return _render_accuracy(contents, curves) + _render_calibration(contents, curves)


def _render_accuracy(contents: ReportContents, curves: dict[str, ClassificationCurves]) -> str:
    present = [c for c in curves[contents.baseline].classes if c.n > 0]
    present.sort(key=lambda c: (c.n_correct / c.n, c.label))
    rows: list[list[str | int]] = []
    for c in present[:MAX_CLASSES]:
        shares = [_show_accuracy(method.classes[c.label]) for method in curves.values()]
        rows.append([contents.data.name_class(c.label), c.n, *shares])
    table = ReportTable("Accuracy by class", ["class", "samples", *curves], rows)
    more = len(present) - MAX_CLASSES
    note = f" The {more} classes with the highest accuracy are not shown." if more > 0 else ""
    return (
        "<h2>Accuracy by class</h2>"
        f"<p>Share of each class that was recognised, with Wilson intervals; the classes that "
        f"{escape(contents.baseline)} recognises least come first.{note}</p>{render_table(table)}"
    )


def _render_calibration(contents: ReportContents, curves: dict[str, ClassificationCurves]) -> str:
    judged = [(_excess(c), c.label) for c in curves[contents.baseline].classes if c.error is not None]
    if not judged:
        return ""
    judged.sort(key=lambda pair: (-pair[0], pair[1]))
    rows: list[list[str | int]] = []
    for _, label in judged[:MAX_CLASSES]:
        errors = [_show_error(method.classes[label]) for method in curves.values()]
        rows.append([contents.data.name_class(label), curves[contents.baseline].classes[label].n, *errors])
    table = ReportTable("Calibration by class", ["class", "samples", *curves], rows)
    more = len(judged) - MAX_CLASSES
    note = f" The {more} other classes are not shown." if more > 0 else ""
    return (
        "<h3>Calibration by class</h3>"
        "<p>Expected calibration error of the probability of each class over all samples, and behind the slash what "
        "chance alone would make of it; the classes whose error is furthest above it with "
        f"{escape(contents.baseline)} come first.{note}</p>{render_table(table)}"
    )


def _excess(c: ClassCount) -> float:
    return (c.error or 0.0) - (c.noise_floor or 0.0)


def _show_accuracy(c: ClassCount) -> str:
    return f"{format_number(c.n_correct / c.n, 3)} {format_interval(c.low, c.high, 2)}" if c.n else NOTHING


def _show_error(c: ClassCount) -> str:
    return f"{format_number(c.error)} / {format_number(c.noise_floor)}"
