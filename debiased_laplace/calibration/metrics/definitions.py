"""What each metric means, which way is better, and where it comes from: shown in every report."""

from debiased_laplace.calibration.metrics.metric_definition import DIRECTIONS, MetricDefinition
from debiased_laplace.calibration.metrics.regression_definitions import REGRESSION
from debiased_laplace.calibration.metrics.scaling_definitions import FACTOR, TEMPERATURE
from debiased_laplace.calibration.metrics.selection_definitions import DETECTION, SELECTIVE, SELECTIVE_REGRESSION

__all__ = ["CLASSIFICATION", "DIRECTIONS", "REGRESSION", "MetricDefinition", "define_metrics"]

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
    "ece_equal_mass": MetricDefinition(
        "Calibration error, equal mass",
        "lower",
        "The expected calibration error over bins that hold nearly equal numbers of samples; samples of equal "
        "confidence share a bin, so there may be fewer bins than asked for.",
        "Nguyen and O'Connor (2015), arXiv:1508.05154",
        section="detail",
    ),
    "ece_sweep": MetricDefinition(
        "Calibration error, monotone sweep",
        "lower",
        "The same over as many bins of equal mass as leave the accuracy rising with the confidence: less biased than a "
        "fixed number of bins, and still biased upwards.",
        "Roelofs et al. (2022), arXiv:2012.08668",
        section="detail",
    ),
    "classwise_ece": MetricDefinition(
        "Classwise calibration error",
        "lower",
        "Expected calibration error of the probability of one class against the share of that class, averaged over "
        "all classes with equal weight. With many classes most probabilities are near zero and so is this number: "
        "read it beside its noise floor.",
        "Kull et al. (2019), arXiv:1910.12656",
        section="detail",
    ),
    "classwise_ece_noise_floor": MetricDefinition(
        "Noise floor of that error",
        "none",
        "The classwise calibration error that right probabilities would show on a test set of this size.",
        "Bröcker and Smith (2007), doi:10.1175/WAF993.1",
        section="detail",
    ),
    "classwise_rmsce2_debiased": MetricDefinition(
        "Classwise squared error, debiased",
        "lower",
        "Mean over classes of the squared distance between the probability of a class and its share, with the part "
        "that sampling noise adds taken off. Right on average, so it may fall below zero.",
        "Kumar, Liang and Ma (2019), arXiv:1909.10155",
        section="detail",
    ),
    "skce": MetricDefinition(
        "Squared kernel calibration error",
        "lower",
        "Calibration of all probabilities together, without bins: whether the errors of two samples with similar "
        "probabilities point the same way, averaged over pairs. Zero for right probabilities; the estimate is right on "
        "average, so it may fall below zero. Its scale has no meaning beyond comparisons.",
        "Widmann, Lindsten and Zachariah (2019), arXiv:1910.11385",
        section="detail",
    ),
    "ece_positive": MetricDefinition(
        "Calibration error of P(class 1)",
        "lower",
        "Expected calibration error of the probability of class 1 against the share of class 1, "
        "which is what netcal reports when it is given binary probabilities. The other calibration error is that of "
        "the predicted class, so the two differ.",
        "Küppers et al. (2020), netcal",
        section="detail",
    ),
}


def define_metrics(task: str) -> dict[str, MetricDefinition]:
    """The definitions of a task's metrics, in the order in which reports show them."""
    if task == "regression":
        return REGRESSION | FACTOR | SELECTIVE_REGRESSION | DETECTION
    return CLASSIFICATION | TEMPERATURE | SELECTIVE | DETECTION
