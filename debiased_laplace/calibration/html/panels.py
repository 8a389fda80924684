"""What all figures of the page share: size, axes, colours, and how a figure becomes a panel."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, NamedTuple

import pandas as pd
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from debiased_laplace.calibration.contents import ReportContents
from debiased_laplace.calibration.formatting import shorten
from debiased_laplace.calibration.svg import draw_svg, inline_svg
from debiased_laplace.calibration.tables import make_table

# Okabe and Ito's palette without its black and its yellow, which vanish on one of the two pages
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#808080"  # legible on white and on the dark page
BAND: dict[str, Any] = {"color": GREY, "alpha": 0.28, "linewidth": 0}
DASHED: dict[str, Any] = {"color": GREY, "linestyle": (0, (4, 3)), "linewidth": 1}
FONT_SIZE = 8.0
WIDTH = 3.3  # inches; 317 px on the page, one column of a phone
KEY_HEIGHT = 0.16  # inches per line of a key
KEY_LENGTH = 38  # characters per line of a key
HEADINGS = {
    "left": "from",
    "right": "to",
    "n": "samples",
    "n_correct": "correct",
    "confidence": "mean confidence",
    "low": "interval from",
    "high": "to",
    "consistent_low": "usual from",
    "consistent_high": "to",
    "n_in_distribution": "test set",
    "n_out_of_distribution": "out of distribution",
    "mean": "predicted mean",
    "baseline": "compared with",
    "p_value": "p",
    "adjusted_p_value": "p, Holm",
    "place": "direction",
    "in_sample": "single batch",
    "curvature": "full batch, estimated",
}


@dataclass(frozen=True)
class Panel:
    """A heading with a remark below it, a figure as an element of the page, and the same numbers as a table."""

    caption: str
    svg: Markup
    table: pd.DataFrame
    aside: str = ""


class Look(NamedTuple):
    """Colour and marker of one method, the same in every panel."""

    color: str
    marker: str


def assign_looks(contents: ReportContents) -> dict[str, Look]:
    """Return the look of every method and posterior; a posterior looks like the method of the same name."""
    names = dict.fromkeys([*contents.methods, *contents.posteriors])
    return {name: Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def start_figure(height: float) -> tuple[Figure, Axes]:
    """Return a figure of the common width, and axes above a margin for their labels."""
    figure = Figure(figsize=(WIDTH, height))
    return figure, add_axes(figure, bottom=0.42, top=height - 0.1)


def add_axes(figure: Figure, *, bottom: float, top: float) -> Axes:
    """Add plain axes between two heights of the figure, given in inches from below."""
    height = figure.get_figheight()
    axes = figure.add_axes((0.165, bottom / height, 0.79, (top - bottom) / height))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT_SIZE)
    return axes


def label_axes(axes: Axes, x: str, y: str = "") -> None:
    """Name the axes; names and units of the user's hold no mathematics."""
    axes.set_xlabel(x, fontsize=FONT_SIZE, parse_math=False)
    axes.set_ylabel(y, fontsize=FONT_SIZE, parse_math=False)


def add_key(axes: Axes, lines: Mapping[str, Artist]) -> None:
    """Put a key above the axes, one line for each entry."""
    legend = axes.legend(
        list(lines.values()), ["name"] * len(lines), loc="lower left", bbox_to_anchor=(-0.05, 1.0), frameon=False,
        fontsize=FONT_SIZE, handlelength=1.8, labelspacing=0.3,
    )  # fmt: skip
    for text, name in zip(legend.get_texts(), lines, strict=True):
        text.set_parse_math(False)
        text.set_text(shorten(name, KEY_LENGTH))


def with_unit(what: str, unit: str | None) -> str:
    """Return the label of an axis."""
    return f"{what} ({unit})" if unit else what


def tabulate(rows: Sequence[Any], *, without: Sequence[str] = ()) -> pd.DataFrame:
    """Return a table with one row per object of a dataclass, and its fields as columns."""
    names = [f.name for f in fields(rows[0])] if rows else []
    kept = [j for j, name in enumerate(names) if name not in without]
    columns = [HEADINGS.get(names[j], names[j].replace("_", " ")) for j in kept]
    return make_table(columns, ([astuple(row)[j] for j in kept] for row in rows))


def finish(figure: Figure, name: str, caption: str, alt: str, table: pd.DataFrame, aside: str = "") -> Panel:
    """Return the figure as a panel; `name` is the prefix of its ids."""
    return Panel(caption, Markup(inline_svg(draw_svg(figure), name=name, alt=alt)), table, aside)


def draw_each(
    contents: ReportContents, names: Iterable[str], kind: str, draw: Callable[[str, Look, str], Panel]
) -> list[Panel]:
    """Draw one panel for each method or posterior, given its name, its look and the prefix of its ids."""
    looks = assign_looks(contents)
    return [draw(name, looks[name], f"{kind}-{i}") for i, name in enumerate(names)]
