"""The findings of a report in sentences: the first thing a reader sees."""

from debiased_laplace.calibration.comparisons import Comparison
from debiased_laplace.calibration.contents import ReportContents
from debiased_laplace.calibration.estimates import Estimate
from debiased_laplace.calibration.rendering.formatting import (
    choose_decimals,
    format_interval,
    format_number,
    format_signed,
)

SHORT_NAMES = {"nll": "NLL", "brier": "Brier score", "crps": "CRPS"}


def summarize(contents: ReportContents) -> list[str]:
    """One sentence for every method that is compared, or for the only one there is."""
    methods = [m for m in contents.methods if m != contents.baseline] or [contents.baseline]
    return [_summarize_method(contents, method) for method in methods]


def describe_confidence(metrics: dict[str, Estimate]) -> str:
    """Over-confident, under-confident or neither detectably, with its size."""
    if "confidence_gap" in metrics:
        gap = metrics["confidence_gap"]
        return _describe_sign(gap, target=0.0, amount=f" by {_show(abs(gap.known), gap)}")
    scale = metrics["z_scale"]
    return _describe_sign(
        scale,
        target=1.0,
        amount=f" (errors are {_show(scale.known, scale)} predicted standard deviations)",
    )


def _show(value: float, estimate: Estimate) -> str:
    low, high = estimate.low, estimate.high
    half_width = (high - low) / 2 if low is not None and high is not None else None
    return format_number(value, choose_decimals([half_width]))


def _describe_sign(estimate: Estimate, *, target: float, amount: str) -> str:
    if estimate.low is not None and estimate.low > target:
        return f"over-confident{amount}"
    if estimate.high is not None and estimate.high < target:
        return f"under-confident{amount}"
    return "neither over- nor under-confident detectably"


def _summarize_method(contents: ReportContents, method: str) -> str:
    metrics = contents.metrics[method]
    parts = [_describe_comparison(c) for c in contents.comparisons if c.method == method]
    against = f" against {contents.baseline}" if parts else ""
    if not parts:
        nll = metrics["nll"]
        decimals = choose_decimals([nll.standard_error])
        interval = format_interval(nll.low, nll.high, decimals)
        parts = [f"NLL {format_number(nll.value, decimals)} {interval}".rstrip()]
    return f"{method}{against}: {'; '.join(parts)}; {describe_confidence(metrics)}."


def _describe_comparison(comparison: Comparison) -> str:
    name = SHORT_NAMES[comparison.metric]
    decimals = choose_decimals([comparison.standard_error])
    low, high = comparison.low, comparison.high
    if comparison.verdict == "no detectable difference":
        interval = format_interval(low, high, decimals)
        size = f"{format_signed(comparison.difference, decimals)} {interval}".rstrip()
        return f"no detectable difference in {name} ({size})"
    better = comparison.verdict == "better"
    if better and low is not None and high is not None:
        low, high = -high, -low
    return (
        f"{name} {format_number(abs(comparison.difference), decimals)} "
        f"{'lower' if better else 'higher'} {format_interval(low, high, decimals)} "
        f"({comparison.verdict})"
    )
