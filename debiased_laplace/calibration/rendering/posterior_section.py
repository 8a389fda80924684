"""The section on the posteriors: what was fitted, how inflated a single batch's curvature is, what it cost."""

from html import escape

from debiased_laplace.calibration.contents import ReportContents, ReportTable
from debiased_laplace.calibration.rendering.formatting import format_level
from debiased_laplace.calibration.rendering.panels import assign_looks
from debiased_laplace.calibration.rendering.posterior_figures import draw_inflation, draw_spectrum
from debiased_laplace.calibration.rendering.posterior_tables import (
    tabulate_held_out,
    tabulate_posteriors,
    tabulate_predictions,
)
from debiased_laplace.calibration.rendering.sections import render_panels, render_table


def render_posteriors(contents: ReportContents) -> str:
    """The whole section; empty without posteriors and without a word on how methods predicted."""
    posteriors, predicted = dict(contents.posteriors), dict(contents.predicted)
    if not posteriors and not predicted:
        return ""
    parts = []
    if posteriors:
        # a posterior looks like the method of the same name
        looks = assign_looks(list(dict.fromkeys([*contents.methods, *posteriors])))
        level = format_level(contents.settings["confidence_level"])
        parts += ["<h2>The posteriors</h2>", render_table(tabulate_posteriors(posteriors), kind="headline")]
        parts.append(_render_notes(contents))
        held_out = tabulate_held_out(posteriors)
        if held_out is not None:
            parts.append(_render_held_out(held_out, level))
        if panels := draw_inflation(posteriors, looks):
            parts.append(
                "<h3>How inflated a single batch's curvature is</h3><p>Curvature that the samples of a direction see "
                "along it themselves, over the estimate for the full batch from samples that the direction does not "
                "know. Above the dashed line at 1 a posterior of the single batch would be too narrow there, below it "
                f"too wide. Bars: {level} intervals, those of the estimate. Hollow markers are beyond the edge.</p>"
                + render_panels(panels)
            )
        if panels := draw_spectrum(posteriors, looks):
            parts.append(
                "<h3>What the data say against what the prior says</h3><p>Curvature times N, over noise and "
                "temperature: what the data add to the posterior precision along each direction. The dashed line is "
                "the prior precision; where the values are far below it, the posterior is the prior.</p>"
                + render_panels(panels)
            )
    if predicted:
        parts += ["<h2>How the methods predicted</h2>", render_table(tabulate_predictions(predicted))]
        parts.append(
            '<p class="note">One pass over the test set: all methods got the same inputs and the same random '
            "numbers. Times are of this run on this machine.</p>"
        )
    return "".join(parts)


def _render_held_out(table: ReportTable, level: str) -> str:
    return (
        f"<h3>{escape(table.title)}</h3>{render_table(table)}"
        '<p class="note">Kullback-Leibler divergence over the parameters to the posterior of all N samples, minus that '
        "of the posterior it is compared with, estimated from training samples left out of the fit; below zero "
        f"is closer. {level} intervals; they are rough with few held-out samples, since a few of them carry most of "
        "the curvature.</p>"
    )


def _render_notes(contents: ReportContents) -> str:
    notes = [(name, note) for name, s in contents.posteriors.items() for note in s.notes]
    if not notes:
        return ""
    items = "".join(f"<li>{escape(name)}: {escape(note)}</li>" for name, note in notes)
    return f'<details><summary>What is missing, and why</summary><ul class="note">{items}</ul></details>'
