"""Selective prediction and out-of-distribution detection as tables, for the page and for Markdown."""

from debiased_laplace.calibration.contents import ReportContents, ReportTable
from debiased_laplace.calibration.metrics.out_of_distribution import SCORES, DetectionComparison, OutOfDistributionSet
from debiased_laplace.calibration.rendering.formatting import (
    NO_BREAK,
    NOTHING,
    format_interval,
    format_number,
    format_signed,
    format_unbroken,
)

DECIMALS = 3  # of rates, whose intervals are rarely narrower
METRICS = {"auroc": "AUROC", "aupr": "AUPR", "fpr95": "FPR95"}


def tabulate_kept(contents: ReportContents) -> ReportTable | None:
    """Accuracy at some coverages, coverages as columns; None for regression."""
    kept = {m: r.selection.kept for m, r in contents.methods.items() if r.selection is not None and r.selection.kept}
    if not kept:
        return None
    whole = {m: contents.methods[m].metrics["accuracy"] for m in kept}
    coverages = [k.coverage for k in next(iter(kept.values()))]
    rows = [
        [method, *(format_unbroken(k.accuracy, DECIMALS) for k in of_method), format_unbroken(whole[method], DECIMALS)]
        for method, of_method in kept.items()
    ]
    columns = ["method", *(f"at {100 * coverage:g}{NO_BREAK}% coverage" for coverage in coverages), "of all"]
    return ReportTable("Accuracy of the samples that are kept", columns, rows)


def tabulate_detection(name: str, one: OutOfDistributionSet, baseline: str) -> ReportTable:
    """Every method and score on one set, with the paired difference to the baseline."""
    compared = {(c.method, c.score): c for c in one.comparisons}
    rows = []
    for d in one.detections:
        cells = [format_unbroken(d.metrics[metric], DECIMALS) for metric in METRICS]
        if one.comparisons:
            cells += _show_comparison(compared.get((d.method, d.score)))
        rows.append([d.method, SCORES[d.score], *cells])
    columns = ["method", "score", *METRICS.values()]
    if one.comparisons:
        columns += [f"AUROC against {baseline}", "verdict"]
    return ReportTable(name, columns, rows)


def _show_comparison(comparison: DetectionComparison | None) -> list[str]:
    """Difference with its interval, and verdict."""
    if comparison is None:
        return [NOTHING, NOTHING]
    interval = format_interval(comparison.low, comparison.high, DECIMALS).replace(" ", NO_BREAK)
    verdict = comparison.verdict + (", below chance" if comparison.below_chance else "")
    return [f"{format_signed(comparison.difference, DECIMALS)} {interval}".rstrip(), verdict]


def describe_chance(one: OutOfDistributionSet, n: int) -> str:
    """Size of a set, and the AUPR that a score without any use has there."""
    size = "1 sample" if one.n == 1 else f"{one.n:,} samples".replace(",", "\u202f")
    return f"{size}; a score without any use has AUROC 0.5, AUPR {format_number(one.n / (one.n + n))} and FPR95 0.95."
