"""Selective prediction and out-of-distribution detection in words."""

from debiased_laplace.calibration.metrics.metric_definition import MetricDefinition

GEIFMAN = "Geifman and El-Yaniv (2017), arXiv:1705.08500"
EXCESS = "Geifman, Uziel and El-Yaniv (2019), arXiv:1805.08206"

SELECTIVE: dict[str, MetricDefinition] = {
    "aurc": MetricDefinition(
        "Area under the risk-coverage curve",
        "lower",
        "Mean, over all numbers of kept samples, of the share of errors among them, the most confident being kept "
        "first. Samples of equal confidence are kept in random order, in expectation. It falls with fewer errors and "
        "with a better order of them.",
        EXCESS,
        section="selective",
    ),
    "e_aurc": MetricDefinition(
        "Its excess over the oracle",
        "lower",
        "The same area less that of an oracle which keeps all correct predictions before any wrong one: what the order "
        "of the confidences costs, whatever the accuracy.",
        EXCESS,
        section="selective",
    ),
    "augrc": MetricDefinition(
        "Area under the generalized risk",
        "lower",
        "Mean, over coverages, of the share of all samples that are kept and wrong: the average risk of an undetected "
        "failure. With the accuracy a, and the AUROC of confidence for telling right from wrong, it equals "
        "(1 \u2212 AUROC) a (1 \u2212 a) + (1 \u2212 a)\u00b2 / 2.",
        "Traub et al. (2024), arXiv:2407.01032",
        section="selective",
    ),
    "coverage_at_5_risk": MetricDefinition(
        "Coverage at 5 % risk",
        "higher",
        "The largest share of samples, the most confident ones, of which at most 5 % are wrong; 0 if there is none.",
        GEIFMAN,
        section="selective",
    ),
    "risk_at_80_coverage": MetricDefinition(
        "Risk at 80 % coverage",
        "lower",
        "Share of errors among the 80 % most confident samples.",
        GEIFMAN,
        section="selective",
    ),
}

SELECTIVE_REGRESSION: dict[str, MetricDefinition] = {
    "aurc": MetricDefinition(
        "Area under the risk-coverage curve",
        "lower",
        "Mean, over all numbers of kept samples, of the mean squared error among them, the smallest predicted standard "
        "deviations being kept first; several outputs are ordered one by one and averaged.",
        EXCESS,
        section="selective",
        unit="squared",
    ),
    "e_aurc": MetricDefinition(
        "Its excess over the oracle",
        "lower",
        "The same area less that of an oracle which keeps the smallest errors first. It stays far above zero even for "
        "a perfect predictive, since an error is only one draw.",
        EXCESS,
        section="selective",
        unit="squared",
    ),
}

DETECTION: dict[str, MetricDefinition] = {
    "auroc": MetricDefinition(
        "AUROC",
        "higher",
        "Chance that a sample out of distribution has a larger score than one of the test set, equal scores counting "
        "half; 0.5 is chance.",
        "DeLong, DeLong and Clarke-Pearson (1988), doi:10.2307/2531595",
        section="detection",
    ),
    "aupr": MetricDefinition(
        "AUPR",
        "higher",
        "Average precision with out of distribution as the positive class: mean, over its samples, of the share of it "
        "among all samples with at least that score. Chance is its share of the samples, so that it compares only "
        "within a set.",
        "Davis and Goadrich (2006), doi:10.1145/1143844.1143874",
        section="detection",
    ),
    "fpr95": MetricDefinition(
        "FPR95",
        "lower",
        "Share of the test set that is taken for out of distribution at the largest threshold at which at least 95 % "
        "of the samples out of distribution are recognised, a sample being taken so if its score is at least the "
        "threshold. Some papers call the test set positive instead; their number is another one.",
        "Hendrycks, Mazeika and Dietterich (2019), arXiv:1812.04606",
        section="detection",
    ),
}
