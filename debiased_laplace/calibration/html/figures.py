"""The figures of the page, each with a text alternative and the same numbers as a table."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from debiased_laplace.calibration.contents import (
    SCORES,
    ClassificationCurves,
    Comparison,
    ConfidenceBin,
    Detection,
    RegressionCurves,
    ReportContents,
    RiskPoint,
    SpreadBin,
)
from debiased_laplace.calibration.findings import SHORT_NAMES
from debiased_laplace.calibration.formatting import (
    NO_BREAK,
    choose_decimals,
    format_number,
    format_p_value,
    format_signed,
    shorten,
)
from debiased_laplace.calibration.html.panels import (
    BAND,
    DASHED,
    FONT_SIZE,
    GREY,
    KEY_HEIGHT,
    WIDTH,
    Look,
    Panel,
    add_axes,
    add_key,
    assign_looks,
    draw_each,
    finish,
    label_axes,
    start_figure,
    tabulate,
    with_unit,
)
from debiased_laplace.calibration.tables import make_table, show_metric

NAME_LENGTH = 26  # characters of a method's name that fit beside its difference
ROW, HEADING = 0.52, 0.28  # inches of the forest plot
FEW_IN_BIN = 5  # samples; the marker of a bin with fewer is hollow
OUTPUTS_DRAWN = 2  # of several, in the panels of the spread
DRAWN_SCORES = ("conformal", "entropy", "standard_deviation")
MAX_DRAWN = 12  # panels of scores
SCORE_UNITS = {"entropy": "nats", "mutual_information": "nats"}
SETTLED = 0.05  # coverage below which a risk rests on too few samples to set the scale


def draw_differences(contents: ReportContents) -> list[Panel]:
    """Draw the paired differences, one panel per score, since every score has its own unit."""
    panels: list[Panel] = []
    for metric in dict.fromkeys(c.metric for c in contents.comparisons):
        rows = [c for c in contents.comparisons if c.metric == metric]
        name = SHORT_NAMES.get(metric, metric)
        better, worse = (sum(c.verdict == verdict for c in rows) for verdict in ("better", "worse"))
        methods = " and ".join(dict.fromkeys(c.method for c in rows))
        alt = f"Differences in {name} of {methods} with their intervals: {better} better and {worse} worse."
        table = tabulate(rows, without=("metric", "standard_error", "estimator"))
        figure = _draw_forest(rows, assign_looks(contents))
        panels.append(finish(figure, f"difference-{len(panels)}", name[0].upper() + name[1:], alt, table))
    return panels


def draw_reliability(contents: ReportContents) -> list[Panel]:
    """Draw a reliability diagram, and the numbers of samples below it, for each method."""
    curves = {m: r.curves for m, r in contents.methods.items() if isinstance(r.curves, ClassificationCurves)}
    most = max((b.n for c in curves.values() for b in c.bins), default=1)

    def draw(method: str, look: Look, name: str) -> Panel:
        bins = curves[method].bins
        figure = Figure(figsize=(WIDTH, 4.1))
        _draw_bins(add_axes(figure, bottom=1.28, top=4.02), bins, look)
        axes = add_axes(figure, bottom=0.42, top=1.05)
        axes.stairs([b.n for b in bins], _list_edges(bins), fill=True, color=look.color, alpha=0.75)
        axes.set(xlim=(0, 1), ylim=(0, most), yticks=[0, most])
        label_axes(axes, "confidence", "samples")
        axes.yaxis.labelpad = -8
        outside = sum(not b.is_consistent for b in bins)
        alt = f"Reliability diagram of {method}: {outside} of {len(bins)} bins outside the usual range."
        metrics = contents.methods[method].metrics
        aside = f"ECE {format_number(metrics['ece'].value, 3)}, chance alone "
        aside += f"{format_number(metrics['ece_noise_floor'].value, 3)}, {_describe_test(contents, method, 'ece')}"
        return finish(figure, name, method, alt, tabulate(bins), aside)

    return draw_each(contents, curves, "reliability", draw)


def draw_coverage(contents: ReportContents) -> list[Panel]:
    """Draw the observed against the nominal coverage of central intervals for each method."""
    curves = _list_curves(contents)

    def draw(method: str, look: Look, name: str) -> Panel:
        levels = curves[method].coverage
        nominal, ends = [x.nominal for x in levels], ([x.low for x in levels], [x.high for x in levels])
        figure, axes = start_figure(3.3)
        axes.plot([0, 1], [0, 1], **DASHED)
        axes.fill_between(nominal, *ends, color=look.color, alpha=0.25, linewidth=0)
        axes.plot(nominal, [x.observed for x in levels], **look._asdict(), markersize=3.5, linewidth=1.2)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        label_axes(axes, "nominal coverage of central intervals", "observed coverage")
        near = min(levels, key=lambda x: abs(x.nominal - 0.9))
        alt = (
            f"Coverage curve of {method}: central {near.nominal:.0%} intervals hold {near.observed:.1%} of the targets."
        )
        return finish(figure, name, method, alt, tabulate(levels))

    return draw_each(contents, curves, "coverage", draw)


def draw_pit(contents: ReportContents) -> list[Panel]:
    """Draw the histogram of the probability integral transform for each method."""
    curves = _list_curves(contents)
    most = 1.08 * max((max(b.n, b.consistent_high) for c in curves.values() for b in c.pit), default=1)

    def draw(method: str, look: Look, name: str) -> Panel:
        bins = curves[method].pit
        figure, axes = start_figure(2.3)
        axes.stairs([b.n for b in bins], _list_edges(bins), fill=True, color=look.color, alpha=0.75)
        axes.stairs([b.consistent_high for b in bins], _list_edges(bins), baseline=[b.consistent_low for b in bins],
                    fill=True, **BAND)  # fmt: skip
        axes.set(xlim=(0, 1), ylim=(0, most))
        axes.locator_params(axis="y", nbins=4, integer=True)
        label_axes(axes, "predicted probability of a smaller target", "targets")
        outside = sum(not b.consistent_low <= b.n <= b.consistent_high for b in bins)
        alt = f"Probability integral transform of {method}: {outside} of {len(bins)} bins outside the usual range."
        return finish(figure, name, method, alt, tabulate(bins), _describe_test(contents, method, "pit_ks"))

    return draw_each(contents, curves, "pit", draw)


def draw_spread(contents: ReportContents) -> list[Panel]:
    """Draw the root mean squared error against the predicted standard deviation, for the first outputs."""
    outputs = range(min(OUTPUTS_DRAWN, contents.data.n_outputs or 1))
    return [panel for output in outputs for panel in _draw_spread_of(contents, output)]


def draw_selection(contents: ReportContents) -> list[Panel]:
    """Draw risk against coverage of all methods, with the interval and the oracle of the baseline."""
    curves = {m: r.selection for m, r in contents.methods.items() if r.selection}
    if contents.baseline not in curves:
        return []
    looks, base = assign_looks(contents), curves[contents.baseline]
    figure = Figure(figsize=(WIDTH, 3.1 + KEY_HEIGHT * (len(curves) + 1)))
    axes = add_axes(figure, bottom=0.42, top=2.95)
    band, lines = [p for p in base if p.low is not None and p.high is not None], {}
    ends = [p.low or 0.0 for p in band], [p.high or 0.0 for p in band]
    axes.fill_between([p.coverage for p in band], *ends, **BAND | {"color": looks[contents.baseline].color})
    for i, (method, points) in enumerate(curves.items()):
        style: dict[str, Any] = {"markersize": 4, "linewidth": 1.4, "markevery": (6 * i + 9, 25)}
        x, y = [p.coverage for p in points], [p.risk for p in points]
        (lines[method],) = axes.plot(x, y, **looks[method]._asdict(), **style)
    x, y = [p.coverage for p in base], [p.oracle for p in base]
    (oracle,) = axes.plot(x, y, **DASHED)
    add_key(axes, lines | {f"oracle of {contents.baseline}": oracle})
    risks = [p.risk for points in curves.values() for p in points if p.coverage >= SETTLED]
    axes.set(xlim=(0, 1), ylim=(0, 1.06 * max(risks + [p.high or 0.0 for p in band if p.coverage >= 0.5]) or 1.0))
    axes.locator_params(axis="y", nbins=5)
    is_regression, unit = contents.task == "regression", contents.data.target_unit
    loss = "mean squared error" if is_regression else "share of errors"
    label_axes(axes, "coverage: share of samples kept", with_unit(loss, f"({unit})²" if is_regression and unit else ""))
    half, whole = (format_number(_find_nearest(base, coverage).risk) for coverage in (0.5, 1.0))
    shown = f"{contents.baseline} {half} on the more certain half of the samples, {whole} on all"
    alt = f"Risk-coverage curves of {' and '.join(curves)}: {loss} of {shown}."
    rows = [
        [p.coverage, *(_find_nearest(points, p.coverage).risk for points in curves.values()), p.low, p.high, p.oracle]
        for p in base[:: -max(1, len(base) // 20)][::-1]
    ]
    of = f"of {contents.baseline}"
    table = make_table(["coverage", *curves, f"interval {of} from", "to", f"oracle {of}"], rows)
    return [finish(figure, "selection", "Risk against coverage", alt, table)]


def draw_scores(contents: ReportContents) -> dict[str, list[Panel]]:
    """Draw the histograms of the scores for each set out of distribution, at most `MAX_DRAWN` of them."""
    looks, left = assign_looks(contents), MAX_DRAWN
    panels: dict[str, list[Panel]] = {}
    units = SCORE_UNITS | {"standard_deviation": contents.data.target_unit or ""}
    for i, (set_name, one) in enumerate(contents.ood.items()):
        drawn = [d for d in one.detections if d.score in DRAWN_SCORES][:left]
        left -= len(drawn)
        panels[set_name] = []
        for j, d in enumerate(drawn):
            figure = _draw_histograms(d, looks[d.method].color, set_name)
            axes, peers = figure.axes[0], [e for e in one.detections if e.score == d.score]
            axes.set_ylim(0, 1.05 * max(x for e in peers for shares in _list_shares(e) for x in shares))
            words = SCORES.get(d.score, d.score)
            label_axes(axes, with_unit(words, units.get(d.score, "")), "share of the set")
            auroc = show_metric("auroc", d.metrics["auroc"], 3)
            alt = f"Histograms of {words} of {d.method} on the test set and on {set_name}: AUROC {auroc}."
            aside = f"{words}: AUROC {auroc}"
            panels[set_name].append(finish(figure, f"ood-{i}-{j}", d.method, alt, tabulate(d.histogram), aside))
    return panels


def _list_curves(contents: ReportContents) -> dict[str, RegressionCurves]:
    return {m: r.curves for m, r in contents.methods.items() if isinstance(r.curves, RegressionCurves)}


def _draw_forest(rows: Sequence[Comparison], looks: dict[str, Look]) -> Figure:
    """A group of rows per reference; a row is a method with its difference in words, and the interval below."""
    references = list(dict.fromkeys(c.baseline for c in rows))
    height = len(rows) * ROW + len(references) * HEADING
    figure, axes = start_figure(height + 0.5)
    axes.set_position((0.03, 0.45 / (height + 0.5), 0.94, height / (height + 0.5)))
    axes.spines["left"].set_visible(False)
    words: dict[str, Any] = {"fontsize": FONT_SIZE, "parse_math": False, "transform": axes.get_yaxis_transform()}
    y = height  # of the axis, in inches from below
    for reference in references:
        y -= HEADING
        axes.text(0.0, y + 0.06, f"compared with {shorten(reference, NAME_LENGTH)}", weight="bold", **words)
        axes.axhline(y, color=GREY, linewidth=0.5)
        for c in (c for c in rows if c.baseline == reference):
            y -= ROW
            verdict = "not detectable" if c.verdict == "no detectable difference" else c.verdict
            difference = format_signed(c.difference, choose_decimals([c.standard_error]))
            axes.text(0.0, y + 0.3, f"{shorten(c.method, NAME_LENGTH)}: {difference}, {verdict}", **words)
            axes.plot([0, 0], [y + 0.04, y + 0.24], color=GREY, linewidth=1)  # zero, but not through the words
            if c.low is not None and c.high is not None:
                axes.plot([c.low, c.high], [y + 0.14] * 2, color=looks[c.method].color, linewidth=1.8)
            face = "none" if verdict == "not detectable" else looks[c.method].color
            axes.plot([c.difference], [y + 0.14], **looks[c.method]._asdict(), markersize=6.5, markerfacecolor=face)
    # symmetric around zero, so that the direction is seen at once
    half = 1.12 * max(abs(x) for c in rows for x in (c.difference, c.low, c.high) if x is not None) or 1.0
    axes.set(xlim=(-half, half), ylim=(0, height), yticks=[])
    axes.locator_params(axis="x", nbins=5)
    for x, text, side in ((0.0, "\u2190 better", "left"), (1.0, "worse \u2192", "right")):
        axes.text(x, -0.3 / height, text, fontsize=FONT_SIZE, va="top", ha=side, transform=axes.transAxes)
    return figure


def _draw_bins(axes: Axes, bins: Sequence[ConfidenceBin], look: Look) -> None:
    """Diagonal, consistency band, Wilson intervals and markers of the bins that hold samples."""
    axes.plot([0, 1], [0, 1], **DASHED)
    low, high = [b.consistent_low or 0.0 for b in bins], [b.consistent_high or 0.0 for b in bins]
    axes.stairs(high, _list_edges(bins), baseline=low, fill=True, **BAND)
    for face, is_few in ((look.color, False), ("none", True)):
        group = [b for b in bins if b.n and (b.n < FEW_IN_BIN) == is_few]
        x = [b.confidence or 0.0 for b in group]
        axes.vlines(x, [b.low or 0.0 for b in group], [b.high or 0.0 for b in group], color=look.color, linewidth=1.3)
        axes.plot(x, [b.accuracy or 0.0 for b in group], linestyle="none", **look._asdict(), markersize=5,
                  markerfacecolor=face, clip_on=False)  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(0, 1), xticklabels=[])
    label_axes(axes, "", "accuracy")


def _draw_spread_of(contents: ReportContents, output: int) -> list[Panel]:
    """The panels of one output, which share an axis."""
    unit, curves = contents.data.target_unit, _list_curves(contents)
    shown = {m: found for m, c in curves.items() if (found := [b for b in c.spread if b.output == output])}
    limits = _span([x for bins in shown.values() for b in bins for x in _list_ends(b)], 0.06)

    def draw(method: str, look: Look, name: str) -> Panel:
        bins, caption = shown[method], _name_output(contents, method, output)
        figure, axes = start_figure(3.3)
        _draw_spread_bins(axes, bins, look)
        axes.set_ylim(max(0.0, limits[0]), limits[1])
        axes.locator_params(nbins=5)
        label_axes(axes, with_unit("predicted standard deviation", unit), with_unit("root mean squared error", unit))
        outside = sum(not b.consistent_low <= b.observed <= b.consistent_high for b in bins)
        alt = (
            f"Errors by predicted standard deviation, {caption}: {outside} of {len(bins)} bins outside the usual range."
        )
        table = tabulate(bins, without=("output",))
        return finish(figure, name, caption, alt, table, _describe_test(contents, method, "ence"))

    return draw_each(contents, shown, f"spread-{output}", draw)


def _draw_spread_bins(axes: Axes, bins: Sequence[SpreadBin], look: Look) -> None:
    predicted = [b.predicted for b in bins]
    # every panel has its own width: spreads that hardly differ would lie on each other beside those that do
    margin = max(0.08 * (predicted[-1] - predicted[0]), (0.01 if len(bins) > 1 else 0.06) * predicted[-1])
    horizontal = max(0.0, predicted[0] - margin), predicted[-1] + margin
    axes.plot(horizontal, horizontal, **DASHED)
    usual = [b.consistent_low for b in bins], [b.consistent_high for b in bins]
    if len(bins) > 1:
        axes.fill_between(predicted, *usual, **BAND)
    else:
        axes.vlines(predicted, *usual, **BAND | {"linewidth": 12})
    known = [b for b in bins if b.low is not None and b.high is not None]
    ends = [b.low or 0.0 for b in known], [b.high or 0.0 for b in known]
    axes.vlines([b.predicted for b in known], *ends, color=look.color, linewidth=1.2)
    axes.plot(predicted, [b.observed for b in bins], **look._asdict(), markersize=4.5, linestyle="none")
    axes.set_xlim(horizontal)


def _draw_histograms(d: Detection, color: str, set_name: str) -> Figure:
    """Both sets' shares by score."""
    edges = _list_edges(d.histogram)
    figure = Figure(figsize=(WIDTH, 2.1 + 2 * KEY_HEIGHT))
    axes = add_axes(figure, bottom=0.42, top=1.95)
    inside, outside = _list_shares(d)
    area = axes.stairs(inside, edges, fill=True, color=GREY, alpha=0.55)
    line = axes.stairs(outside, edges, color=color, linewidth=1.6)
    add_key(axes, {"test set": area, set_name: line})
    axes.set_xlim(edges[0], edges[-1])
    axes.locator_params(axis="both", nbins=4)
    return figure


