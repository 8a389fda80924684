"""The contents of a report as plain data: what is stored, read back, tabulated and drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA_VERSION = "2.0"

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
"""Metrics whose paired differences a report keeps as those of their opposite."""
SCORES: dict[str, str] = {
    "conformal": "conformal (mutual information, logit variance)",
    "mutual_information": "mutual information",
    "logit_variance": "logit variance",
    "entropy": "predictive entropy",
    "max_probability": "1 \u2212 maximum probability",
    "standard_deviation": "predicted standard deviation",
}
"""Scores of out-of-distribution detection, in the order of a report."""


@dataclass(frozen=True)
class Estimate:
    """A number from a finite test set and its confidence interval.

    Attributes:
        value: in the unit of its metric; None where these predictions allow none.
        low: lower end of the interval; None, as `high`, where no interval with honest coverage exists.
        standard_error: standard deviation of the estimate over test sets; None where unknown.
        n: number of test samples behind it.
        estimator: how value and interval were obtained, in words.
        reason: why there is no interval or no value; None where there are both.

    Raises:
        ValueError: if a number is not finite, or if there is not exactly one of interval and reason.
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
        """The value, where there must be one.

        Raises:
            ValueError: if there is none.
        """
        if self.value is None:
            raise ValueError(f"There is no value: {self.reason}.")
        return self.value


@dataclass(frozen=True)
class MetricDefinition:
    """A metric in words.

    Attributes:
        label: name in tables.
        better: the good direction; "zero", "one" and "level" are targets, "none" is no judgement.
        meaning: one to three sentences.
        reference: authors (year) and where to find it.
        section: the table it belongs to.
        unit: "target" for the unit of the targets, "squared" for its square, empty for plain numbers.
    """

    label: str
    better: Better
    meaning: str
    reference: str = ""
    section: Section = "headline"
    unit: Literal["", "target", "squared"] = ""


@dataclass(frozen=True)
class Comparison:
    """A method's score minus that of a reference on the same samples; a lower score is better.

    Attributes:
        baseline: the reference: the baseline, or the baseline after scaling.
        low: lower end of this difference's own interval; None with one sample.
        p_value: two-sided, of no difference, for this comparison alone.
        adjusted_p_value: Holm's adjustment over all comparisons of the report.
        verdict: from the adjusted p-value and the sign.
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


@dataclass(frozen=True)
class ReportTable:
    """A table of the caller's in a report.

    Attributes:
        title: heading of its section.
        columns: one heading per column.
        rows: one cell per column: text, a finite number (numpy's and torch's scalars too), or None where missing.
        note: a sentence below the table.

    Raises:
        ValueError: for a row of another length, or a cell that is neither text nor a finite number.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def __post_init__(self) -> None:
        check_text(self.note, f"the note of table {check_text(self.title, 'the title of a table')!r}")
        columns = tuple(check_text(str(column), f"the columns of table {self.title!r}") for column in self.columns)
        rows = []
        for i, row in enumerate(self.rows):
            if isinstance(row, (str, Mapping)):
                raise ValueError(f"Expected a sequence of cells in table {self.title!r}; row {i} is {row!r}.")
            if len(row) != len(columns):
                raise ValueError(f"Table {self.title!r} has {len(columns)} columns, but row {i} has {len(row)} cells.")
            where = f"row {i} of table {self.title!r}"
            rows.append(tuple(None if cell is None else read_scalar(cell, where) for cell in row))
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "rows", tuple(rows))


@dataclass(frozen=True)
class ReportFigure:
    """A figure of the caller's in a report, shown as an image that can neither run nor load anything.

    Attributes:
        title: heading of its section.
        svg: an SVG document.
        alt: what a reader who cannot see the figure should know.
        note: a sentence below the figure.

    Raises:
        ValueError: if the text alternative is empty, or `svg` is no SVG.
    """

    title: str
    svg: str
    alt: str
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("title", "svg", "alt", "note"):
            check_text(getattr(self, name), f"`{name}` of a figure")
        if not self.alt.strip():
            raise ValueError(f"Figure {self.title!r} needs a text alternative `alt`; got none.")
        if "<svg" not in self.svg:
            raise ValueError(f"Expected an <svg> element in figure {self.title!r}; got {self.svg[:40]!r}.")

    @classmethod
    def from_matplotlib(cls, title: str, figure: "Figure", *, alt: str, note: str = "") -> "ReportFigure":
        """A matplotlib figure, whose black text and axes turn light in dark mode."""
        from debiased_laplace.calibration.svg import draw_svg

        return cls(title, draw_svg(figure), alt, note)


