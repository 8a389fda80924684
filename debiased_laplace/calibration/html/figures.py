"""Figures of predictions and posteriors, each with a text alternative and the same numbers as a table."""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from debiased_laplace.calibration.contents import (
    SCORES,
    ClassificationCurves,
    Comparison,
    Detection,
    RegressionCurves,
    ReportContents,
)
from debiased_laplace.calibration.findings import SHORT_NAMES
from debiased_laplace.calibration.formatting import NO_BREAK, choose_decimals, format_number, format_p_value, shorten
from debiased_laplace.calibration.html.panels import (
    BAND,
    DASHED,
    FONT_SIZE,
    GREY,
    WIDTH,
    Look,
    Panel,
    add_axes,
    add_key,
    assign_looks,
    draw_markers,
    list_looks,
    read_columns,
    start_figure,
    tabulate,
)
from debiased_laplace.calibration.tables import make_table, show_metric

NAME_LENGTH = 26  # characters of a method's name that fit beside its difference
ROW, HEADING = 0.52, 0.28  # inches of the forest plot
FEW_IN_BIN = 5  # samples; the marker of a bin with fewer is hollow
OUTPUTS_DRAWN = 2  # of several, in the panels of the spread
DRAWN_SCORES = ("conformal", "entropy", "standard_deviation", "function_std")
MAX_DRAWN = 12  # panels of scores
SCORE_UNITS = {"entropy": "nats", "mutual_information": "nats"}
WIDEST = 8.0  # of the axis of inflation, up and down
FAR_BELOW = 300.0  # times below the prior precision, where the axis of the spectrum ends
SETTLED = 0.05  # coverage below which a risk rests on too few samples to set the scale


def draw_differences(contents: ReportContents) -> Iterator[Panel]:
    """Draw the paired differences, one panel per score, since every score has its own unit."""
    for metric in dict.fromkeys(c.metric for c in contents.comparisons):
        rows = [c for c in contents.comparisons if c.metric == metric]
        name = SHORT_NAMES.get(metric, metric)
        better, worse = (sum(c.verdict == verdict for c in rows) for verdict in ("better", "worse"))
        methods = " and ".join(dict.fromkeys(c.method for c in rows))
        alt = f"Differences in {name} of {methods} with their intervals: {better} better and {worse} worse."
        table = tabulate(rows, without=("metric", "standard_error", "estimator", "low", "high"))
        yield Panel(name[0].upper() + name[1:], _draw_forest(rows, assign_looks(contents)), alt, table)


def draw_reliability(contents: ReportContents) -> Iterator[Panel]:
    """Draw a reliability diagram, and the numbers of samples below it, for each method."""
    curves = {m: r.curves for m, r in contents.methods.items() if isinstance(r.curves, ClassificationCurves)}
    most = max((b.n for c in curves.values() for b in c.bins), default=1)
    for method, look in list_looks(contents, curves):
        bins = read_columns(curves[method].bins)
        figure = Figure(figsize=(WIDTH, 4.1))
        axes = add_axes(figure, 1.28, 4.02, "", "accuracy")
        axes.plot([0, 1], [0, 1], **DASHED)
        usual = bins[["consistent_low", "consistent_high"]].fillna(0.0)
        axes.stairs(usual["consistent_high"], _list_edges(bins), baseline=usual["consistent_low"], fill=True, **BAND)
        held = bins[bins["n"] > 0]
        axes.vlines(held["confidence"], held["low"], held["high"], color=look.color, linewidth=1.3)
        draw_markers(axes, held["confidence"], held["accuracy"], look, is_hollow=held["n"] < FEW_IN_BIN, size=5)
        axes.set(xlim=(0, 1), ylim=(0, 1), xticklabels=[])
        counts = add_axes(figure, 0.42, 1.05, "confidence", "samples")
        counts.stairs(bins["n"], _list_edges(bins), fill=True, color=look.color, alpha=0.75)
        counts.set(xlim=(0, 1), ylim=(0, most), yticks=[0, most])
        counts.yaxis.labelpad = -8
        metrics = contents.methods[method].metrics
        aside = f"ECE {format_number(metrics['ece'].value, 3)}, chance alone "
        aside += f"{format_number(metrics['ece_noise_floor'].value, 3)}, {_describe_test(contents, method, 'ece')}"
        alt = f"Reliability diagram of {method}: {_count_unusual(held, 'accuracy', len(bins))}."
        yield Panel(method, figure, alt, tabulate(curves[method].bins), aside)


