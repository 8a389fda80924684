"""Contents of a report as plain data: stored, read back, tabulated and drawn."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from debiased_laplace.checks import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA_VERSION = "2.1"

Task = Literal["binary", "multiclass", "regression"]
Better = Literal["lower", "higher", "zero", "one", "level", "none"]
Section = Literal["headline", "detail", "selective", "detection"]
Verdict = Literal["better", "worse", "no detectable difference"]
KLVerdict = Literal["closer", "further", "no detectable difference"]
Status = Literal["passed", "failed", "inconclusive"]
Criterion = Literal["bound", "estimate"]
Quantity = Literal["value", "change", "relative change"]
Scalar = str | int | float

PAIRED_AS = {"accuracy": "error"}
"""Metrics whose paired differences are stored as those of their opposite."""
SCORES: dict[str, str] = {
    "conformal": "conformal (mutual information, logit variance)",
    "mutual_information": "mutual information",
    "logit_variance": "logit variance",
    "entropy": "predictive entropy",
    "max_probability": "1 \u2212 maximum probability",
    "standard_deviation": "predicted standard deviation",
    "function_std": "standard deviation of the function",
}
"""Scores of out-of-distribution detection, in the order of a report."""


@dataclass(frozen=True)
class Estimate:
    """Estimate from n test samples with its confidence interval, and the method of estimation in words.

    `value` is None where it cannot be computed, `low` and `high` where no interval has correct coverage; `reason` then
    states the cause. `standard_error` is the standard deviation over test sets; None where it is unknown.
    """

    value: float | None
    low: float | None
    high: float | None
    standard_error: float | None
    n: int
    estimator: str
    reason: str | None = None

    def __post_init__(self) -> None:
        if any(x is not None and not isfinite(x) for x in (self.value, self.low, self.high, self.standard_error)):
            raise ValueError(f"Expected finite numbers in an estimate; got {self}.")
        if (self.low is None) != (self.high is None) or (self.low is None) == (self.reason is None):
            raise ValueError(f"Expected an interval, or a reason to have none; got {self}.")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"Expected low <= high in an estimate; got {self}.")

    @property
    def known(self) -> float:
        """The value; a `ValueError` where it is None."""
        if self.value is None:
            raise ValueError(f"There is no value: {self.reason}.")
        return self.value


@dataclass(frozen=True)
class MetricDefinition:
    """Definition of a metric in words, with its label in tables and the section in which it is shown.

    `better` is the good direction: "zero", "one" and "level" are targets, "none" is no judgement. `unit` is "target"
    for the unit of the targets, "squared" for its square, and empty for plain numbers.
    """

    label: str
    better: Better
    meaning: str
    reference: str = ""
    section: Section = "headline"
    unit: Literal["", "target", "squared"] = ""


@dataclass(frozen=True)
class Comparison:
    """Difference of a method's score to that of a reference on the same samples; a lower score is better.

    `baseline` is the reference: the baseline, or the baseline after scaling. `low`, `high` and the two-sided `p_value`
    are those of this comparison alone; `adjusted_p_value` (Holm) allows for all of them and decides the verdict. The
    interval that is shown beside the verdict, from `adjusted_low` to `adjusted_high`, is of `adjusted_level`, at which
    Holm's procedure tests this comparison: it excludes 0 exactly where the verdict is "better" or "worse".
    """

    method: str
    baseline: str
    metric: str
    difference: float
    low: float | None
    high: float | None
    standard_error: float | None
    p_value: float | None
    adjusted_p_value: float | None
    verdict: Verdict
    estimator: str = ""
    adjusted_low: float | None = None
    adjusted_high: float | None = None
    adjusted_level: float | None = None


@dataclass(frozen=True)
class ReportTable:
    """User's table in a report, with a heading and a note below it.

    A cell is text, a finite number (also a scalar of NumPy or torch), or None where it is missing.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def __post_init__(self) -> None:
        check_text(self.note, f"the note of table {check_text(self.title, 'the title of a table')!r}")
        for name, value in (("columns", self.columns), ("rows", self.rows)):
            if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
                raise ValueError(f"Expected a sequence of {name} in table {self.title!r}; got {shown(value)}.")
        columns = tuple(check_text(str(column), f"the columns of table {self.title!r}") for column in self.columns)
        rows = []
        for i, row in enumerate(self.rows):
            if isinstance(row, (str, Mapping)) or not hasattr(row, "__len__"):
                raise ValueError(f"Expected a sequence of cells in table {self.title!r}; row {i} is {row!r}.")
            if len(row) != len(columns):
                got = f"{len(columns)} columns, but row {i} has {len(row)} cells"
                raise ValueError(f"Expected a cell for every column of table {self.title!r}; got {got}.")
            where = f"row {i} of table {self.title!r}"
            rows.append(tuple(None if cell is None else read_scalar(cell, where) for cell in row))
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "rows", tuple(rows))


