"""The report as one HTML file: no scripts, nothing from the network."""

import re
from html import escape
from urllib.parse import quote

from debiased_laplace.calibration.contents import ReportContents, ReportFigure, ReportTable
from debiased_laplace.calibration.metrics.definitions import define_metrics
from debiased_laplace.calibration.rendering.class_tables import render_classes
from debiased_laplace.calibration.rendering.classification_figures import draw_confidences, draw_reliability
from debiased_laplace.calibration.rendering.comparison_figures import draw_differences
from debiased_laplace.calibration.rendering.decomposition_figures import draw_decomposition
from debiased_laplace.calibration.rendering.formatting import format_level, format_number, format_p_value
from debiased_laplace.calibration.rendering.gates_section import render_gates
from debiased_laplace.calibration.rendering.group_section import render_groups
from debiased_laplace.calibration.rendering.panels import Look, Panel, assign_looks
from debiased_laplace.calibration.rendering.posterior_section import render_posteriors
from debiased_laplace.calibration.rendering.regression_sections import render_regression
from debiased_laplace.calibration.rendering.sections import (
    render_metrics,
    render_panels,
    render_table,
)
from debiased_laplace.calibration.rendering.selection_section import render_detection, render_selection
from debiased_laplace.calibration.rendering.sensitivity_figures import draw_sensitivity
from debiased_laplace.calibration.rendering.style import STYLE_SHEET
from debiased_laplace.calibration.rendering.svg import adopt_svg
from debiased_laplace.calibration.rendering.verdict import find_harm, judged_methods, name_reference, summarize

SEPARATOR = " \u00b7 "
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
REFERENCE = re.compile(r"(doi:|arXiv:)(\S+[^\s;.,])")
RESOLVERS = {"doi:": "https://doi.org/", "arXiv:": "https://arxiv.org/abs/"}


def render_html(contents: ReportContents) -> str:
    """The whole page."""
    looks = assign_looks(list(contents.methods))
    is_regression = contents.task == "regression"
    curves = (render_regression if is_regression else _render_classification)(contents, looks)
    body = [
        _render_top(contents),
        "<h2>Metrics</h2>",
        _explain_headline(contents),
        render_metrics(contents, "headline"),
        _render_details(contents),
        _render_differences(contents, looks),
        _render_decomposition(contents, looks),
        curves,
        render_classes(contents),
        render_groups(contents),
        render_selection(contents, looks),
        render_detection(contents, looks),
        render_posteriors(contents),
        *(_render_extra_figure(f, i) for i, f in enumerate(contents.figures)),
        *(_render_extra_table(t) for t in contents.tables),
        _render_settings(contents),
        _render_warnings(contents),
        _render_definitions(contents),
        _render_reading_help(contents),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(contents.title)}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n"
        "<body>\n<main>\n" + "\n".join(part for part in body if part) + "\n</main>\n</body>\n</html>\n"
    )


def _render_top(contents: ReportContents) -> str:
    data = contents.data
    size = "1 test sample" if data.n == 1 else f"{data.n:,} test samples".replace(",", "\u202f")
    outputs = "1 output" if data.n_outputs == 1 else f"{data.n_outputs} outputs"
    kind = f"{data.n_classes} classes" if data.n_classes else outputs
    facts = [size, kind, contents.created.replace("T", " ").replace("+00:00", " UTC")]
    verdict = "".join(
        f"<p{' class=harm' if find_harm(contents, method) else ''}>{escape(sentence)}</p>"
        for method, sentence in zip(judged_methods(contents), summarize(contents), strict=True)
    )
    n_warnings = len(contents.warnings)
    caution = (
        f'<p class="note"><a href="#warnings">{n_warnings} warning{"s" * (n_warnings > 1)}</a> about these numbers.</p>'
        if n_warnings
        else ""
    )
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", contents.description) if p.strip()]
    return (
        f"<header><h1>{escape(contents.title)}</h1>"
        f'<p class="facts">{escape(SEPARATOR.join(facts))}</p></header>'
        f'<div class="verdict">{verdict}</div>{render_gates(contents)}{caution}'
        + "".join(f"<p>{escape(p)}</p>" for p in paragraphs)
    )


def _explain_headline(contents: ReportContents) -> str:
    text = f"Estimates with {format_level(contents.settings['confidence_level'])} intervals over test samples."
    if contents.comparisons:
        text += (
            f" Below them the verdict of the paired comparison with {contents.baseline}"
            + ("" if contents.scaling is None else f" and with {name_reference(contents, contents.scaling.method)}")
            + f" on the same samples, after Holm's adjustment for all {len(contents.comparisons)} comparisons: "
            "what was detected. The differences themselves stand in the next section."
        )
    return f"<p>{escape(text)}</p>"


def _render_details(contents: ReportContents) -> str:
    table = render_metrics(contents, "detail")
    return f"<details><summary>Further metrics</summary>{table}</details>" if table else ""


def _render_differences(contents: ReportContents, looks: dict[str, Look]) -> str:
    if not contents.comparisons:
        return ""
    text = (
        "Each method's score minus that of the method it is compared with, on the same test samples, with its "
        f"interval. Filled markers: a difference detected after Holm's adjustment over all {len(contents.comparisons)} "
        "comparisons; hollow: none detectable."
    )
    if contents.scaling is not None:
        number = "temperature" if contents.scaling.quantity == "temperature" else "factor of its standard deviations"
        text += (
            f" {name_reference(contents, contents.scaling.method)} is {contents.baseline} with a single fitted number, "
            f"a {number}: a posterior that cannot beat it is not worth its cost for these predictions."
        )
    panels = draw_differences(contents.comparisons, looks)
    return f"<h2>Differences to {escape(contents.baseline)}</h2><p>{escape(text)}</p>" + render_panels(panels)


