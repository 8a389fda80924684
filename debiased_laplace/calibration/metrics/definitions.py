"""What each metric means, which way is better, and where it comes from: shown in every report."""

from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher", "zero", "one", "level", "none"]


@dataclass(frozen=True)
class MetricDefinition:
    """A metric in words.

    Attributes:
        label: short name for table rows.
        better: the good direction; "zero", "one" and "level" are targets, "none" is no judgement.
        meaning: one or two sentences.
        reference: authors (year) and where to find it; empty for textbook quantities.
        section: "headline" for the table that everybody reads, "detail" for the folded one under it.
    """

    label: str
    better: Better
    meaning: str
    reference: str = ""
    section: Literal["headline", "detail"] = "headline"


DIRECTIONS: dict[Better, str] = {
    "lower": "lower is better",
    "higher": "higher is better",
    "zero": "0 is right",
    "one": "1 is right",
    "level": "the nominal level is right",
    "none": "",
}

CLASSIFICATION: dict[str, MetricDefinition] = {
    "nll": MetricDefinition(
        "Negative log-likelihood",
        "lower",
        "Mean of minus the logarithm of the probability given to the true class, in nats. A proper "
        "score: it rewards both sharp and honest probabilities.",
        "Gneiting and Raftery (2007), doi:10.1198/016214506000001437",
    ),
    "brier": MetricDefinition(
        "Brier score",
        "lower",
        "Mean squared distance between the probabilities and the one-hot truth, summed over the "
        "classes (0 to 2; twice the one-probability form for two classes). A proper score that "
        "no single sample can dominate.",
        "Brier (1950), doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2",
    ),
    "accuracy": MetricDefinition("Accuracy", "higher", "Share of samples whose most probable class is the true one."),
    "confidence_gap": MetricDefinition(
        "Confidence gap",
        "zero",
        "Mean confidence minus accuracy. Above 0 the method is over-confident, below 0 it is "
        "under-confident; unsigned errors cannot tell the two apart.",
    ),
    "ece": MetricDefinition(
        "Expected calibration error",
        "lower",
        "Mean absolute distance between accuracy and mean confidence over bins of confidence "
        "of equal width, weighted by the samples in each bin; the confidence is that of the "
        "predicted class. Computed by netcal. It is above zero even for perfect confidences, "
        "so read it beside its noise floor and p-value. It has no interval because bootstrap intervals "
        "around binned errors miss the truth for nearly calibrated methods.",
        "Naeini, Cooper and Hauskrecht (2015), doi:10.1609/aaai.v29i1.9602; Küppers et al. (2020), netcal",
    ),
    "ece_noise_floor": MetricDefinition(
        "Noise floor of that error",
        "none",
        "The expected calibration error that a perfectly calibrated method with these "
        "confidences would show on a test set of this size.",
        "Bröcker and Smith (2007), doi:10.1175/WAF993.1",
    ),
    "ece_p_value": MetricDefinition(
        "p-value of calibration",
        "none",
        "Share of simulated test sets, drawn with the method's own confidences, whose expected "
        "calibration error is at least as large. A small value speaks against calibration; on "
        "large test sets any method gets one.",
        "Vaicenavicius et al. (2019), arXiv:1902.06977",
    ),
    "rmsce2_debiased": MetricDefinition(
        "Squared calibration error, debiased",
        "lower",
        "Mean squared distance between accuracy and confidence over the same bins, with the part "
        "that sampling noise adds taken off. Right on average, so it may fall below zero.",
        "Kumar, Liang and Ma (2019), arXiv:1909.10155",
    ),
    "mce": MetricDefinition(
        "Maximum calibration error",
        "lower",
        "The largest distance between accuracy and confidence of any bin; a bin with a single sample can set it.",
        "Naeini, Cooper and Hauskrecht (2015), doi:10.1609/aaai.v29i1.9602",
        section="detail",
    ),
    "ace": MetricDefinition(
        "Average calibration error",
        "lower",
        "The same distance averaged over the bins that hold samples, each with the same weight.",
        "Neumann, Zisserman and Vedaldi (2018)",
        section="detail",
    ),
    "ece_positive": MetricDefinition(
        "Calibration error of P(class 1)",
        "lower",
        "Expected calibration error of the probability of class 1 against the share of class 1, "
        "which is what netcal reports when it is given binary probabilities.",
        "Küppers et al. (2020), netcal",
    ),
}

REGRESSION: dict[str, MetricDefinition] = {
    "nll": MetricDefinition(
        "Negative log-likelihood",
        "lower",
        "Mean of minus the logarithm of the Gaussian predictive density at the target, in nats. "
        "It depends on the unit of the targets, differences do not.",
        "Gneiting and Raftery (2007), doi:10.1198/016214506000001437",
    ),
    "crps": MetricDefinition(
        "CRPS",
        "lower",
        "Continuous ranked probability score of the Gaussian predictive, in the unit of the "
        "targets. A proper score that grows only linearly with an error.",
        "Gneiting and Raftery (2007), doi:10.1198/016214506000001437",
    ),
    "rmse": MetricDefinition("Root mean squared error", "lower", "Error of the mean, in the unit of the targets."),
    "z_scale": MetricDefinition(
        "Scale of the errors",
        "one",
        "Root mean square of the errors in units of the predicted standard deviation. Above 1 "
        "the method is over-confident, below 1 under-confident; standard deviations multiplied "
        "by it would be right on average.",
    ),
    "picp": MetricDefinition(
        "Coverage of 90 % intervals",
        "level",
        "Share of targets inside the central 90 % interval of the predictive.",
    ),
    "mpiw": MetricDefinition(
        "Width of 90 % intervals",
        "none",
        "Mean width of these intervals, in the unit of the targets. Narrow is good only where the coverage is right.",
    ),
    "sharpness": MetricDefinition(
        "Mean standard deviation",
        "none",
        "Mean predicted standard deviation, in the unit of the targets.",
    ),
}


def define_metrics(task: str) -> dict[str, MetricDefinition]:
    """The definitions of a task's metrics, in the order in which reports show them."""
    return REGRESSION if task == "regression" else CLASSIFICATION