@dataclass(frozen=True)
class ReportFigure:
    """User's SVG figure in a report, with a heading, a text alternative and a note below it.

    It is shown as an image, in which nothing runs or is loaded.
    """

    title: str
    svg: str
    alt: str
    note: str = ""

    def __post_init__(self) -> None:
        for name, text in vars(self).items():
            check_text(text, f"`{name}` of a figure")
        if not self.alt.strip():
            raise ValueError(f"Figure {self.title!r} needs a text alternative `alt`; got none.")
        if "<svg" not in self.svg:
            raise ValueError(f"Expected an <svg> element in figure {self.title!r}; got {self.svg[:40]!r}.")

    @classmethod
    def from_matplotlib(cls, title: str, figure: "Figure", *, alt: str, note: str = "") -> "ReportFigure":
        """Convert a matplotlib figure; its black text and axes turn light in dark mode."""
        from debiased_laplace.calibration.svg import draw_svg

        return cls(title, draw_svg(figure), alt, note)


@dataclass(frozen=True)
class ConfidenceBin:
    """Bin [left, right) of a reliability diagram; `confidence`, `accuracy` and their intervals are None if it is empty.

    `low` and `high` are the Wilson interval of the accuracy, `consistent_low` and `consistent_high` the quantiles of
    the accuracy if the confidences are right.
    """

    left: float
    right: float
    n: int
    n_correct: int
    confidence: float | None = None
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    consistent_low: float | None = None
    consistent_high: float | None = None


@dataclass(frozen=True)
class ClassCount:
    """Samples of one class, and how many of them are predicted right, with the Wilson interval of that share.

    `error` is the expected calibration error of the class's probability over all samples, `noise_floor` its
    expectation if the probabilities are right.
    """

    label: int
    n: int
    n_correct: int
    low: float | None
    high: float | None
    error: float
    noise_floor: float


@dataclass(frozen=True)
class ClassificationCurves:
    """Reliability diagram and classes of one classifier."""

    bins: tuple[ConfidenceBin, ...]
    classes: tuple[ClassCount, ...]


@dataclass(frozen=True)
class CoverageLevel:
    """Share of targets inside central intervals of one nominal level, with its Wilson interval."""

    nominal: float
    observed: float
    low: float
    high: float


@dataclass(frozen=True)
class HistogramBin:
    """Count of values in [left, right), and the quantiles of the count if the predictive is right."""

    left: float
    right: float
    n: int
    consistent_low: float
    consistent_high: float


@dataclass(frozen=True)
class SpreadBin:
    """Errors of one output in one bin of the predicted standard deviation.

    `predicted` is the root of the mean predicted variance, `observed` the root of the mean squared error with its
    interval, `consistent_low` and `consistent_high` the quantiles of the latter if the predictive is right.
    """

    output: int
    n: int
    predicted: float
    observed: float
    low: float | None
    high: float | None
    consistent_low: float
    consistent_high: float


@dataclass(frozen=True)
class RegressionCurves:
    """Curves of one regression method, and the form of its predictive in words."""

    coverage: tuple[CoverageLevel, ...]
    pit: tuple[HistogramBin, ...]
    spread: tuple[SpreadBin, ...]
    form: str


@dataclass(frozen=True)
class RiskPoint:
    """Mean loss of the most confident samples, with the interval at this coverage alone.

    `oracle` is the mean loss of the same number of samples with the smallest losses.
    """

    coverage: float
    risk: float
    low: float | None
    high: float | None
    oracle: float


@dataclass(frozen=True)
class MethodResult:
    """Metrics and curves of one method, and the origin of a row that the report itself adds.

    `selection` is the risk against the coverage; empty for a scaled regression. `score_sums` maps each score to its
    sums over interleaved batches of the test set, and "samples" to their sizes: reports are paired by them.
    """

    metrics: Mapping[str, Estimate]
    curves: ClassificationCurves | RegressionCurves
    description: str = ""
    selection: tuple[RiskPoint, ...] = ()
    score_sums: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoreBin:
    """Samples in and out of distribution with a score in [left, right); the last bin is closed."""

    left: float
    right: float
    n_in_distribution: int
    n_out_of_distribution: int


@dataclass(frozen=True)
class Detection:
    """Detection of a set by one score of one method: `auroc`, `aupr`, `fpr95`, and the histogram of the score.

    Out of distribution is the positive class. All methods of a set have the same edges of the histogram.
    """

    method: str
    score: str
    metrics: Mapping[str, Estimate]
    histogram: tuple[ScoreBin, ...]


