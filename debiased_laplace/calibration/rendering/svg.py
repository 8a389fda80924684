"""SVG that can stand inside a page: no scripts, no ids in common, legible on light and dark."""

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from debiased_laplace.calibration.rendering.svg_compaction import compact

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATPLOTLIB_STYLE = "*{stroke-linejoin: round; stroke-linecap: butt}"  # the page says it once for all
REFUSED_ELEMENTS = {"script", "foreignobject", "iframe", "object", "embed", "a", "set", "animate"}
BLACK = re.compile(r"#000000\b|#000\b|(?<![\w-])black(?![\w-])")
FONT_FAMILY = re.compile(r"font-family:[^;]*;?\s*")  # the page has one font
REMOTE_URL = re.compile(r"url\(\s*['\"]?(?![\s'\"#])", re.IGNORECASE)
COORDINATES = re.compile(r'\s(?:d|x|y)="[^"]*"')
LONG_NUMBER = re.compile(r"(\d\.\d\d)\d+")  # a hundredth of a point is invisible
NO_ROTATION = re.compile(r' transform="rotate\(-?0 [^"]*"')
INTERNAL = re.compile(r"^#(.+)$|url\(\s*['\"]?#([^'\")]+)")
LENGTH = re.compile(r"([0-9.]+)\s*(pt|px)?")


def draw_svg(figure: "Figure") -> str:
    """The figure as SVG text with real text in it, the same bytes whenever it is drawn."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "debiased_laplace"}):
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    svg = NO_ROTATION.sub("", buffer.getvalue())
    return COORDINATES.sub(lambda m: LONG_NUMBER.sub(r"\1", re.sub(" +", " ", m[0])), svg)


def adopt_svg(
    svg: str, *, name: str, alt: str, texts: Mapping[str, str] | None = None, merge_paths: bool = False
) -> str:
    """One `<svg>` element for the inside of an HTML page.

    Args:
        svg: an SVG document.
        name: prefix of its ids, different for every figure of a page.
        alt: text alternative.
        texts: text elements to replace, by their present text.
        merge_paths: neighbouring paths of one look may become one, because they do not overlap.

    Raises:
        ValueError: if it is not SVG, or holds scripts, style sheets or references to other files.
    """
    if "<!ENTITY" in svg:
        raise ValueError("A figure's SVG must not declare entities.")
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ValueError(f"A figure's SVG must be well-formed XML; got {error}.") from error
    if _local(root.tag) != "svg":
        raise ValueError(f"A figure must be an <svg> element; got <{_local(root.tag)}>.")
    for parent in root.iter():
        for child in list(parent):
            if not isinstance(child.tag, str) or _is_dropped(child):
                parent.remove(child)
    used = [
        i for e in root.iter() for value in e.attrib.values() for m in INTERNAL.finditer(value) for i in m.groups() if i
    ]
    ids = {value: f"{name}-{k}" for k, value in enumerate(dict.fromkeys(used))}
    for element in root.iter():
        _clean(element, ids)
        _retext(element, texts or {})
    compact(root, merge_paths=merge_paths)
    _frame(root, name, alt)
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """A tag or attribute name without its namespace, which HTML does not have."""
    return name.rsplit("}", 1)[-1]


def _is_dropped(element: ElementTree.Element) -> bool:
    tag = _local(element.tag)
    if tag == "style":
        if (element.text or "").strip() != MATPLOTLIB_STYLE:
            raise ValueError("A figure's style sheet would apply to the whole page; write styles as attributes.")
        return True
    return tag in ("metadata", "title")


def _clean(element: ElementTree.Element, ids: Mapping[str, str]) -> None:
    """Strip namespaces, rename the ids in use, turn black into the text colour, refuse what loads or runs."""
    element.tag = _local(element.tag)
    if element.tag.lower() in REFUSED_ELEMENTS:
        raise ValueError(f"A figure's SVG must not contain <{element.tag}>.")
    attributes = {_local(key): value for key, value in element.attrib.items()}
    element.attrib.clear()
    for key, value in attributes.items():
        if key.lower().startswith("on") or "javascript:" in value.lower():
            raise ValueError(f"A figure's SVG must not contain scripts; got the attribute {key!r}.")
        if key == "href" and not value.startswith(("#", "data:image/")):
            raise ValueError(f"A figure must not refer to other files; got {value[:80]!r}.")
        if REMOTE_URL.search(value):
            raise ValueError(f"A figure must not refer to other files; got {value[:80]!r}.")
        if key == "id":
            if value not in ids:
                continue  # no script and no style sheet can ask for it
            value = ids[value]
        elif key == "href" and value.startswith("#"):
            value = f"#{ids[value[1:]]}"
        elif key in ("style", "fill", "stroke"):
            value = FONT_FAMILY.sub("", BLACK.sub("currentColor", value))
        element.set(key, re.sub(r"(url\(['\"]?#)([^'\")]+)", lambda m: m[1] + ids[m[2]], value))


def _retext(element: ElementTree.Element, texts: Mapping[str, str]) -> None:
    """Replace placeholders, and drop the indentation between elements."""
    if not (element.tail or "").strip():
        element.tail = None
    words = (element.text or "").strip()
    if not words:
        element.text = None
    elif words in texts:
        element.text = texts[words]


def _frame(root: ElementTree.Element, name: str, alt: str) -> None:
    """Let the figure scale with the page, up to its own size, and say what it shows."""
    sizes = [LENGTH.fullmatch(root.attrib.pop(key, "")) for key in ("width", "height")]
    pixels = [float(s[1]) * (4 / 3 if s[2] == "pt" else 1) for s in sizes if s is not None]
    if "viewBox" not in root.attrib:
        if len(pixels) != 2:
            raise ValueError("A figure's <svg> needs a viewBox, or a width and a height.")
        root.set("viewBox", "0 0 " + " ".join(f"{float(s[1]):g}" for s in sizes if s is not None))
    width = pixels[0] if sizes[0] is not None else float(root.attrib["viewBox"].split()[2])
    root.set("id", name)
    root.set("class", "figure")
    root.set("style", f"max-width: {width:.0f}px")
    root.set("fill", "currentColor")
    root.set("role", "img")
    root.set("aria-label", alt)
