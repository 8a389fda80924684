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