@dataclass(frozen=True)
class ConfidenceBin:
    """A bin of a reliability diagram, closed on the left; shares and means are None in an empty one.

    `low` and `high` are the accuracy's Wilson interval, the consistent ones its quantiles under right confidences.
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

    @property
    def is_consistent(self) -> bool:
        """Whether the accuracy lies between the quantiles; true for an empty bin."""
        if self.accuracy is None or self.consistent_low is None or self.consistent_high is None:
            return True
        return self.consistent_low <= self.accuracy <= self.consistent_high


@dataclass(frozen=True)
class ClassCount:
    """Samples of one class, how many a method recognised, with the Wilson interval of that share.

    `error` is the expected calibration error of the class's probability over all samples, `noise_floor` the same error
    under right probabilities.
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
    """What figures and tables of one classifier show: its reliability diagram and its classes."""

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
    """Count of values in [left, right), and the counts that are usual for a right predictive."""

    left: float
    right: float
    n: int
    consistent_low: float
    consistent_high: float


@dataclass(frozen=True)
class SpreadBin:
    """Errors of one output in one bin of the predicted standard deviation.

    `predicted` is the root of the mean predicted variance, `observed` the root of the mean squared error with its
    interval; the consistent values are its quantiles under a right predictive.
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
    """What figures of one regression method show, and the form of its predictive in words."""

    coverage: tuple[CoverageLevel, ...]
    pit: tuple[HistogramBin, ...]
    spread: tuple[SpreadBin, ...]
    form: str


@dataclass(frozen=True)
class RiskPoint:
    """Mean loss of the most confident share of the samples, with its interval at this coverage alone.

    `oracle` is the risk of as many samples with the smallest losses.
    """

    coverage: float
    risk: float
    low: float | None
    high: float | None
    oracle: float


@dataclass(frozen=True)
class MethodResult:
    """Metrics and curves of one method.

    Attributes:
        description: how the method came about, where the report itself made it.
        selection: risk against coverage; empty for a scaled regression.
        score_sums: score to its sums over interleaved batches of the test set, "samples" to their sizes: by these a
            report of the same test set can be compared in pairs.
    """

    metrics: Mapping[str, Estimate]
    curves: ClassificationCurves | RegressionCurves
    description: str = ""
    selection: tuple[RiskPoint, ...] = ()
    score_sums: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoreBin:
    """Samples of the test set and of a set out of distribution with a score in [left, right), the last bin closed."""

    left: float
    right: float
    n_in_distribution: int
    n_out_of_distribution: int


@dataclass(frozen=True)
class Detection:
    """How one score of one method tells a set from the test set: `auroc`, `aupr`, `fpr95`, and the score's histogram.

    Out of distribution is the positive class; the methods of a set share the histogram's edges.
    """

    method: str
    score: str
    metrics: Mapping[str, Estimate]
    histogram: tuple[ScoreBin, ...]


@dataclass(frozen=True)
class DetectionComparison:
    """A method's AUROC minus the baseline's on the same samples; higher is better.

    Attributes:
        adjusted_p_value: Holm's adjustment over all such comparisons of the report.
        baseline_score: the baseline's score: the same one, or entropy where the baseline does not have it.
        below_chance: whether the method's AUROC is below 0.5, so that "better" still means worse than chance.
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


@dataclass(frozen=True)
class OutOfDistributionSet:
    """One set out of distribution against the test set: its size, every method and score, paired differences."""

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
    """How the scaled baseline came about.

    Attributes:
        method: name of its row.
        quantity: "temperature" divides logits, "factor" multiplies standard deviations; above 1 the baseline was
            over-confident.
        value: fitted on all samples of the fit.
        per_fold: what each fold was scaled with, fitted on the others; empty where validation data were given.
        n_fit: samples of the fit.
        n_at_bound: how many fits ended at a bound instead of an optimum.
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
        """The row's name inside a sentence, without a comma."""
        return f"{'temperature' if self.quantity == 'temperature' else 'variance'}-scaled {self.baseline}"

    @property
    def description(self) -> str:
        """In a few words, for the head of its column."""
        symbol = "T" if self.quantity == "temperature" else "factor"
        if not self.per_fold:
            return f"{symbol} = {self.value:.3g}, fitted on {self.n_fit} validation samples"
        low, high = f"{min(self.per_fold):.3g}", f"{max(self.per_fold):.3g}"
        shown = low if low == high else f"{low} to {high}"
        return f"{symbol} = {shown}, cross-fitted over {len(self.per_fold)} folds of the test set"


