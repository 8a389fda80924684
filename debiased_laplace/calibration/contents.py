"""Everything a report says, as data; the renderers add no number of their own."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeVar

from debiased_laplace.calibration.comparisons import Comparison
from debiased_laplace.calibration.estimates import Estimate
from debiased_laplace.calibration.gates.outcomes import ThresholdOutcome
from debiased_laplace.calibration.metrics.bin_sensitivity import BinSensitivity
from debiased_laplace.calibration.metrics.classwise import ClassCount
from debiased_laplace.calibration.metrics.curves import (
    ConfidenceBin,
    CoverageLevel,
    HistogramBin,
)
from debiased_laplace.calibration.metrics.groups import GroupResult
from debiased_laplace.calibration.metrics.out_of_distribution import OutOfDistributionSet
from debiased_laplace.calibration.metrics.regression_curves import ExamplePrediction, OutputMetrics, SpreadBin
from debiased_laplace.calibration.metrics.selective import SelectionCurves
from debiased_laplace.calibration.posteriors.summaries import PosteriorSummary
from debiased_laplace.calibration.predicting.records import PredictionRecord
from debiased_laplace.calibration.predictions.arrays import Task
from debiased_laplace.calibration.rendering.svg import adopt_svg, draw_svg
from debiased_laplace.calibration.scaling.records import ScalingRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ReportTable:
    """A table in a report.

    Attributes:
        title: heading of its section.
        columns: one heading per column.
        rows: one cell per column: text, a number (numpy's and torch's scalars too), or None where missing.
        note: a sentence below the table.

    Raises:
        ValueError: for a row of another length, or a cell that is no text and no finite number.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def __post_init__(self) -> None:
        columns = tuple(str(column) for column in self.columns)
        rows = []
        for i, row in enumerate(self.rows):
            if len(row) != len(columns):
                raise ValueError(f"Table {self.title!r} has {len(columns)} columns, but row {i} has {len(row)} cells.")
            where = f"row {i} of table {self.title!r}"
            rows.append(tuple(None if cell is None else read_scalar(cell, where) for cell in row))
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "rows", tuple(rows))


@dataclass(frozen=True)
class ReportFigure:
    """A figure in a report.

    Attributes:
        title: heading of its section.
        svg: one SVG element. It becomes part of the page, so scripts, style sheets and references
            to other files are refused. Black turns into the colour of the page's text.
        alt: what a reader who cannot see the figure should know.
        note: a sentence below the figure.

    Raises:
        ValueError: if the text alternative is empty or the SVG is not acceptable.
    """

    title: str
    svg: str
    alt: str
    note: str = ""

    def __post_init__(self) -> None:
        if not self.alt.strip():
            raise ValueError(f"Figure {self.title!r} needs a text alternative `alt`; got none.")
        adopt_svg(self.svg, name="check", alt=self.alt)

    @classmethod
    def from_matplotlib(cls, title: str, figure: "Figure", *, alt: str, note: str = "") -> "ReportFigure":
        """A matplotlib figure, drawn so that its black text and axes are legible in dark mode too."""
        return cls(title, draw_svg(figure), alt, note)


@dataclass(frozen=True)
class ClassificationCurves:
    """What the figures and tables of one method show.

    Attributes:
        bins: reliability diagram.
        classes: accuracy and calibration of each class.
        sensitivity: the expected calibration error over the number of its bins.
    """

    bins: tuple[ConfidenceBin, ...]
    classes: tuple[ClassCount, ...]
    sensitivity: tuple[BinSensitivity, ...] = ()


@dataclass(frozen=True)
class RegressionCurves:
    """What the figures of one method show.

    Attributes:
        coverage: of central intervals.
        pit: histogram of the probability integral transform.
        spread: observed against predicted size of the errors, in bins of the predicted standard deviation.
        examples: single predictions with their targets.
        outputs: metrics of every output alone, where there are several.
        form: what the predictive is, in words.
    """

    coverage: tuple[CoverageLevel, ...]
    pit: tuple[HistogramBin, ...]
    spread: tuple[SpreadBin, ...] = ()
    examples: tuple[ExamplePrediction, ...] = ()
    outputs: tuple[OutputMetrics, ...] = ()
    form: str = ""


