"""The findings of a report in sentences: the first thing a reader sees, harm before everything else."""

from collections.abc import Mapping

from debiased_laplace.calibration.comparisons import Comparison
from debiased_laplace.calibration.contents import ReportContents
from debiased_laplace.calibration.estimates import Estimate
from debiased_laplace.calibration.rendering.formatting import (
    choose_common_decimals,
    choose_decimals,
    format_interval,
    format_number,
    format_with_interval,
)

SHORT_NAMES = {
    "nll": "NLL",
    "brier": "Brier score",
    "error": "error rate",
    "rmsce2_debiased": "squared calibration error",
    "crps": "CRPS",
}
CONFIDENCE_TARGETS = {"confidence_gap": 0.0, "z_scale": 1.0}  # above them a method is over-confident
ALSO_TOLD = ("brier", "crps", "error")  # where the NLL is not worse, but these are


def summarize(contents: ReportContents) -> list[str]:
    """One sentence for every method that the baseline did not bring along, or for the baseline if it is alone."""
    return [_summarize_method(contents, method) for method in judged_methods(contents)]


def judged_methods(contents: ReportContents) -> list[str]:
    """The methods that `summarize` speaks of, in its order."""
    references = _references(contents)
    return [m for m in contents.methods if m not in references] or [contents.baseline]


def find_harm(contents: ReportContents, method: str) -> list[str]:
    """References that the method's NLL is detectably worse than, in words."""
    return [
        name_reference(contents, reference)
        for reference, c in _against(contents, method, "nll").items()
        if c.verdict == "worse"
    ]


def name_reference(contents: ReportContents, reference: str) -> str:
    """A reference inside a sentence: the name of the scaled row has a comma, which a sentence should not."""
    if contents.scaling is None or reference != contents.scaling.method:
        return reference
    kind = "temperature" if contents.scaling.quantity == "temperature" else "variance"
    return f"{kind}-scaled {contents.scaling.baseline}"


def describe_confidence(metrics: Mapping[str, Estimate]) -> str:
    """Over-confident, under-confident or neither detectably, with its size."""
    if "confidence_gap" in metrics:
        gap = metrics["confidence_gap"]
        return _describe_sign(
            gap, target=CONFIDENCE_TARGETS["confidence_gap"], amount=f" by {_show(abs(gap.known), gap)}"
        )
    scale = metrics["z_scale"]
    return _describe_sign(
        scale,
        target=CONFIDENCE_TARGETS["z_scale"],
        amount=f" (errors are {_show(scale.known, scale)} predicted standard deviations)",
    )


def name_confidence(estimate: Estimate, *, target: float) -> str:
    """Over-confident above the target, under-confident below it; empty where neither was detected."""
    if estimate.low is not None and estimate.low > target:
        return "over-confident"
    if estimate.high is not None and estimate.high < target:
        return "under-confident"
    return ""


def _references(contents: ReportContents) -> list[str]:
    return [contents.baseline, *([] if contents.scaling is None else [contents.scaling.method])]


def _against(contents: ReportContents, method: str, metric: str) -> dict[str, Comparison]:
    """Reference to comparison of one metric."""
    return {c.baseline: c for c in contents.comparisons if (c.method, c.metric) == (method, metric)}


def _summarize_method(contents: ReportContents, method: str) -> str:
    confidence = describe_confidence(contents.metrics[method])
    if method == contents.baseline:
        return _summarize_baseline(contents, confidence)
    relations = _against(contents, method, "nll")
    sentence = f"{method} is "
    previous = None
    for reference, c in relations.items():
        if previous is not None:
            sentence += " and " if c.verdict == previous else ", but "
        sentence += _describe_relation(c, name_reference(contents, reference), named=previous is None)
        previous = c.verdict
    sentence += "".join(
        f", though its {SHORT_NAMES[metric]} is worse than that of {contents.baseline} ({_describe_size(c)})"
        for metric in ALSO_TOLD
        for reference, c in _against(contents, method, metric).items()
        if reference == contents.baseline and c.verdict == "worse" and relations[reference].verdict != "worse"
    )
    harm = find_harm(contents, method)
    warning = f"CAUTION, worse than {' and '.join(harm)}: " if harm else ""
    return f"{warning}{sentence}; it is {confidence}."


def _summarize_baseline(contents: ReportContents, confidence: str) -> str:
    """The baseline alone: its own loss, and what one number would repair."""
    nll = contents.metrics[contents.baseline]["nll"]
    decimals = choose_decimals([nll.standard_error])
    loss = format_with_interval(nll.value, nll.low, nll.high, decimals)
    sentence = f"{contents.baseline}: NLL {loss}; {confidence}"
    if contents.scaling is not None:
        c = _against(contents, contents.scaling.method, "nll")[contents.baseline]
        changes = {"better": "lowers", "worse": "raises", "no detectable difference": "does not change detectably"}
        what = "temperature" if contents.scaling.quantity == "temperature" else "variance"
        sentence += f"; {what} scaling {changes[c.verdict]} the NLL ({_describe_size(c)})"
    return f"{sentence}."


def _describe_relation(comparison: Comparison, reference: str, *, named: bool) -> str:
    words = {
        "better": "better than",
        "worse": "worse than",
        "no detectable difference": "not detectably different from",
    }
    name = f"{SHORT_NAMES[comparison.metric]} " if named else ""
    return f"{words[comparison.verdict]} {reference} ({name}{_describe_size(comparison)})"


def _describe_size(comparison: Comparison) -> str:
    """The difference with its interval: unsigned where its direction is known."""
    decimals = choose_decimals([comparison.standard_error])
    low, high = comparison.low, comparison.high
    if comparison.verdict == "no detectable difference":
        return format_with_interval(comparison.difference, low, high, decimals, signed=True)
    direction = "higher"
    if comparison.verdict == "better":
        direction = "lower"
        low, high = (None, None) if low is None or high is None else (-high, -low)
    size = format_number(abs(comparison.difference), decimals)
    return f"{size} {direction} {format_interval(low, high, decimals)}".rstrip()


def _describe_sign(estimate: Estimate, *, target: float, amount: str) -> str:
    named = name_confidence(estimate, target=target)
    return f"{named}{amount}" if named else "neither over- nor under-confident detectably"


def _show(value: float, estimate: Estimate) -> str:
    return format_number(value, choose_common_decimals([estimate]))
