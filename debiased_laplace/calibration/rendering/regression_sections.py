"""The sections of a regression page: figures with what they mean, and single outputs."""

from html import escape

from debiased_laplace.calibration.contents import RegressionCurves, ReportContents, ReportTable
from debiased_laplace.calibration.estimates import Estimate
from debiased_laplace.calibration.rendering.formatting import (
    choose_common_decimals,
    format_bare_p_value,
    format_level,
    format_p_value,
    format_unbroken,
)
from debiased_laplace.calibration.rendering.panels import Look, Panel
from debiased_laplace.calibration.rendering.regression_figures import draw_coverage, draw_pit
from debiased_laplace.calibration.rendering.sections import render_panels, render_table
from debiased_laplace.calibration.rendering.spread_figures import OUTPUTS_DRAWN, draw_examples, draw_spread

OF_OUTPUTS = {
    "nll": "NLL",
    "crps": "CRPS",
    "rmse": "RMSE",
    "z_scale": "scale of the errors",
    "picp": "coverage at 90 %",
    "mpiw": "width at 90 %",
    "sharpness": "mean standard deviation",
    "pit_ks_p_value": "p, probability transform",
    "error_spread_correlation": "correlation of error and spread",
}


def render_regression(contents: ReportContents, looks: dict[str, Look]) -> str:
    """Coverage, probability transform, spread, single predictions, single outputs."""
    results = dict(contents.methods)
    level = format_level(contents.settings["confidence_level"])
    unit = contents.data.target_unit
    first = {kind: _name_outputs(contents.data.n_outputs or 1, drawn) for kind, drawn in OUTPUTS_DRAWN.items()}
    return (
        "<h2>Coverage</h2><p>Share of targets inside central intervals of the predictive, against "
        "what these intervals promise. Below the dashed diagonal the error bars are too narrow "
        "(over-confident), above it too wide. Shaded: Wilson intervals, each for its own level.</p>"
        + render_panels(draw_coverage(results, looks))
        + "<h2>Where the targets fall</h2><p>Predicted probability of a smaller target than the "
        "observed one: flat if the predictive is right, U-shaped if too narrow, a hump if too wide, "
        f"a slope if shifted. Grey: where {level} of the bars would end if it were right.</p>"
        + render_panels(draw_pit(results, looks), _list_p_values(contents, "pit_ks_p_value"))
        + "<h2>Large errors where a large error is predicted</h2><p>Test samples in bins of equally many by their "
        "predicted standard deviation, and the root mean square of their errors with its interval. On the dashed "
        "line the spread is right, above it the errors are larger than predicted (over-confident). Grey: where "
        f"{level} of the markers would lie if targets came from the predictive; p: of the normalised error, "
        f"which their distances from the line make up.{first['spread']}</p>"
        + _render_by_output(draw_spread(results, looks, unit), _list_p_values(contents, "ence_equal_mass_p_value"))
        + f"<h2>Single predictions</h2><p>{_describe_examples(contents)} in the order of their predicted mean (dashes) "
        "with central 90 % intervals. Dots: targets; crosses: targets outside of their interval, one in ten being "
        f"usual.{first['examples']}</p>"
        + _render_by_output(draw_examples(results, looks, unit))
        + _render_outputs(contents)
    )


def _name_outputs(n_outputs: int, drawn: int) -> str:
    if n_outputs <= drawn:
        return ""
    return " Only output 0 is drawn." if drawn == 1 else f" Only outputs 0 to {drawn - 1} are drawn."


def _render_by_output(panels: list[list[Panel]], asides: list[str] | None = None) -> str:
    return "".join(render_panels(of_output, asides) for of_output in panels)


def _describe_examples(contents: ReportContents) -> str:
    curves = next(iter(contents.methods.values())).curves
    shown = sum(e.output == 0 for e in curves.examples) if isinstance(curves, RegressionCurves) else 0
    return "All test samples" if shown == contents.data.n else f"{shown} test samples drawn at random"


def _list_p_values(contents: ReportContents, name: str) -> list[str] | None:
    """One per panel; none where there are several outputs, since it is about all of them."""
    if contents.data.n_outputs != 1:
        return None
    estimates = [metrics.get(name) for metrics in contents.metrics.values()]
    return ["" if e is None else e.reason or "" if e.value is None else format_p_value(e.value) for e in estimates]


def _render_outputs(contents: ReportContents) -> str:
    """A table per method with one row for each output; empty for a single output."""
    parts = []
    for method, result in contents.methods.items():
        if not isinstance(result.curves, RegressionCurves) or not result.curves.outputs:
            continue
        outputs = result.curves.outputs
        names = [name for name in OF_OUTPUTS if name in outputs[0].metrics]
        decimals = {name: choose_common_decimals([o.metrics[name] for o in outputs]) for name in names}
        rows = [[str(o.output), *(_show(name, o.metrics[name], decimals[name]) for name in names)] for o in outputs]
        table = ReportTable(f"Outputs of {method}", ["output", *(OF_OUTPUTS[name] for name in names)], rows)
        parts.append(f"<h3>{escape(method)}</h3>{render_table(table)}")
    if not parts:
        return ""
    return "<h2>Single outputs</h2><p>Every output for itself, from its marginal predictive.</p>" + "".join(parts)


def _show(name: str, estimate: Estimate, decimals: int | None) -> str:
    if estimate.value is not None and name.endswith("_p_value"):
        return format_bare_p_value(estimate.value)
    return format_unbroken(estimate, decimals)