def draw_coverage(contents: ReportContents) -> Iterator[Panel]:
    """Draw the observed against the nominal coverage of central intervals for each method."""
    curves = _list_curves(contents)
    for method, look in list_looks(contents, curves):
        levels = read_columns(curves[method].coverage)
        figure, axes = start_figure(3.3, "nominal coverage of central intervals", "observed coverage")
        axes.plot([0, 1], [0, 1], **DASHED)
        axes.fill_between(levels["nominal"], levels["low"], levels["high"], color=look.color, alpha=0.25, linewidth=0)
        axes.plot(levels["nominal"], levels["observed"], **look._asdict(), markersize=3.5, linewidth=1.2)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        near = min(curves[method].coverage, key=lambda x: abs(x.nominal - 0.9))
        held = f"central {near.nominal:.0%} intervals hold {near.observed:.1%} of the targets"
        yield Panel(method, figure, f"Coverage curve of {method}: {held}.", tabulate(curves[method].coverage))


def draw_pit(contents: ReportContents) -> Iterator[Panel]:
    """Draw the histogram of the probability integral transform for each method."""
    curves = _list_curves(contents)
    most = 1.08 * max((max(b.n, b.consistent_high) for c in curves.values() for b in c.pit), default=1)
    for method, look in list_looks(contents, curves):
        bins = read_columns(curves[method].pit)
        edges, low, high = _list_edges(bins), bins["consistent_low"], bins["consistent_high"]
        figure, axes = start_figure(2.3, "predicted probability of a smaller target", "targets")
        axes.stairs(bins["n"], edges, fill=True, color=look.color, alpha=0.75)
        axes.stairs(high, edges, baseline=low, fill=True, **BAND)
        axes.set(xlim=(0, 1), ylim=(0, most))
        axes.locator_params(axis="y", nbins=4, integer=True)
        alt = f"Probability integral transform of {method}: {_count_unusual(bins, 'n', len(bins))}."
        yield Panel(method, figure, alt, tabulate(curves[method].pit), _describe_test(contents, method, "pit_ks"))


def draw_spread(contents: ReportContents) -> Iterator[Panel]:
    """Draw the root mean squared error against the predicted standard deviation, for the first outputs."""
    for output in range(min(OUTPUTS_DRAWN, contents.data.n_outputs or 1)):
        yield from _draw_spread_of(contents, output)


