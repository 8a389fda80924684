"""The findings of a report in sentences, harm before everything else."""

from collections.abc import Mapping

from debiased_laplace.calibration.contents import Comparison, Estimate, ReportContents
from debiased_laplace.calibration.formatting import (
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
CAUTION = "CAUTION, worse than "


def summarize(contents: ReportContents) -> tuple[str, ...]:
    """Return one sentence for each of `contents.judged`, those that tell of harm first."""
    sentences = [_summarize_method(contents, method) for method in contents.judged]
    return tuple(sorted(sentences, key=lambda sentence: not sentence.startswith(CAUTION)))


def find_harm(contents: ReportContents, method: str) -> list[str]:
    """Return the references whose NLL is detectably better than the method's, in words."""
    return [
        name_reference(contents, reference)
        for reference, c in _compare(contents, method, "nll").items()
        if c.verdict == "worse"
    ]


def name_reference(contents: ReportContents, reference: str) -> str:
    """Return the name of a reference inside a sentence."""
    scaling = contents.scaling
    return reference if scaling is None or reference != scaling.method else scaling.short_name


def describe_confidence(metrics: Mapping[str, Estimate]) -> str:
    """Say whether a method is detectably over-confident or under-confident, and by how much."""
    if "confidence_gap" in metrics:
        gap = metrics["confidence_gap"]
        words, amount = name_confidence("confidence_gap", gap), f" by {_format_alone(abs(gap.known), gap)}"
    else:
        scale = metrics["z_scale"]
        words = name_confidence("z_scale", scale)
        amount = f" (errors are {_format_alone(scale.known, scale)} predicted standard deviations)"
    return f"{words}{amount}" if words else "neither over- nor under-confident detectably"


def name_confidence(metric: str, estimate: Estimate) -> str:
    """Return "over-confident" or "under-confident" where one was detected by this metric, else an empty text."""
    target = CONFIDENCE_TARGETS[metric]
    if estimate.low is not None and estimate.low > target:
        return "over-confident"
    if estimate.high is not None and estimate.high < target:
        return "under-confident"
    return ""


def _compare(contents: ReportContents, method: str, metric: str) -> dict[str, Comparison]:
    """Reference to comparison of one metric."""
    return {c.baseline: c for c in contents.comparisons if (c.method, c.metric) == (method, metric)}


def _summarize_method(contents: ReportContents, method: str) -> str:
    confidence = describe_confidence(contents.methods[method].metrics)
    if method == contents.baseline:
        return _summarize_baseline(contents, confidence)
    relations = _compare(contents, method, "nll")
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
        for reference, c in _compare(contents, method, metric).items()
        if reference == contents.baseline and c.verdict == "worse" and relations[reference].verdict != "worse"
    )
    harm = find_harm(contents, method)
    warning = f"{CAUTION}{' and '.join(harm)}: " if harm else ""
    return f"{warning}{sentence}; it is {confidence}."


def _summarize_baseline(contents: ReportContents, confidence: str) -> str:
    """The baseline alone: its own loss, and how scaling changes it."""
    nll = contents.methods[contents.baseline].metrics["nll"]
    loss = format_with_interval(nll.value, nll.low, nll.high, choose_decimals([nll.standard_error]))
    sentence = f"{contents.baseline}: NLL {loss}; {confidence}"
    if contents.scaling is not None:
        c = _compare(contents, contents.scaling.method, "nll")[contents.baseline]
        changes = {"better": "lowers", "worse": "raises", "no detectable difference": "does not change detectably"}
        kind = "temperature" if contents.scaling.quantity == "temperature" else "variance"
        sentence += f"; {kind} scaling {changes[c.verdict]} the NLL ({_describe_size(c)})"
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
    """The difference with its interval, unsigned where its direction is known."""
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


def _format_alone(value: float, estimate: Estimate) -> str:
    return format_number(value, choose_common_decimals([estimate]))
