"""Findings of a report in sentences, those of harm first."""

from collections.abc import Mapping

from debiased_laplace.calibration.contents import SCORES, Comparison, Estimate, ReportContents
from debiased_laplace.calibration.formatting import (
    choose_common_decimals,
    choose_decimals,
    format_interval,
    format_level,
    format_number,
    format_with_interval,
)
from debiased_laplace.calibration.metrics.detection import CHANCE, is_below_chance
from debiased_laplace.calibration.ties import THRESHOLD

SHORT_NAMES = {
    "nll": "NLL",
    "brier": "Brier score",
    "error": "error rate",
    "rmsce2_debiased": "squared calibration error",
    "crps": "CRPS",
    "rmse": "RMSE",
    "deviance": "deviance",
}
CONFIDENCE_TARGETS = {"confidence_gap": 0.0, "z_scale": 1.0}  # above them a method is over-confident
PROPER = ("nll", "brier", "crps")
ALSO_TOLD = ("brier", "crps", "error")  # where the NLL is not worse, but these are
CAUTION = "CAUTION, worse than "


def summarize(contents: ReportContents) -> tuple[str, ...]:
    """Return one sentence for each of `contents.judged`, those of harm first."""
    sentences = [_summarize_method(contents, method) for method in contents.judged]
    return tuple(sorted(sentences, key=lambda sentence: not sentence.startswith(CAUTION)))


def describe_brackets(contents: ReportContents) -> str:
    """Return what the intervals of paired differences are, beside which verdicts stand."""
    level, n = format_level(contents.confidence_level), len(contents.comparisons)
    if n == 1:
        return f"Brackets beside a difference are its {level} interval: they exclude 0 exactly where it is detected."
    return (
        f"Brackets beside a difference allow for all {n} comparisons, as the verdict does (Holm's adjustment): their "
        f"level is {level} or higher, and they exclude 0 exactly where the difference is detected."
    )


def name_reference(contents: ReportContents, reference: str) -> str:
    """Return the name of a reference inside a sentence."""
    scaling = contents.scaling
    return reference if scaling is None or reference != scaling.method else scaling.short_name


def is_worse_than_constant(contents: ReportContents, method: str, metric: str) -> bool:
    """Return whether a method has a worse value of a metric than a constant prediction, which uses no inputs."""
    estimate, constant = contents.methods[method].metrics.get(metric), contents.constant.get(metric)
    if estimate is None or estimate.value is None or constant is None:
        return False
    harm = constant - estimate.value if metric == "accuracy" else estimate.value - constant
    return harm > THRESHOLD * abs(constant)


def describe_worse_than_constant(contents: ReportContents, method: str) -> str:
    """Return the metrics of a method that are worse than those of a constant prediction; empty where none is."""
    told = []
    for metric, constant in contents.constant.items():
        if is_worse_than_constant(contents, method, metric):
            estimate = contents.methods[method].metrics[metric]
            decimals, name = choose_common_decimals([estimate]), SHORT_NAMES.get(metric, metric)
            told.append(f"{name} {format_number(estimate.value, decimals)} against {format_number(constant, decimals)}")
    return ", ".join(told)


def warn_of_useless(contents: ReportContents) -> tuple[str, ...]:
    """Return warnings of methods that are worse than a constant prediction, or order samples worse than chance."""
    warnings, decimals = [], 3
    told = {m: words for m in contents.methods if (words := describe_worse_than_constant(contents, m))}
    if told:
        methods = "; ".join(f"{method} ({words})" for method, words in told.items())
        warnings.append(
            f"Worse than {_name_constant(contents)} for every sample, which use no inputs: {methods}. A verdict "
            "between such methods does not make one of them useful."
        )
    for method, result in contents.methods.items():
        area, risk = result.metrics.get("aurc"), result.selection[-1].risk if result.selection else None
        if risk and area is not None and area.value is not None and area.value > (1 + THRESHOLD) * risk:
            found, chance = format_number(area.value, decimals), format_number(risk, decimals)
            warnings.append(
                f"{method}: its confidence orders its errors worse than chance (area under the risk-coverage curve "
                f"{found}, in random order {chance})."
            )
    for name, one in contents.ood.items():
        areas = {(d.method, d.score): d.metrics["auroc"].value for d in one.detections}
        below = [f"{m}, {SCORES.get(s, s)} ({x:.3f})" for (m, s), x in areas.items() if is_below_chance(x)]
        if below:
            warnings.append(
                f"{name}: AUROC below {CHANCE}, worse than chance, of {'; '.join(below)}. Such a score is larger on "
                "the test set than out of distribution."
            )
    return tuple(warnings)


def _name_constant(contents: ReportContents) -> str:
    if contents.task == "regression":
        moments = "mean" if "deviance" in contents.constant else "mean and standard deviation"
        return f"the {moments} of the targets"
    return "the class frequencies of the test set"


