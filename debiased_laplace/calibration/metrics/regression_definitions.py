"""What each regression metric means."""

from debiased_laplace.calibration.metrics.metric_definition import MetricDefinition

GNEITING = "Gneiting and Raftery (2007), doi:10.1198/016214506000001437"
LEVI = "Levi, Gispan, Giladi and Fetaya (2022), doi:10.3390/s22155540"
CONSISTENCY = "Bröcker and Smith (2007), doi:10.1175/WAF993.1"
KUEPPERS = "Küppers, Schneider and Haselhoff (2022), arXiv:2207.01242"
WHOLE_LEVELS = range(1, 100)  # percent


def name_level(metric: str, level: float) -> str:
    """Key of `picp` or `mpiw` at a level: the bare name at 90 %, `picp_50` at 50 %."""
    percent = round(100 * level)
    return metric if percent == 90 else f"{metric}_{percent}"


def _define_coverage(percent: int) -> MetricDefinition:
    return MetricDefinition(
        f"Coverage of {percent} % intervals",
        "level",
        f"Share of targets inside the central {percent} % interval of the predictive.",
        section="headline" if percent == 90 else "detail",
    )


def _define_width(percent: int) -> MetricDefinition:
    return MetricDefinition(
        f"Width of {percent} % intervals",
        "none",
        "Mean width of these intervals. Narrow is good only where the coverage is right.",
        section="headline" if percent == 90 else "detail",
        unit="target",
    )


_HEADLINE = {
    "nll": MetricDefinition(
        "Negative log-likelihood",
        "lower",
        "Mean of minus the logarithm of the predictive density at the target, in nats per output. It is that of all "
        "outputs together where the predictive says how they depend on each other (a covariance, or samples of the "
        "function). It depends on the unit of the targets, differences do not. Bare samples have no density; theirs is "
        "the Gaussian's with their mean and standard deviation.",
        GNEITING,
    ),
    "crps": MetricDefinition(
        "CRPS",
        "lower",
        "Continuous ranked probability score: mean distance between target and predictive, less half the mean distance "
        "of two draws from the predictive. A proper score that grows only linearly with an error.",
        GNEITING,
        unit="target",
    ),
    "rmse": MetricDefinition("Root mean squared error", "lower", "Error of the predicted mean.", unit="target"),
    "z_scale": MetricDefinition(
        "Scale of the errors",
        "one",
        "Root mean square of the errors in units of the predicted standard deviation. Above 1 "
        "the method is over-confident, below 1 under-confident; standard deviations multiplied "
        "by it would be right on average.",
    ),
    "picp": _define_coverage(90),
    "mpiw": _define_width(90),
    "sharpness": MetricDefinition(
        "Mean standard deviation",
        "none",
        "Mean predicted standard deviation, observation noise included.",
        unit="target",
    ),
}

_DETAIL = {
    "std_epistemic": MetricDefinition(
        "Standard deviation of the function",
        "none",
        "Mean standard deviation of the function over the posterior, without observation noise. Its square and that of "
        "the noise add up to the predicted variance.",
        section="detail",
        unit="target",
    ),
    "std_noise": MetricDefinition(
        "Standard deviation of the noise",
        "none",
        "Mean standard deviation of the observation noise that was stated for the predictions.",
        section="detail",
        unit="target",
    ),
    "mae": MetricDefinition(
        "Mean absolute error", "lower", "Error of the predicted mean.", section="detail", unit="target"
    ),
    "interval_score": MetricDefinition(
        "Interval score at 90 %",
        "lower",
        "Width of the central 90 % interval plus twenty times the distance of a target outside of it, on average. A "
        "proper score of the two quantiles.",
        GNEITING,
        section="detail",
        unit="target",
    ),
    "pit_ks_p_value": MetricDefinition(
        "p-value of the probability transform",
        "none",
        "Kolmogorov and Smirnov's test that the predicted probability of a smaller target is uniform. A small value "
        "speaks against the predictive; on large test sets any method gets one.",
        "Massey (1951), doi:10.1080/01621459.1951.10500769",
        section="detail",
    ),
    "m_qce": MetricDefinition(
        "Quantile calibration error",
        "lower",
        "Mean absolute distance between the coverage of central intervals and their level, over levels from 5 % to "
        "95 %. Computed by netcal.",
        KUEPPERS,
        section="detail",
    ),
    "c_qce": MetricDefinition(
        "Quantile calibration error by spread",
        "lower",
        "The same within bins of the predicted standard deviation, weighted by their samples. Computed by netcal.",
        KUEPPERS,
        section="detail",
    ),
    "ence": MetricDefinition(
        "Normalised calibration error",
        "lower",
        "Mean over ten bins of the standard deviation, of equal width, of the distance between the root mean squared "
        "error and the root mean variance, in units of the latter. Computed by netcal. A bin with a single sample "
        "counts as much as any, so it is far above zero even for a perfect predictive: read it beside its noise floor "
        "and p-value.",
        LEVI,
        section="detail",
    ),
    "ence_noise_floor": MetricDefinition(
        "Noise floor of that error",
        "none",
        "Its mean over test sets of this size whose targets are drawn from the method's own predictive.",
        CONSISTENCY,
        section="detail",
    ),
    "ence_p_value": MetricDefinition(
        "p-value of the spread",
        "none",
        "Share of these test sets whose error is at least as large as the observed one. A small value speaks against "
        "the predicted standard deviations.",
        CONSISTENCY,
        section="detail",
    ),
    "ence_equal_mass": MetricDefinition(
        "Normalised calibration error, equal mass",
        "lower",
        "The same over bins with equally many samples, which every bin needs for its error to mean something.",
        LEVI,
        section="detail",
    ),
    "ence_equal_mass_noise_floor": MetricDefinition(
        "Noise floor of that error, equal mass",
        "none",
        "Its mean over test sets whose targets are drawn from the method's own predictive.",
        CONSISTENCY,
        section="detail",
    ),
    "ence_equal_mass_p_value": MetricDefinition(
        "p-value of the spread, equal mass",
        "none",
        "Share of these test sets whose error is at least as large as the observed one.",
        CONSISTENCY,
        section="detail",
    ),
    "uce": MetricDefinition(
        "Uncertainty calibration error",
        "lower",
        "Mean absolute distance between mean squared error and mean variance over ten bins of the variance, of equal "
        "width, weighted by the samples in each. Computed by netcal.",
        "Laves, Ihler, Fast, Kahrs and Ortmaier (2021), arXiv:2104.12376",
        section="detail",
        unit="squared",
    ),
    "error_spread_correlation": MetricDefinition(
        "Correlation of error and spread",
        "none",
        "Spearman's rank correlation of the absolute error with the predicted standard deviation. It is 0 where the "
        "predicted spread does not tell large errors from small ones; even a perfect predictive stays far below 1, "
        "since an error is only one draw.",
        "Spearman (1904), doi:10.2307/1412159",
        section="detail",
    ),
}

REGRESSION: dict[str, MetricDefinition] = (
    _HEADLINE
    | _DETAIL
    | {
        f"{name}_{percent}": define(percent)
        for percent in WHOLE_LEVELS
        if percent != 90
        for name, define in (("picp", _define_coverage), ("mpiw", _define_width))
    }
)