@dataclass(frozen=True)
class DetectionComparison:
    """Difference of a method's AUROC to the baseline's on the same samples, as in `Comparison`; higher is better.

    `baseline_score` is the same score, or entropy where the baseline does not have it. `below_chance` tells that the
    method's AUROC is below 0.5, so that also a better one is worse than chance.
    """

    method: str
    baseline: str
    score: str
    difference: float
    low: float | None
    high: float | None
    standard_error: float | None
    p_value: float | None
    adjusted_p_value: float | None
    verdict: Verdict
    baseline_score: str
    below_chance: bool
    adjusted_low: float | None = None
    adjusted_high: float | None = None
    adjusted_level: float | None = None


@dataclass(frozen=True)
class OutOfDistributionSet:
    """Number of samples of a set out of distribution, its detections, and the differences between methods."""

    n: int
    detections: tuple[Detection, ...]
    comparisons: tuple[DetectionComparison, ...] = ()

    @property
    def metrics(self) -> dict[str, dict[str, dict[str, Estimate]]]:
        """Method to score to metric to estimate."""
        nested: dict[str, dict[str, dict[str, Estimate]]] = {}
        for d in self.detections:
            nested.setdefault(d.method, {})[d.score] = dict(d.metrics)
        return nested


@dataclass(frozen=True)
class ScalingRecord:
    """Fit of the number that scales the baseline, whose row is named `method`.

    A "temperature" divides logits, a "factor" multiplies standard deviations. `value` is fitted on all `n_fit` samples,
    `per_fold` on the samples outside of each fold; it is empty with validation data. `n_at_bound` counts the fits that
    ended at a bound instead of an optimum.
    """

    method: str
    baseline: str
    quantity: Literal["temperature", "factor"]
    value: float
    per_fold: tuple[float, ...]
    n_fit: int
    n_at_bound: int = 0

    @property
    def short_name(self) -> str:
        """Name of the row inside a sentence, without a comma."""
        return f"{'temperature' if self.quantity == 'temperature' else 'variance'}-scaled {self.baseline}"

    @property
    def description(self) -> str:
        """Value and kind of the fit, for the head of the row's column."""
        symbol = "T" if self.quantity == "temperature" else "factor"
        if not self.per_fold:
            return f"{symbol} = {self.value:.3g}, fitted on {self.n_fit} validation samples"
        low, high = f"{min(self.per_fold):.3g}", f"{max(self.per_fold):.3g}"
        shown = low if low == high else f"{low} to {high}"
        return f"{symbol} = {shown}, cross-fitted over {len(self.per_fold)} folds of the test set"


@dataclass(frozen=True)
class PredictionRecord:
    """Prediction of the test set by one method: options, cost in wall time, and peak GPU memory.

    `kind` is "network", "Laplace posterior" or "callable"; `pred_type` ("glm" or "nn") and `link` are None where they
    do not apply, `n_samples` where nothing is drawn, `peak_bytes` without a GPU.
    """

    kind: str
    pred_type: str | None
    link: str | None
    n_samples: int | None
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class DirectionSummary:
    """Curvature along one direction as a mean per sample: biased on its own samples, and estimated from other ones.

    `place` is the rank by the former, from 1 on; the interval is that of the latter.
    """

    place: int
    in_sample: float
    curvature: float
    low: float | None
    high: float | None

    @property
    def inflation(self) -> float | None:
        """Ratio of the in-sample to the full-batch curvature; None where the latter is zero."""
        return self.in_sample / self.curvature if self.curvature > 0 else None

    @property
    def inflation_low(self) -> float | None:
        """Lower end of the interval of the inflation."""
        return self.in_sample / self.high if self.high else None

    @property
    def inflation_high(self) -> float | None:
        """Upper end of the interval of the inflation; None where the curvature may be zero."""
        return self.in_sample / self.low if self.low else None


@dataclass(frozen=True)
class SpectrumPoint:
    """Value at one place of the spectrum of the data's precision, in the unit of the prior precision."""

    place: int
    precision: float


@dataclass(frozen=True)
class HeldOutDifference:
    """Difference of two posteriors' KL divergences to the full-batch posterior, from n held-out samples, in nats.

    It is positive where the posterior is further away than `reference`. The standard error is paired, the p-value
    adjusted over the posteriors of the report (Holm). The normal intervals are those of `Comparison`.
    """

    reference: str
    difference: float
    standard_error: float
    low: float
    high: float
    p_value: float
    verdict: KLVerdict
    n: int
    adjusted_low: float | None = None
    adjusted_high: float | None = None
    adjusted_level: float | None = None