@dataclass(frozen=True)
class MethodResult:
    """Metrics and curves of one method, and how it came about where the report itself made it.

    Attributes:
        metrics: name to estimate.
        curves: what its figures show.
        description: how it came about; empty where the caller gave its predictions.
        selection: what it gains by answering only where it is sure.
        score_sums: name of a score to its sums over interleaved batches of the test set, "samples" to their sizes: by
            these another report of the same test set can be compared in pairs.
    """

    metrics: Mapping[str, Estimate]
    curves: ClassificationCurves | RegressionCurves
    description: str = ""
    selection: SelectionCurves | None = None
    score_sums: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSummary:
    """The test set: its size, and a digest that tells two test sets apart.

    Attributes:
        n: number of samples.
        n_classes: number of classes; None for regression.
        n_outputs: number of regression outputs; None for classification.
        targets_sha256: of the targets as little-endian int64 or float64 in C order.
        class_names: one per class, or None.
        target_unit: unit of the regression targets, for labels, or None.
    """

    n: int
    n_classes: int | None
    n_outputs: int | None
    targets_sha256: str
    class_names: tuple[str, ...] | None
    target_unit: str | None = None

    def name_class(self, label: int) -> str:
        """The class's name, or its number."""
        return self.class_names[label] if self.class_names else str(label)


@dataclass(frozen=True)
class ReportContents:
    """A finished report.

    Attributes:
        task: what was predicted.
        title: heading of the page.
        description: paragraphs of plain text, separated by blank lines.
        created: ISO 8601 time of creation.
        software: name to version.
        data: the test set.
        settings: options of the report as used.
        metadata: the caller's own notes.
        baseline: name of the method the others are compared with.
        methods: name to result, in the caller's order.
        comparisons: of every other method with the baseline.
        tables: the caller's tables.
        figures: the caller's figures.
        warnings: what a reader must know before trusting the numbers.
        posteriors: name to what was fitted.
        predicted: method to how it predicted, where `evaluate` did.
        scaling: how the scaled baseline came about, None where the report has no such row.
        ood: name of a set out of distribution to how well it is told from the test set.
        checks: what came of the thresholds that the report was made with.
        groups: every group of samples that is judged apart, with the metrics of all methods.
    """

    task: Task
    title: str
    description: str
    created: str
    software: Mapping[str, str]
    data: DataSummary
    settings: Mapping[str, str | int | float]
    metadata: Mapping[str, str | int | float]
    baseline: str
    methods: Mapping[str, MethodResult]
    comparisons: tuple[Comparison, ...]
    tables: tuple[ReportTable, ...]
    figures: tuple[ReportFigure, ...]
    warnings: tuple[str, ...]
    posteriors: Mapping[str, PosteriorSummary] = field(default_factory=dict)
    predicted: Mapping[str, PredictionRecord] = field(default_factory=dict)
    scaling: ScalingRecord | None = None
    ood: Mapping[str, OutOfDistributionSet] = field(default_factory=dict)
    checks: tuple[ThresholdOutcome, ...] = ()
    groups: tuple[GroupResult, ...] = ()

    @property
    def metrics(self) -> dict[str, dict[str, Estimate]]:
        """Method to metric name to estimate."""
        return {method: dict(result.metrics) for method, result in self.methods.items()}


_Curves = TypeVar("_Curves", ClassificationCurves, RegressionCurves)


def curves_of(methods: Mapping[str, MethodResult], kind: type[_Curves]) -> dict[str, _Curves]:
    """Method to its curves, of the methods that have this kind."""
    return {name: result.curves for name, result in methods.items() if isinstance(result.curves, kind)}


def read_scalar(value: Any, where: str) -> str | int | float:
    """Text or a finite number as Python's own type, also from numpy and torch scalars.

    Args:
        value: what was given.
        where: where it stands, for the message.

    Raises:
        ValueError: for anything else.
    """
    if hasattr(value, "item") and not isinstance(value, str):
        try:
            value = value.item()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"Expected a single value in {where}; got an array.") from error
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"Expected text or a number in {where}; got {type(value).__name__}.")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"Expected a number that a float can hold in {where}; got one of {value.bit_length()} bits.")
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"Expected a finite number in {where}; got {value}.")
    return value
