"""What the metrics of temperature and of scaled standard deviations mean."""

from debiased_laplace.calibration.metrics.metric_definition import MetricDefinition

BERTA = "Berta, Holzmüller, Jordan and Bach (2025), arXiv:2501.19195"

TEMPERATURE: dict[str, MetricDefinition] = {
    "temperature_optimal": MetricDefinition(
        "Optimal temperature",
        "one",
        "The number that the logits would have to be divided by. Above 1 the method is over-confident, below 1 "
        "under-confident.",
        "Guo, Pleiss, Sun and Weinberger (2017), arXiv:1706.04599",
        section="detail",
    ),
    "nll_calibration_loss": MetricDefinition(
        "Loss that one temperature repairs",
        "zero",
        "Negative log-likelihood minus that after temperature scaling, each fifth of the test set scaled with the "
        "temperature of the other four. It may fall slightly below zero, since the temperature of the others is not "
        "exactly the best. For a slight over-confidence its 95 % intervals contain the truth in about 90 % of cases.",
        BERTA,
        section="detail",
    ),
    "nll_refinement_loss": MetricDefinition(
        "Loss that remains",
        "lower",
        "Negative log-likelihood after that scaling: what the method does not know, or knows in the wrong places.",
        BERTA,
        section="detail",
    ),
}

FACTOR: dict[str, MetricDefinition] = {
    "nll_calibration_loss": MetricDefinition(
        "Loss that one factor repairs",
        "zero",
        "Negative log-likelihood minus that after multiplying all standard deviations by the scale of the errors, each "
        "fifth of the test set by that of the other four. It may fall slightly below zero, since the scale of the "
        "others is not exactly the best. For a slight over-confidence its 95 % intervals are somewhat too short.",
        BERTA,
        section="detail",
    ),
    "nll_refinement_loss": MetricDefinition(
        "Loss that remains",
        "lower",
        "Negative log-likelihood after that scaling: errors of the mean, and spread in the wrong places.",
        BERTA,
        section="detail",
    ),
}