def draw_selection(contents: ReportContents) -> Iterator[Panel]:
    """Draw risk against coverage of all methods, with the interval and the oracle of the baseline."""
    base = contents.baseline
    curves = {m: read_columns(r.selection) for m, r in contents.methods.items() if r.selection}
    if base not in curves:
        return
    unit = contents.data.target_unit
    loss = "mean squared error" if contents.task == "regression" else "share of errors"
    label = f"{loss} (({unit})²)" if contents.task == "regression" and unit else loss
    figure, axes = start_figure(3.1, "coverage: share of samples kept", label, n_keys=len(curves) + 1)
    looks, own, lines = assign_looks(contents), curves[base], {}
    axes.fill_between(own["coverage"], own["low"], own["high"], **BAND | {"color": looks[base].color})
    for i, (method, points) in enumerate(curves.items()):
        style: dict[str, Any] = {"markersize": 4, "linewidth": 1.4, "markevery": (6 * i + 9, 25)}
        (lines[method],) = axes.plot(points["coverage"], points["risk"], **looks[method]._asdict(), **style)
    (lines[f"oracle of {base}"],) = axes.plot(own["coverage"], own["oracle"], **DASHED)
    add_key(axes, lines)
    highest = [points["risk"][points["coverage"] >= SETTLED].max() for points in curves.values()]
    highest.append(own["high"][own["coverage"] >= 0.5].fillna(0.0).max())
    axes.set(xlim=(0, 1), ylim=(0, 1.06 * max(highest) or 1.0))
    axes.locator_params(axis="y", nbins=5)
    half, whole = (format_number(_find_risk(own, coverage)) for coverage in (0.5, 1.0))
    shown = f"{base} {half} on the more certain half of the samples, {whole} on all"
    alt = f"Risk-coverage curves of {' and '.join(curves)}: {loss} of {shown}."
    columns = ["coverage", *curves, f"interval of {base} from", "to", f"oracle of {base}"]
    stored = contents.methods[base].selection
    rows = [
        [p.coverage, *(_find_risk(points, p.coverage) for points in curves.values()), p.low, p.high, p.oracle]
        for p in stored[:: -max(1, len(stored) // 20)][::-1]
    ]
    yield Panel("Risk against coverage", figure, alt, make_table(columns, rows))


def draw_scores(contents: ReportContents) -> dict[str, list[Panel]]:
    """Draw the histograms of the scores for each set out of distribution, at most `MAX_DRAWN` of them."""
    looks, left = assign_looks(contents), MAX_DRAWN
    panels: dict[str, list[Panel]] = {}
    units = SCORE_UNITS | dict.fromkeys(("standard_deviation", "function_std"), contents.data.target_unit or "")
    for set_name, one in contents.ood.items():
        drawn = [d for d in one.detections if d.score in DRAWN_SCORES][:left]
        left -= len(drawn)
        panels[set_name] = []
        for d in drawn:
            words = SCORES.get(d.score, d.score)
            label = _add_unit(words, units.get(d.score))
            figure, axes = start_figure(2.1, label, "share of the set", n_keys=2)
            (inside, outside), edges = _list_shares(d), _list_edges(read_columns(d.histogram))
            area = axes.stairs(inside, edges, fill=True, color=GREY, alpha=0.55)
            line = axes.stairs(outside, edges, color=looks[d.method].color, linewidth=1.6)
            add_key(axes, {"test set": area, set_name: line})
            highest = max(max(map(max, _list_shares(e))) for e in one.detections if e.score == d.score)
            axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.05 * highest))
            axes.locator_params(axis="both", nbins=4)
            auroc = show_metric("auroc", d.metrics["auroc"], 3)
            alt = f"Histograms of {words} of {d.method} on the test set and on {set_name}: AUROC {auroc}."
            panels[set_name].append(Panel(d.method, figure, alt, tabulate(d.histogram), f"{words}: AUROC {auroc}"))
    return panels


def _list_curves(contents: ReportContents) -> dict[str, RegressionCurves]:
    return {m: r.curves for m, r in contents.methods.items() if isinstance(r.curves, RegressionCurves)}


def _draw_forest(rows: Sequence[Comparison], looks: dict[str, Look]) -> Figure:
    """A group of rows per reference; a row is a method with its difference in words, and the interval below."""
    references = list(dict.fromkeys(c.baseline for c in rows))
    height = len(rows) * ROW + len(references) * HEADING
    figure, axes = start_figure(height + 0.5, "")
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
            difference = format_number(c.difference, choose_decimals([c.standard_error]), signed=True)
            axes.text(0.0, y + 0.3, f"{shorten(c.method, NAME_LENGTH)}: {difference}, {verdict}", **words)
            axes.plot([0, 0], [y + 0.04, y + 0.24], color=GREY, linewidth=1)  # zero, but not through the words
            if c.adjusted_low is not None and c.adjusted_high is not None:
                ends = [c.adjusted_low, c.adjusted_high]
                axes.plot(ends, [y + 0.14] * 2, color=looks[c.method].color, linewidth=1.8)
            face = "none" if verdict == "not detectable" else looks[c.method].color
            axes.plot([c.difference], [y + 0.14], **looks[c.method]._asdict(), markersize=6.5, markerfacecolor=face)
    # symmetric around zero, so that the direction is seen at once
    ends = [x for c in rows for x in (c.difference, c.adjusted_low, c.adjusted_high) if x is not None]
    half = 1.12 * max(map(abs, ends)) or 1.0
    axes.set(xlim=(-half, half), ylim=(0, height), yticks=[])
    axes.locator_params(axis="x", nbins=5)
    for x, text, side in ((0.0, "\u2190 better", "left"), (1.0, "worse \u2192", "right")):
        axes.text(x, -0.3 / height, text, fontsize=FONT_SIZE, va="top", ha=side, transform=axes.transAxes)
    return figure


