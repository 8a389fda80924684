"""What all panels of a report share: size, axes, colours, and how a panel becomes SVG."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from debiased_laplace.calibration.contents import ReportTable
from debiased_laplace.calibration.rendering.svg import adopt_svg, draw_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its black and its yellow, which vanish on one of the two pages
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#808080"  # legible on white and on the dark page
BAND_ALPHA = 0.28
FONT_SIZE = 8.0
PANEL_WIDTH = 3.3  # inches; 317 px on the page, one column of a phone
# names and units enter after drawing: matplotlib would read dollar signs and miss other scripts
LABEL_X, LABEL_Y = "label x", "label y"


@dataclass(frozen=True)
class Panel:
    """A drawn panel.

    Attributes:
        caption: heading of the panel, plain text.
        svg: an element for the page.
        table: the same numbers as a table.
    """

    caption: str
    svg: str
    table: ReportTable


@dataclass(frozen=True)
class Look:
    """Colour and marker of one method, the same in every panel."""

    colour: str
    marker: str


def assign_looks(methods: list[str]) -> dict[str, Look]:
    """Colours and marker shapes in the order of the methods; the pair repeats after 42."""
    return {method: Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, method in enumerate(methods)}


def new_figure(height: float) -> "Figure":
    """An empty figure of the common width that no window system knows about."""
    from matplotlib.figure import Figure

    return Figure(figsize=(PANEL_WIDTH, height))


def add_axes(figure: "Figure", *, bottom: float, top: float) -> "Axes":
    """Plain axes between two heights of the figure, given in inches from below."""
    height = figure.get_figheight()
    axes = figure.add_axes((0.165, bottom / height, 0.805, (top - bottom) / height))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT_SIZE)
    return axes


def new_rows(height: float) -> tuple["Figure", "Axes"]:
    """A figure with `height` inches of rows as wide as the panel, measured from below, above the axis they share."""
    figure = new_figure(height=height + 0.5)
    axes = add_axes(figure, bottom=0.45, top=height + 0.45)
    axes.set_position((0.03, axes.get_position().y0, 0.94, axes.get_position().height))
    axes.spines["left"].set_visible(False)
    axes.set(ylim=(0, height), yticks=[])
    return figure, axes


def write_row(axes: "Axes", texts: dict[str, str], y: float, words: str, *, weight: str = "normal") -> None:
    """A line of text in a row: a placeholder, and in `texts` the words that replace it."""
    placeholder = f"row {len(texts)}"
    texts[placeholder] = words
    axes.text(0.0, y, placeholder, fontsize=FONT_SIZE, weight=weight, transform=axes.get_yaxis_transform())


def with_unit(what: str, unit: str) -> str:
    """The label of an axis."""
    return f"{what} ({unit})" if unit else what


def finish(
    figure: "Figure",
    *,
    name: str,
    caption: str,
    alt: str,
    table: ReportTable,
    texts: Mapping[str, str] | None = None,
) -> Panel:
    """Draw the panel; `name` prefixes its ids, `texts` replaces placeholders by real names."""
    return Panel(caption, adopt_svg(draw_svg(figure), name=name, alt=alt, texts=texts, merge_paths=True), table)
