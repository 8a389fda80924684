"""Panels of the page, and what their figures share: size, axes, colours and markers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from debiased_laplace.calibration.contents import ReportContents
from debiased_laplace.calibration.formatting import shorten

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
    "baseline": "compared with",
    "p_value": "p",
    "adjusted_p_value": "p, Holm",
    "adjusted_low": "interval from",
    "adjusted_high": "to",
    "adjusted_level": "level of the interval",
    "place": "direction",
    "in_sample": "single batch",
    "curvature": "full batch, estimated",
}


@dataclass(frozen=True)
class Panel:
    """A figure with its heading, its text alternative, the same numbers as a table, and a remark below the heading."""

    caption: str
    figure: Figure
    alt: str
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


def list_looks(contents: ReportContents, names: Iterable[str]) -> list[tuple[str, Look]]:
    """Return some methods or posteriors with their looks."""
    looks = assign_looks(contents)
    return [(name, looks[name]) for name in names]


def start_figure(height: float, x: str, y: str = "", *, n_keys: int = 0) -> tuple[Figure, Axes]:
    """Return a figure of the common width and its axes.

    Args:
        height: in inches, without the key.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        n_keys: lines of the key above the axes.
    """
    figure = Figure(figsize=(WIDTH, height + n_keys * KEY_HEIGHT))
    return figure, add_axes(figure, 0.42, height - (0.15 if n_keys else 0.1), x, y)


def add_axes(figure: Figure, bottom: float, top: float, x: str, y: str) -> Axes:
    """Add labelled axes between two heights of a figure, given in inches from below."""
    height = figure.get_figheight()
    axes = figure.add_axes((0.165, bottom / height, 0.79, (top - bottom) / height))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT_SIZE)
    # names and units of the user's hold no mathematics
    axes.set_xlabel(x, fontsize=FONT_SIZE, parse_math=False)
    axes.set_ylabel(y, fontsize=FONT_SIZE, parse_math=False)
    return axes


def add_key(axes: Axes, lines: Mapping[str, Artist]) -> None:
    """Put a key above the axes, one line for each entry."""
    legend = axes.legend(
        list(lines.values()), ["name"] * len(lines), loc="lower left", bbox_to_anchor=(-0.05, 1.0), frameon=False,
        fontsize=FONT_SIZE, handlelength=1.8, labelspacing=0.3,
    )  # fmt: skip
    for text, name in zip(legend.get_texts(), lines, strict=True):
        text.set_parse_math(False)
        text.set_text(shorten(name, KEY_LENGTH))


def draw_markers(axes: Axes, x: pd.Series, y: pd.Series, look: Look, *, is_hollow: pd.Series, size: float) -> None:
    """Draw the markers of a method, those of `is_hollow` as outlines."""
    for face, shown in ((look.color, ~is_hollow), ("none", is_hollow)):
        style: dict[str, Any] = {"linestyle": "none", "markersize": size, "markerfacecolor": face, "clip_on": False}
        axes.plot(x[shown], y[shown], **look._asdict(), **style)


def read_columns(rows: Sequence[Any]) -> pd.DataFrame:
    """Return the numeric fields of bins or points as columns, NaN where a number is missing."""
    return pd.DataFrame(list(rows)).astype(float)


def tabulate(rows: Sequence[Any], *, without: Sequence[str] = ()) -> pd.DataFrame:
    """Return a table for readers with one row per object of a dataclass, and its fields as columns."""
    table = pd.DataFrame(list(rows), dtype=object).drop(columns=list(without))
    return table.rename(columns=lambda name: HEADINGS.get(name, name.replace("_", " ")))
