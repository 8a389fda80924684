"""Matplotlib figures as SVG that is legible on light and dark pages."""

import io
import re
import warnings
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = '<svg class="laplace-figure" fill="currentColor" stroke-linejoin="round" stroke-linecap="butt" '
STYLE = (
    "<style>.laplace-figure{color:#1d2126}@media (prefers-color-scheme: dark){.laplace-figure{color:#e6e9ed}}</style>"
)
COMMENT_OR_STYLE = re.compile(r"<!--.*?-->\s*|<defs>\s*<style[^>]*>.*?</style>\s*</defs>\s*", re.DOTALL)
TAG = re.compile(r"<[^>]+>")  # matplotlib escapes ">" in texts and attributes
COORDINATES = re.compile(r'\s(?:d|x|y)="[^"]*"')
NUMBER = re.compile(r"-?\d+\.\d{3,}(?!\d*e)")


def draw_svg(figure: "Figure", *, salt: str = "debiased_laplace") -> str:
    """Return a figure as an SVG document, the same bytes every time, whose black parts follow the colour scheme.

    Args:
        figure: what to draw.
        salt: of the ids inside the figure; figures of other salts share none of those that are referred to.
    """
    import matplotlib

    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    plain = matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt})
    with plain, warnings.catch_warnings():
        # a font of the reader's draws the text, so that matplotlib's own needs no glyphs
        warnings.filterwarnings("ignore", message="Glyph .* missing|Matplotlib currently does not support")
        figure.savefig(buffer, format="svg", metadata=metadata, transparent=True)
    svg = TAG.sub(lambda tag: _adapt_tag(tag[0]), COMMENT_OR_STYLE.sub("", buffer.getvalue()))
    svg = re.sub(r"<svg [^>]*>", lambda root: root[0].replace("<svg ", ROOT, 1) + STYLE, svg, count=1)
    return re.sub(r">\s+<", "><", svg)


def inline_svg(figure: "Figure", *, name: str, alt: str) -> Markup:
    """Return a figure as an element of an HTML page, with an id that is unique in the page and a text alternative."""
    head, _, body = draw_svg(figure, salt=name).partition(STYLE)
    view_box = re.findall(r'viewBox="([^"]*)"', head)[0]
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))
    body = TAG.sub(lambda tag: re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", tag[0]), body)
    attributes = f'role="img" aria-label="{escape(alt)}" viewBox="{view_box}" id="{name}"'
    size = f'style="max-width:{float(view_box.split()[2]) * 4 / 3:.0f}px"'  # points to pixels
    return Markup(f"{ROOT.replace('laplace-figure', 'figure')}{attributes} {size}>{body}")


def _adapt_tag(tag: str) -> str:
    """Round coordinates to hundredths, and replace the colours that a dark page hides."""
    tag = COORDINATES.sub(lambda m: NUMBER.sub(lambda x: f"{float(x[0]):.2f}", re.sub(r"\s+", " ", m[0])), tag)
    # the translucent white box is the frame of a legend
    return tag.replace("#000000", "currentColor").replace("fill: #ffffff; opacity: 0.8", "fill: none")