@dataclass(frozen=True)
class PredictionRecord:
    """How one method predicted the test set.

    Attributes:
        kind: "network", "Laplace posterior" or "callable".
        pred_type: "glm" or "nn", and `link`: None where the method is no Laplace posterior or has none.
        n_samples: Monte-Carlo samples behind every prediction; None where nothing is drawn.
        seconds: wall time of all its predictions of the test set.
        peak_bytes: most GPU memory that was in use at once while it predicted; None without a GPU.
    """

    kind: str
    pred_type: str | None
    link: str | None
    n_samples: int | None
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class DirectionSummary:
    """Curvature along one direction; all curvatures are means per sample.

    Attributes:
        place: 1 for the direction that its own samples find the most curved.
        in_sample: a single batch's own, biased value.
        curvature: the estimate of the full batch's, from other samples, with its interval.
    """

    place: int
    in_sample: float
    curvature: float
    low: float | None
    high: float | None

    @property
    def inflation(self) -> float | None:
        """How many times too large the single batch's value is; None where the curvature is zero."""
        return self.in_sample / self.curvature if self.curvature > 0 else None

    @property
    def inflation_low(self) -> float | None:
        """Lower end of the inflation's interval, from the upper end of the curvature's."""
        return self.in_sample / self.high if self.high else None

    @property
    def inflation_high(self) -> float | None:
        """Upper end; None where the curvature may be zero."""
        return self.in_sample / self.low if self.low else None


@dataclass(frozen=True)
class SpectrumPoint:
    """The data's part of the posterior precision at one place of its spectrum, in the unit of the prior precision."""

    place: int
    precision: float


@dataclass(frozen=True)
class HeldOutDifference:
    """How much further from the full-batch posterior than `reference`, by n held-out samples, in nats.

    The standard error is paired, the interval normal, the p-value adjusted over the posteriors of the report (Holm).
    """

    reference: str
    difference: float
    standard_error: float
    low: float
    high: float
    p_value: float
    verdict: KLVerdict
    n: int


@dataclass(frozen=True)
class PosteriorSummary:
    """What was fitted, as a report shows it.

    Attributes:
        facts: property to value, in the order in which they are shown ("structure", "prior precision", ...).
        prior_precision: smallest and largest.
        directions: a selection; empty where curvatures come from the directions' own samples.
        spectrum: a selection of the data's precisions, decreasing.
        held_out: how close it is to the full batch, against the first posterior.
        notes: why something is missing.
    """

    facts: Mapping[str, Scalar]
    prior_precision: tuple[float, float]
    directions: tuple[DirectionSummary, ...] = ()
    spectrum: tuple[SpectrumPoint, ...] = ()
    held_out: HeldOutDifference | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ThresholdOutcome:
    """One threshold on one quantity of one method, with the limits that the bounds or the estimate had to keep.

    Attributes:
        relative_to: the method that a change is against; None for the metric itself.
        value: the estimate of the quantity with its interval; None where there is none.
        n: test samples behind the estimate, of which `min_samples` were asked for.
        message: the same in a sentence.
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
        """What was judged, in a few words."""
        against = f" against {self.relative_to}" if self.relative_to is not None else ""
        kind = "" if self.quantity == "value" else f", {self.quantity}"
        return f"{self.method}{against}: {self.metric}{kind}"


@dataclass(frozen=True)
class DataSummary:
    """The test set; `targets_sha256`, of little-endian int64 or float64 in C order, tells two test sets apart.

    Classes belong to classification; outputs and unit of the targets to regression.
    """

    n: int
    n_classes: int | None
    n_outputs: int | None
    targets_sha256: str
    class_names: tuple[str, ...] | None = None
    target_unit: str | None = None

    def name_class(self, label: int) -> str:
        """The class's name, or its number."""
        return self.class_names[label] if self.class_names else str(label)


@dataclass(frozen=True)
class ReportContents:
    """A finished report.

    Attributes:
        summary: the findings in sentences, one for each of `judged`.
        settings: options of the report as used.
        metadata: the caller's own notes.
        baseline: name of the method that the others are compared with.
        methods: name to result, in the caller's order.
        definitions: what each metric of the report means, in the order in which they are shown.
        warnings: what a reader must know before trusting the numbers.
        posteriors: name to what was fitted.
        predicted: method to how it predicted, where `evaluate` did.
        scaling: how the scaled baseline came about; None where the report has no such row.
        ood: name of a set out of distribution to how well it is told from the test set.
        checks: outcomes of the thresholds that the report was made with.
        schema_version: the second number grows with new fields, the first with other changes.
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
        """The baseline, and the baseline after scaling where the report has that row."""
        return [self.baseline, *([] if self.scaling is None else [self.scaling.method])]

    @property
    def judged(self) -> list[str]:
        """The methods that `summary` speaks of: all but the references, or the baseline if it is alone."""
        return [m for m in self.methods if m not in self.references] or [self.baseline]


def read_scalar(value: Any, where: str) -> Scalar:
    """Return text or a finite number as Python's own type, also from numpy and torch scalars.

    Raises:
        ValueError: for anything else, naming `where` it stands.
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
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"Expected a finite number in {where}; got {value}.")
    return check_text(value, where) if isinstance(value, str) else value


def check_text(text: Any, where: str) -> str:
    """Refuse what is no text, and surrogates, which no file can hold."""
    if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
        got = "a surrogate in it" if isinstance(text, str) else type(text).__name__
        raise ValueError(f"Expected text in {where}; got {got}.")
    return text
