"""Matplotlib figures as SVG text that is legible on light and dark pages."""

import io
import re
import warnings
from html import escape
from typing import TYPE_CHECKING

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
REFERENCE = re.compile(r'(url\(#|href="#)([^)"]+)')
FONT_FAMILY = re.compile(r"font-family:[^;\"]*;?\s*")
NO_ROTATION = re.compile(r' transform="rotate\(-?0 [^"]*"')


def draw_svg(figure: "Figure") -> str:
    """Return a figure as an SVG document: real text, black as the page's text colour, the same bytes every time."""
    import matplotlib

    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    plain = matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "debiased_laplace"})
    with plain, warnings.catch_warnings():
        # a font of the reader's draws the text, so that matplotlib's own needs no glyphs
        warnings.filterwarnings("ignore", message="Glyph .* missing|Matplotlib currently does not support")
        figure.savefig(buffer, format="svg", metadata=metadata, transparent=True)
    svg = COMMENT_OR_STYLE.sub("", buffer.getvalue())
    svg = TAG.sub(lambda tag: _adapt_tag(tag[0]), svg)
    svg = re.sub(r"<svg [^>]*>", lambda root: root[0].replace("<svg ", ROOT, 1) + STYLE, svg, count=1)
    return re.sub(r">\s+<", "><", svg)


def inline_svg(svg: str, *, name: str, alt: str) -> str:
    """Return a figure of `draw_svg` as one element of an HTML page; `name` is the prefix of its ids, one per figure."""
    head, _, body = svg.partition(STYLE)
    x, y, width, height = re.findall(r'viewBox="([^"]*)"', head)[0].split()
    used = {reference[2] for tag in TAG.findall(body) for reference in REFERENCE.finditer(tag)}

    def rename(tag: re.Match[str]) -> str:
        text = FONT_FAMILY.sub("", REFERENCE.sub(rf"\g<1>{name}-\g<2>", tag[0]))
        return re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)

    attributes = f'role="img" aria-label="{escape(alt)}" viewBox="{x} {y} {width} {height}" id="{name}"'
    size = f'style="max-width:{float(width) * 4 / 3:.0f}px"'  # points to pixels
    return f"{ROOT.replace('laplace-figure', 'figure')}{attributes} {size}>{TAG.sub(rename, body)}"


def _adapt_tag(tag: str) -> str:
    """Round coordinates and replace the colours that a dark page hides."""
    tag = COORDINATES.sub(lambda m: NUMBER.sub(lambda x: f"{float(x[0]):.2f}", re.sub(r"\s+", " ", m[0])), tag)
    tag = NO_ROTATION.sub("", tag)
    # the translucent white box is the frame of a legend
    return tag.replace("#000000", "currentColor").replace("fill: #ffffff; opacity: 0.8", "fill: none")