def _render_decomposition(contents: ReportContents, looks: dict[str, Look]) -> str:
    panel = draw_decomposition(contents, looks)
    if panel is None:
        return ""
    number = "factor of the standard deviations" if contents.task == "regression" else "temperature"
    return (
        "<h2>Where the loss comes from</h2><p>Filled: the negative log-likelihood. Hollow: what remains of it after "
        f"one {number}, fitted on the other folds of the test set. The line between them is what calibration alone "
        "would gain; the rest is knowledge that the method does not have.</p>" + render_panels([panel])
    )


def _render_classification(contents: ReportContents, looks: dict[str, Look]) -> str:
    results = dict(contents.methods)
    level = format_level(contents.settings["confidence_level"])
    asides = [
        f"ECE {format_number(m['ece'].value, 3)}, chance alone "
        f"{format_number(m['ece_noise_floor'].value, 3)}, {format_p_value(m['ece_p_value'].known)}"
        for m in contents.metrics.values()
    ]
    return (
        "<h2>Reliability</h2><p>Accuracy of the predictions in each bin of confidence. Markers below "
        "the dashed diagonal are over-confident, above it under-confident. Bars: Wilson intervals. "
        f"Grey: where {level} of the accuracies would lie if the confidences were right, so a marker "
        "inside it is no evidence against them. Hollow markers hold fewer than 5 samples. Underneath: "
        "samples per bin.</p>"
        + render_panels(draw_reliability(results, looks), asides)
        + "<h2>Confidence where right and where wrong</h2><p>Shares of the correct and of the wrong "
        "predictions by confidence. A useful confidence keeps the wrong ones to the left.</p>"
        + render_panels(draw_confidences(results))
        + _render_sensitivity(draw_sensitivity(results, looks))
    )


def _render_sensitivity(panels: list[Panel]) -> str:
    if not panels:
        return ""
    return (
        "<h2>Calibration error and the number of bins</h2><p>The expected calibration error with 5 to 50 bins of "
        "equal width. Grey: what chance alone would make of it. An error that follows the edge of the grey area is "
        "noise; one that stays above it by the same distance does not depend on the bins.</p>" + render_panels(panels)
    )


def _render_extra_figure(figure: ReportFigure, index: int) -> str:
    svg = adopt_svg(figure.svg, name=f"extra-{index}", alt=figure.alt)
    note = f'<p class="note">{escape(figure.note)}</p>' if figure.note else ""
    return f"<h2>{escape(figure.title)}</h2><figure>{svg}</figure>{note}"


def _render_extra_table(table: ReportTable) -> str:
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f"<h2>{escape(table.title)}</h2>{render_table(table)}{note}"


def _render_settings(contents: ReportContents) -> str:
    rows: list[tuple[str, str | int | float]] = [
        *contents.metadata.items(),
        *contents.settings.items(),
        *((f"{name} version", version) for name, version in contents.software.items()),
        ("digest of the targets", contents.data.targets_sha256[:16]),
    ]
    body = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(_show_setting(value))}</td></tr>'
        for key, value in rows
    )
    return (
        '<h2>Settings</h2><div class="scroll" role="region" tabindex="0" aria-label="Settings">'
        f'<table class="settings"><tbody>{body}</tbody></table></div>'
    )


def _show_setting(value: str | int | float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _render_warnings(contents: ReportContents) -> str:
    if not contents.warnings:
        return ""
    items = "".join(f"<li>{escape(w)}</li>" for w in contents.warnings)
    return f'<h2 id="warnings">Warnings</h2><div class="caution"><ul>{items}</ul></div>'


def _render_definitions(contents: ReportContents) -> str:
    used = {name for metrics in contents.metrics.values() for name in metrics}
    used |= {name for one in contents.ood.values() for d in one.detections for name in d.metrics}
    entries = []
    for name, d in define_metrics(contents.task).items():
        if name not in used:
            continue
        reference = f' <span class="note">{_link(d.reference)}</span>' if d.reference else ""
        entries.append(f"<dt>{escape(d.label)} <code>{escape(name)}</code></dt><dd>{escape(d.meaning)}{reference}</dd>")
    return f"<h2>Definitions</h2><dl>{''.join(entries)}</dl>"


def _link(reference: str) -> str:
    """Identifiers as links; nothing is loaded unless the reader follows one."""
    parts, end = [], 0
    for match in REFERENCE.finditer(reference):
        address = RESOLVERS[match[1]] + quote(match[2], safe="/.:()-")
        parts.append(escape(reference[end : match.start()]))
        parts.append(f'<a href="{address}" rel="noreferrer">{escape(match[0])}</a>')
        end = match.end()
    return "".join(parts) + escape(reference[end:])


def _render_reading_help(contents: ReportContents) -> str:
    points = [
        "Rank methods by the proper scores and their paired differences, not by calibration errors: "
        "predicting the class frequencies for every sample is calibrated and useless.",
        "Two methods whose own intervals overlap may still differ clearly, since pairing takes out "
        "what makes a sample hard for both. The verdict words look at the paired difference only.",
    ]
    if contents.task != "regression":
        points.append(
            "A binned calibration error near its noise floor says that this test set cannot tell the "
            "method from a perfectly calibrated one; it does not say that it is one. More samples "
            "lower the floor."
        )
    else:
        points.append(
            "Right coverage on average can hide error bars that are too narrow for some inputs and "
            "too wide for others; the proper scores notice both."
        )
    return "<h2>How to read this report</h2><ul>" + "".join(f"<li>{p}</li>" for p in points) + "</ul>"