def _draw_spread_of(contents: ReportContents, output: int) -> Iterator[Panel]:
    """The panels of one output, which share an axis."""
    unit, curves, is_only = contents.data.target_unit, _list_curves(contents), (contents.data.n_outputs or 1) == 1
    shown = {m: found for m, c in curves.items() if (found := [b for b in c.spread if b.output == output])}
    if not shown:
        return
    heights = ["observed", "consistent_low", "consistent_high", "low", "high"]
    values = pd.concat([read_columns(bins)[heights] for bins in shown.values()]).stack()
    space = 0.06 * (values.max() - values.min()) or 1.0
    for method, look in list_looks(contents, shown):
        bins, caption = read_columns(shown[method]), method if is_only else f"{method}, output {output}"
        label = _add_unit("predicted standard deviation", unit)
        figure, axes = start_figure(3.3, label, _add_unit("root mean squared error", unit))
        _draw_spread_bins(axes, bins, look)
        axes.set_ylim(max(0.0, values.min() - space), values.max() + space)
        axes.locator_params(nbins=5)
        counted = _count_unusual(bins, "observed", len(bins))
        alt = f"Errors by predicted standard deviation, {caption}: {counted}."
        table = tabulate(shown[method], without=("output",))
        yield Panel(caption, figure, alt, table, _describe_test(contents, method, "ence"))


def _draw_spread_bins(axes: Axes, bins: pd.DataFrame, look: Look) -> None:
    predicted = bins["predicted"]
    narrowest, widest = predicted.iloc[0], predicted.iloc[-1]
    # every panel has its own width: spreads that hardly differ would lie on each other beside those that do
    margin = max(0.08 * (widest - narrowest), (0.01 if len(bins) > 1 else 0.06) * widest)
    horizontal = max(0.0, narrowest - margin), widest + margin
    axes.plot(horizontal, horizontal, **DASHED)
    if len(bins) > 1:
        axes.fill_between(predicted, bins["consistent_low"], bins["consistent_high"], **BAND)
    else:
        axes.vlines(predicted, bins["consistent_low"], bins["consistent_high"], **BAND | {"linewidth": 12})
    axes.vlines(predicted, bins["low"], bins["high"], color=look.color, linewidth=1.2)
    axes.plot(predicted, bins["observed"], **look._asdict(), markersize=4.5, linestyle="none")
    axes.set_xlim(horizontal)


def _list_edges(bins: pd.DataFrame) -> list[float]:
    return [*bins["left"], bins["right"].iloc[-1]]


def _list_shares(d: Detection) -> tuple[list[float], list[float]]:
    """Share of either set in each bin."""
    inside, outside = [b.n_in_distribution for b in d.histogram], [b.n_out_of_distribution for b in d.histogram]
    return [n / max(1, sum(inside)) for n in inside], [n / max(1, sum(outside)) for n in outside]


def _find_risk(points: pd.DataFrame, coverage: float) -> float:
    """The risk at the nearest coverage."""
    return points["risk"][(points["coverage"] - coverage).abs().idxmin()]


def _count_unusual(bins: pd.DataFrame, column: str, n_bins: int) -> str:
    """How many bins have a value that a right predictive would rarely give."""
    usual = bins[column].between(bins["consistent_low"], bins["consistent_high"])
    return f"{(~usual).sum()} of {n_bins} bins outside the usual range"


def _describe_test(contents: ReportContents, method: str, metric: str) -> str:
    """The p-value of a metric, or why there is none; empty for several outputs, since it is about all of them."""
    estimate = contents.methods[method].metrics.get(f"{metric}_p_value")
    if estimate is None or (contents.data.n_outputs or 1) > 1:
        return ""
    return estimate.reason or "" if estimate.value is None else format_p_value(estimate.value).replace(" ", NO_BREAK)


