"""Panels of selective prediction and of out-of-distribution detection."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from debiased_laplace.calibration.contents import ReportTable
from debiased_laplace.calibration.metrics.out_of_distribution import SCORES, Detection, ScoreBin
from debiased_laplace.calibration.metrics.selective import RiskPoint, SelectionCurves
from debiased_laplace.calibration.rendering.formatting import format_number, shorten
from debiased_laplace.calibration.rendering.panels import (
    BAND_ALPHA,
    FONT_SIZE,
    GREY,
    LABEL_X,
    LABEL_Y,
    PANEL_WIDTH,
    Look,
    Panel,
    add_axes,
    finish,
    new_figure,
    with_unit,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEY_HEIGHT = 0.17  # inches per line of a key
NAME_LENGTH = 38
TABLE_ROWS = 20
SETTLED = 0.05  # coverage below which a risk rests on so few samples that it does not set the scale


def draw_selection(curves: dict[str, SelectionCurves], looks: dict[str, Look], *, baseline: str, unit: str) -> Panel:
    """Risk against coverage of all methods, with the interval and the oracle of the baseline.

    Args:
        curves: method to its curves.
        looks: of every method.
        baseline: whose interval and oracle are drawn.
        unit: of the risk; empty for shares.
    """
    rows, base = len(curves), curves[baseline].points
    most = max(p.risk for c in curves.values() for p in c.points if p.coverage >= SETTLED)
    most = 1.06 * max(most, *(p.high or 0.0 for p in base if p.coverage >= 0.5)) or 1.0
    figure = new_figure(height=3.05 + KEY_HEIGHT * (rows + 1))
    axes = add_axes(figure, bottom=0.42, top=2.95)
    band = [p for p in base if p.low is not None and p.high is not None]
    if band:
        ends = ([p.low or 0.0 for p in band], [p.high or 0.0 for p in band])
        colour = looks[baseline].colour
        axes.fill_between([p.coverage for p in band], *ends, color=colour, alpha=BAND_ALPHA, linewidth=0)
    dashed: dict[str, Any] = {"color": GREY, "linestyle": (0, (4, 3)), "linewidth": 1.2}
    axes.plot(*_lines(base, "oracle"), **dashed)
    texts = {LABEL_Y: with_unit(curves[baseline].loss, unit), "oracle": shorten(f"oracle of {baseline}", NAME_LENGTH)}
    for i, (method, c) in enumerate(curves.items()):
        look = looks[method]
        style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "markersize": 4}
        axes.plot(*_lines(c.points, "risk"), linewidth=1.4, markevery=(6 * i + 9, 25), **style)
        texts[f"method {i}"] = shorten(method, NAME_LENGTH)
        _add_key(figure, f"method {i}", line=rows - i, linewidth=1.4, **style)
    _add_key(figure, "oracle", line=0, **dashed)
    axes.set(xlim=(0, 1), ylim=(0, most))
    axes.locator_params(axis="y", nbins=5)
    axes.set_xlabel("coverage: share of samples kept", fontsize=FONT_SIZE)
    axes.set_ylabel(LABEL_Y, fontsize=FONT_SIZE)
    return finish(
        figure,
        name="selection",
        caption="Risk against coverage",
        alt=_describe_selection(curves, baseline),
        table=_tabulate_selection(curves, baseline),
        texts=texts,
    )


def draw_scores(
    detections: Sequence[Detection], looks: dict[str, Look], *, set_name: str, index: int, units: Mapping[str, str]
) -> list[Panel]:
    """One pair of histograms per method and score; those of one score share their axes.

    Args:
        detections: what is drawn.
        looks: of every method.
        set_name: name of the set.
        index: its number, for ids.
        units: of the scores that have one.
    """
    most: dict[str, float] = {}
    for d in detections:
        most[d.score] = max(most.get(d.score, 0.0), *(x for group in _share(d.histogram) for x in group))
    return [
        _draw_one_histogram(
            d,
            looks[d.method],
            set_name,
            most[d.score],
            name=f"ood-{index}-{i}",
            label=with_unit(SCORES[d.score], units.get(d.score, "")),
        )
        for i, d in enumerate(detections)
    ]


def _describe_selection(curves: dict[str, SelectionCurves], baseline: str) -> str:
    at = {m: _nearest(c.points, 0.5) for m, c in curves.items()}
    oracle = format_number(at[baseline].oracle)
    return (
        f"Risk-coverage curves: {curves[baseline].loss} on the more certain half of the samples "
        + ", ".join(f"{m} {format_number(p.risk)}" for m, p in at.items())
        + f", oracle of {baseline} {oracle}; on all of them "
        + ", ".join(f"{m} {format_number(c.points[-1].risk)}" for m, c in curves.items())
        + "."
    )


def _tabulate_selection(curves: dict[str, SelectionCurves], baseline: str) -> ReportTable:
    rows = [
        [p.coverage, *(_nearest(c.points, p.coverage).risk for c in curves.values()), p.low, p.high, p.oracle]
        for p in _thin(curves[baseline].points)
    ]
    of = f"of {baseline}"
    columns = ["coverage", *curves, f"interval {of} from", "to", f"oracle {of}"]
    return ReportTable("Risk against coverage", columns, rows)


def _draw_one_histogram(
    detection: Detection, look: Look, set_name: str, most: float, *, name: str, label: str
) -> Panel:
    figure = new_figure(height=2.05 + 2 * KEY_HEIGHT)
    axes = add_axes(figure, bottom=0.42, top=1.95)
    bins = detection.histogram
    edges = [bins[0].left, *(b.right for b in bins)]
    inside, outside = _share(bins)
    axes.stairs(inside, edges, fill=True, color=GREY, alpha=0.55)
    axes.stairs(outside, edges, color=look.colour, linewidth=1.6)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.05 * most))
    axes.locator_params(axis="both", nbins=4)
    axes.set_xlabel(LABEL_X, fontsize=FONT_SIZE)
    axes.set_ylabel("share of the set", fontsize=FONT_SIZE)
    _add_key(figure, "test set", line=1, color=GREY, alpha=0.55, linewidth=5)
    _add_key(figure, "set name", line=0, color=look.colour, linewidth=1.6)
    auroc = detection.metrics["auroc"]
    caption = f"{detection.method}, {SCORES[detection.score]}"
    alt = (
        f"Histograms of {SCORES[detection.score]} of {detection.method}: test set around {_centre(inside, bins)}, "
        f"{set_name} around {_centre(outside, bins)}; AUROC {format_number(auroc.value)}."
    )
    rows = [[b.left, b.right, b.n_inside, b.n_outside] for b in bins]
    table = ReportTable(f"{set_name}: {caption}", ["score from", "to", "test set", set_name], rows)
    return finish(
        figure, name=name, caption=detection.method, alt=alt, table=table,
        texts={"set name": shorten(set_name, NAME_LENGTH), LABEL_X: label},
    )  # fmt: skip


def _add_key(figure: "Figure", text: str, *, line: int, **style: Any) -> None:
    """A line of a key above the axes, the lowest being line 0."""
    from matplotlib.lines import Line2D

    top = next(iter(figure.axes)).get_position().y1
    y, left = top + (0.12 + KEY_HEIGHT * line) / figure.get_figheight(), 0.14
    figure.add_artist(Line2D([left, left + 0.25 / PANEL_WIDTH], [y, y], **style))
    figure.text(left + 0.33 / PANEL_WIDTH, y, text, fontsize=FONT_SIZE, va="center")


def _lines(points: tuple[RiskPoint, ...], y: Literal["risk", "oracle"]) -> tuple[list[float], list[float]]:
    return [p.coverage for p in points], [getattr(p, y) for p in points]


def _thin(points: tuple[RiskPoint, ...]) -> list[RiskPoint]:
    """A few points for a table, the last one among them."""
    step = max(1, len(points) // TABLE_ROWS)
    return list(points[::-1][::step][::-1])


def _nearest(points: tuple[RiskPoint, ...], coverage: float) -> RiskPoint:
    return min(points, key=lambda p: abs(p.coverage - coverage))


def _share(bins: tuple[ScoreBin, ...]) -> tuple[list[float], list[float]]:
    """Each bin's share of either set."""
    inside, outside = [b.n_inside for b in bins], [b.n_outside for b in bins]
    return [n / sum(inside) for n in inside], [n / sum(outside) for n in outside]


def _centre(shares: list[float], bins: tuple[ScoreBin, ...]) -> str:
    """About where a histogram sits."""
    return format_number(sum(s * (b.left + b.right) / 2 for s, b in zip(shares, bins, strict=True)), 2)
