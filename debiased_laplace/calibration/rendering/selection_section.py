"""The sections of the page on selective prediction and on samples out of distribution."""

from html import escape

from debiased_laplace.calibration.contents import ReportContents
from debiased_laplace.calibration.metrics.out_of_distribution import SCORES, UNITS, Detection
from debiased_laplace.calibration.rendering.formatting import format_level, format_unbroken
from debiased_laplace.calibration.rendering.panels import Look
from debiased_laplace.calibration.rendering.sections import render_metrics, render_panels, render_table
from debiased_laplace.calibration.rendering.selection_figures import draw_scores, draw_selection
from debiased_laplace.calibration.rendering.selection_tables import (
    DECIMALS,
    describe_chance,
    tabulate_detection,
    tabulate_kept,
)

DRAWN_SCORES = ("conformal", "entropy", "standard_deviation")  # the JSON file holds the others too
MAX_DRAWN = 12  # panels of all sets together


def render_selection(contents: ReportContents, looks: dict[str, Look]) -> str:
    """Risk-coverage curves, areas, and accuracy at some coverages; empty for a report without them."""
    curves = {m: r.selection for m, r in contents.methods.items() if r.selection is not None}
    if not curves:
        return ""
    kept, is_regression = tabulate_kept(contents), contents.task == "regression"
    target_unit = contents.data.target_unit
    order = "the smallest predicted standard deviations" if is_regression else "the most confident"
    loss = "mean squared error" if is_regression else "share of errors"
    percent = format_level(contents.settings["confidence_level"])
    has_band = any(p.low is not None for p in curves[contents.baseline].points)
    of = f" of {contents.baseline}" if len(curves) > 1 else ""
    band = f" Shaded: {percent} intervals{of}, each for its own coverage." if has_band else ""
    text = (
        f"Samples are kept by their confidence, {order} first: {loss} among those that are kept, against how many are. "
        f"The lower a curve on the left, the better the method knows where it fails.{band} Dashed: an oracle that "
        f"keeps the smallest losses first, with the predictions{of or ' of the method'}."
    )
    unit = f"({target_unit})\u00b2" if target_unit else ""
    panel = draw_selection(curves, looks, baseline=contents.baseline, unit=unit)
    beside = "" if kept is None else f"<div><h3>{escape(kept.title)}</h3>{render_table(kept)}</div>"
    return (
        f"<h2>Selective prediction</h2><p>{escape(text)}</p>"
        f'<div class="beside"><div>{render_panels([panel])}</div>{beside}</div>' + render_metrics(contents, "selective")
    )


def render_detection(contents: ReportContents, looks: dict[str, Look]) -> str:
    """Histograms and metrics of every set; empty without any."""
    if not contents.ood:
        return ""
    found = {d.score for s in contents.ood.values() for d in s.detections}
    scores = [score for score in SCORES if score in found]
    text = (
        "How well scores of uncertainty tell samples of another origin from those of the test set. Out of "
        "distribution is the positive class, and a larger score speaks for it. Scores: "
        f"{', '.join(SCORES[score] for score in scores)}."
    )
    if any(s.comparisons for s in contents.ood.values()):
        tests = sum(len(s.comparisons) for s in contents.ood.values())
        text += f" Differences to {contents.baseline} are paired by sample, with the same score, or its entropy"
        text += f"; verdicts after Holm's adjustment for all {tests} of them." if tests > 1 else "."
    parts = [f"<h2>Out of distribution</h2><p>{escape(text)}</p>"]
    n_drawn = sum(d.score in DRAWN_SCORES for s in contents.ood.values() for d in s.detections)
    if n_drawn > MAX_DRAWN:
        parts.append(f"<p>{MAX_DRAWN} of {n_drawn} histograms are drawn; the JSON file holds the others.</p>")
    left = MAX_DRAWN
    for i, (name, one) in enumerate(contents.ood.items()):
        drawn = [d for d in one.detections if d.score in DRAWN_SCORES][: max(0, left)]
        left -= len(drawn)
        parts.append(f"<h3>{escape(name)}</h3><p>{escape(describe_chance(one, contents.data.n))}</p>")
        parts.append(render_table(tabulate_detection(name, one, contents.baseline)))
        if drawn:
            units = UNITS | {"standard_deviation": contents.data.target_unit or ""}
            panels = draw_scores(drawn, looks, set_name=name, index=i, units=units)
            parts.append(render_panels(panels, [_describe(d) for d in drawn]))
    return "".join(parts)


def _describe(detection: Detection) -> str:
    auroc = detection.metrics["auroc"]
    return f"{SCORES[detection.score]}: AUROC {format_unbroken(auroc, DECIMALS)}"