def _list_edges(bins: Sequence[Any]) -> list[float]:
    return [bins[0].left, *(b.right for b in bins)]


def _list_ends(b: SpreadBin) -> list[float]:
    ends = (b.observed, b.consistent_low, b.consistent_high, b.low, b.high)
    return [x for x in ends if x is not None]


def _list_shares(d: Detection) -> tuple[list[float], list[float]]:
    """Share of either set in each bin."""
    inside, outside = [b.n_in_distribution for b in d.histogram], [b.n_out_of_distribution for b in d.histogram]
    return [n / max(1, sum(inside)) for n in inside], [n / max(1, sum(outside)) for n in outside]


def _find_nearest(points: Sequence[RiskPoint], coverage: float) -> RiskPoint:
    return min(points, key=lambda p: abs(p.coverage - coverage))


def _span(values: Sequence[float], margin: float) -> tuple[float, float]:
    """Limits of an axis with some space on both sides."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    space = margin * (high - low) or 1.0
    return low - space, high + space


def _describe_test(contents: ReportContents, method: str, metric: str) -> str:
    """The p-value of a metric, or why there is none; empty for several outputs, since it is about all of them."""
    estimate = contents.methods[method].metrics.get(f"{metric}_p_value")
    if estimate is None or (contents.data.n_outputs or 1) > 1:
        return ""
    return estimate.reason or "" if estimate.value is None else format_p_value(estimate.value).replace(" ", NO_BREAK)


def _name_output(contents: ReportContents, method: str, output: int) -> str:
    return f"{method}, output {output}" if (contents.data.n_outputs or 1) > 1 else method