@dataclass(frozen=True)
class PosteriorSummary:
    """Summary of a fitted posterior: properties in the order of the page, smallest and largest prior precision.

    `directions` and the decreasing `spectrum` are selections; the former is empty where curvatures come from the
    directions' own samples. `held_out` compares with the first posterior, `notes` explain what is missing.
    """

    facts: Mapping[str, Scalar]
    prior_precision: tuple[float, float]
    directions: tuple[DirectionSummary, ...] = ()
    spectrum: tuple[SpectrumPoint, ...] = ()
    held_out: HeldOutDifference | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ThresholdOutcome:
    """Outcome of one threshold on one quantity of one method, also as a sentence.

    `relative_to` is the reference of a change. The limits are those of the confidence bound or of the estimate, as
    `judge` says. At least `min_samples` test samples are required.
    """

    metric: str
    method: str
    quantity: Quantity
    relative_to: str | None
    status: Status
    value: float | None
    low: float | None
    high: float | None
    minimum: float | None
    maximum: float | None
    judge: Criterion
    n: int
    min_samples: int
    message: str = ""

    @property
    def title(self) -> str:
        """Method, reference, metric and quantity in a few words."""
        against = f" against {self.relative_to}" if self.relative_to is not None else ""
        kind = "" if self.quantity == "value" else f", {self.quantity}"
        return f"{self.method}{against}: {self.metric}{kind}"


@dataclass(frozen=True)
class DataSummary:
    """Size of the test set, and the SHA-256 of its targets as little-endian int64 or float64 in C order.

    Classes belong to classification; outputs and the unit of the targets to regression.
    """

    n: int
    n_classes: int | None
    n_outputs: int | None
    targets_sha256: str
    class_names: tuple[str, ...] | None = None
    target_unit: str | None = None

    def name_class(self, label: int) -> str:
        """Return the name of a class, or its number."""
        return self.class_names[label] if self.class_names else str(label)


@dataclass(frozen=True)
class ReportContents:
    """Contents of a finished report; methods are in the user's order, definitions in that of the tables.

    `summary` has a sentence for each of `judged`. `predicted` is filled by `evaluate`, `checks` where thresholds were
    given. `constant` maps metrics to those of a constant prediction, the class frequencies or the moments of the
    targets. The second number of `schema_version` grows with new fields, the first with other changes.
    """

    task: Task
    title: str
    description: str
    created: str
    software: Mapping[str, str]
    data: DataSummary
    settings: Mapping[str, Scalar]
    metadata: Mapping[str, Scalar]
    baseline: str
    methods: Mapping[str, MethodResult]
    definitions: Mapping[str, MetricDefinition]
    comparisons: tuple[Comparison, ...]
    tables: tuple[ReportTable, ...]
    figures: tuple[ReportFigure, ...]
    warnings: tuple[str, ...]
    posteriors: Mapping[str, PosteriorSummary] = field(default_factory=dict)
    predicted: Mapping[str, PredictionRecord] = field(default_factory=dict)
    scaling: ScalingRecord | None = None
    ood: Mapping[str, OutOfDistributionSet] = field(default_factory=dict)
    checks: tuple[ThresholdOutcome, ...] = ()
    summary: tuple[str, ...] = ()
    constant: Mapping[str, float] = field(default_factory=dict)
    schema_version: str = SCHEMA_VERSION

    @property
    def metrics(self) -> dict[str, dict[str, Estimate]]:
        """Method to metric name to estimate."""
        return {method: dict(result.metrics) for method, result in self.methods.items()}

    @property
    def confidence_level(self) -> float:
        """Coverage of the intervals."""
        return float(self.settings["confidence_level"])

    @property
    def references(self) -> list[str]:
        """The baseline, and the scaled baseline where the report has that row."""
        return [self.baseline, *([] if self.scaling is None else [self.scaling.method])]

    @property
    def judged(self) -> list[str]:
        """Methods of `summary`: all but the references, or the baseline alone."""
        return [m for m in self.methods if m not in self.references] or [self.baseline]


def read_scalar(value: Any, where: str) -> Scalar:
    """Return text or a finite number, also a scalar of NumPy or torch, as a Python object; a bool as "yes" or "no"."""
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"Expected a single value in {where}; got an array.") from error
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return check_text(value, where)
    if not isinstance(value, (int, float)):
        raise ValueError(f"Expected text or a number in {where}; got {type(value).__name__}.")
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"Expected a finite number in {where}; got {value}.")
    return value


def check_text(text: Any, where: str) -> str:
    """Return text, and refuse anything else and surrogates, which UTF-8 cannot encode."""
    if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
        got = "a surrogate in it" if isinstance(text, str) else type(text).__name__
        raise ValueError(f"Expected text in {where}; got {got}.")
    return text