def _add_unit(what: str, unit: str | None) -> str:
    return f"{what} ({unit})" if unit else what


def draw_inflation(contents: ReportContents) -> Iterator[Panel]:
    """Draw how inflated the curvature of a single batch is, for each posterior that has held-out curvatures."""
    shown = {name: [d for d in s.directions if d.inflation] for name, s in contents.posteriors.items()}
    shown = {name: directions for name, directions in shown.items() if directions}
    every = [d for directions in shown.values() for d in directions]
    ratios = [x for d in every for x in (d.inflation, d.inflation_low, d.inflation_high) if x]
    widest = 1.15 * min(WIDEST, max([1.5, *(max(x, 1 / x) for x in ratios)]))
    for posterior, look in list_looks(contents, shown):
        directions, table = shown[posterior], tabulate(shown[posterior])
        for column in ("inflation", "inflation_low", "inflation_high"):
            table[column.replace("_", ", ")] = pd.Series([getattr(d, column) for d in directions], dtype=object)
        figure, axes = start_figure(2.5, "direction, by decreasing curvature")
        _scale_logarithmically(axes, max(d.place for d in every), (1 / widest, widest), base=2)
        axes.axhline(1.0, **DASHED)
        place, ratio, edge = read_columns(directions)["place"], table["inflation"].astype(float), widest / 1.06
        ends = [table[f"inflation, {end}"].astype(float) for end in ("low", "high")]
        barred = table["interval from"].notna()
        low, high = ends[0].fillna(1 / widest)[barred], ends[1].fillna(widest)[barred]
        axes.vlines(place[barred], low, high, color=look.color, linewidth=1.2)
        at = ratio.clip(1 / edge, edge)
        draw_markers(axes, place, at, look, is_hollow=at != ratio, size=4.5)
        first = format_number(directions[0].inflation)
        alt = f"Curvature of a single batch over the full batch's, {posterior}: {first} along the first direction."
        yield Panel(posterior, figure, alt, table)


def draw_spectrum(contents: ReportContents) -> Iterator[Panel]:
    """Draw the precisions that the data give beside the prior's, for each posterior whose spectrum is known."""
    shown = {name: s for name, s in contents.posteriors.items() if s.spectrum}
    points = [p for s in shown.values() for p in s.spectrum]
    values = [p.precision for p in points]
    priors = [x for s in shown.values() for x in s.prior_precision if x > 0]
    # far below the prior nothing depends on the data
    lowest = max([min(values, default=1.0), *([min(priors) / FAR_BELOW] if priors else [])])
    for posterior, look in list_looks(contents, shown):
        spectrum, (low, high) = shown[posterior].spectrum, shown[posterior].prior_precision
        figure, axes = start_figure(2.5, "place of the value")
        limits = lowest / 1.6, 1.6 * max(values + priors)
        _scale_logarithmically(axes, max(p.place for p in points), limits, base=10)
        axes.axhspan(low, high, **BAND)
        axes.axhline(low, **DASHED)
        axes.plot([p.place for p in spectrum], [p.precision for p in spectrum], color=look.color, linewidth=1.8)
        above = max((p.place for p in spectrum if p.precision > low), default=0)
        alt = (
            f"Precisions that the data give {posterior}: the prior precision is {format_number(low)}, and the values "
            f"are above it up to about place {above}."
        )
        rows = [[p.place, p.precision] for p in spectrum[:: max(1, len(spectrum) // 20)]]
        yield Panel(posterior, figure, alt, make_table(["place", "precision from the data"], rows))


def _scale_logarithmically(axes: Axes, most: int, limits: tuple[float, float], *, base: int) -> None:
    """Give both axes a logarithmic scale with plain numbers."""
    axes.set_xscale("log")
    axes.set_yscale("log", base=base)
    axes.set(xlim=(0.8, max(most, 2) * 1.25), ylim=limits)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(base=base, numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.5g}" if 1e-3 <= y < 1e6 else f"{y:.0e}"))
    axes.minorticks_off()