def _caution(contents: ReportContents, method: str) -> list[str]:
    """Return "a constant prediction" where a proper score of a method is worse than that of one."""
    is_worse = any(is_worse_than_constant(contents, method, metric) for metric in PROPER)
    return ["a constant prediction"] if is_worse else []


def name_confidence(metric: str, estimate: Estimate) -> str:
    """Return "over-confident" or "under-confident" where one was detected by this metric, else an empty text."""
    target = CONFIDENCE_TARGETS[metric]
    if estimate.low is not None and estimate.low > target:
        return "over-confident"
    if estimate.high is not None and estimate.high < target:
        return "under-confident"
    return ""


def _describe_confidence(metrics: Mapping[str, Estimate]) -> str:
    """Return whether a method is detectably over-confident or under-confident, and by how much."""
    metric = next(name for name in CONFIDENCE_TARGETS if name in metrics)
    estimate = metrics[metric]
    words, decimals = name_confidence(metric, estimate), choose_common_decimals([estimate])
    if not words:
        return "neither over- nor under-confident detectably"
    if metric == "confidence_gap":
        return f"{words} by {format_number(abs(estimate.known), decimals)}"
    return f"{words} (errors are {format_number(estimate.known, decimals)} predicted standard deviations)"


def _compare(contents: ReportContents, method: str, metric: str) -> dict[str, Comparison]:
    """Return reference to comparison of one metric."""
    return {c.baseline: c for c in contents.comparisons if (c.method, c.metric) == (method, metric)}


def _summarize_method(contents: ReportContents, method: str) -> str:
    confidence = _describe_confidence(contents.methods[method].metrics)
    if method == contents.baseline:
        return _summarize_baseline(contents, confidence)
    relations = _compare(contents, method, "nll")
    sentence, previous = f"{method} is ", ""
    for reference, c in relations.items():
        if previous:
            sentence += " and " if c.verdict == previous else ", but "
        words = {"better": "better than", "worse": "worse than"}.get(c.verdict, "not detectably different from")
        sentence += f"{words} {name_reference(contents, reference)} ({'' if previous else 'NLL '}{_describe_size(c)})"
        previous = c.verdict
    for metric in ALSO_TOLD:
        other = _compare(contents, method, metric).get(contents.baseline)
        if other is not None and other.verdict == "worse" and relations[contents.baseline].verdict != "worse":
            size = _describe_size(other)
            sentence += f", though its {SHORT_NAMES[metric]} is worse than that of {contents.baseline} ({size})"
    if useless := describe_worse_than_constant(contents, method):
        sentence += (
            f", {'and' if previous == 'worse' else 'but'} worse than {_name_constant(contents)} alone ({useless})"
        )
    harm = [name_reference(contents, reference) for reference, c in relations.items() if c.verdict == "worse"]
    harm = [*_caution(contents, method), *harm]
    worse_than = " and ".join(filter(None, (", ".join(harm[:-1]), *harm[-1:])))
    return f"{CAUTION + worse_than + ': ' if harm else ''}{sentence}; it is {confidence}."


def _summarize_baseline(contents: ReportContents, confidence: str) -> str:
    """Return the loss of the baseline, and how scaling changes it."""
    nll = contents.methods[contents.baseline].metrics["nll"]
    loss = format_with_interval(nll.value, nll.low, nll.high, choose_decimals([nll.standard_error]))
    sentence = f"{contents.baseline}: NLL {loss}; {confidence}"
    if contents.scaling is not None:
        c = _compare(contents, contents.scaling.method, "nll")[contents.baseline]
        changes = {"better": "lowers", "worse": "raises", "no detectable difference": "does not change detectably"}
        kind = "temperature" if contents.scaling.quantity == "temperature" else "variance"
        sentence += f"; {kind} scaling {changes[c.verdict]} the NLL ({_describe_size(c)})"
    if useless := describe_worse_than_constant(contents, contents.baseline):
        sentence += f"; worse than {_name_constant(contents)} alone ({useless})"
    harm = _caution(contents, contents.baseline)
    return f"{CAUTION + harm[0] + ': ' if harm else ''}{sentence}."


def _describe_size(comparison: Comparison) -> str:
    """Return the difference with its interval, unsigned where its direction is known."""
    decimals = choose_decimals([comparison.standard_error])
    low, high = comparison.adjusted_low, comparison.adjusted_high
    if comparison.verdict == "no detectable difference":
        return format_with_interval(comparison.difference, low, high, decimals, signed=True)
    direction = "higher"
    if comparison.verdict == "better":
        direction = "lower"
        low, high = (None, None) if low is None or high is None else (-high, -low)
    size = format_number(abs(comparison.difference), decimals)
    return f"{size} {direction} {format_interval(low, high, decimals)}".rstrip()
