"""Smaller SVG that looks the same: what drawing libraries write is mostly groups of one and spaces."""

import re
from xml.etree import ElementTree

SPACES_IN_PATH = re.compile(r"\s*([A-Za-z])\s*")
SPACES_IN_STYLE = re.compile(r"([:;])\s+")
INVISIBLE = re.compile(r"\s*fill:\s*none;?\s*")


def compact(root: ElementTree.Element, *, merge_paths: bool) -> None:
    """Drop what is invisible, dissolve groups that say nothing, and take out spaces.

    Args:
        root: the SVG, changed in place.
        merge_paths: make one path out of neighbours that look alike. Right where neighbours of one look do not overlap,
            as the bars of a histogram; shapes that overlap may get holes.
    """
    _simplify(root, merge_paths)
    styles = {f"#{e.attrib['id']}": e.attrib.get("style") for e in root.iter() if "id" in e.attrib}
    for element in root.iter():
        # what is referred to brings its own style along
        if "style" in element.attrib and element.attrib["style"] == styles.get(element.attrib.get("href", ""), ""):
            del element.attrib["style"]
        if "d" in element.attrib:
            element.set("d", " ".join(SPACES_IN_PATH.sub(r"\1", element.attrib["d"]).split()))
        if "style" in element.attrib:
            element.set("style", SPACES_IN_STYLE.sub(r"\1", element.attrib["style"]).rstrip("; "))


def _simplify(parent: ElementTree.Element, merge_paths: bool) -> None:
    """From above, so that what has left the tree is not looked at again."""
    children = _flattened(list(parent))
    parent[:] = _merged(children) if merge_paths else children
    for child in parent:
        _simplify(child, merge_paths)


def _flattened(children: list[ElementTree.Element]) -> list[ElementTree.Element]:
    """The children, those of groups without any attribute instead of the groups; invisible paths left out."""
    found = []
    for child in children:
        if child.tag == "g" and not child.attrib:
            found += _flattened(list(child))
        elif not (child.tag == "path" and set(child.attrib) <= {"d", "style"} and _is_invisible(child)):
            found.append(child)
    return found


def _is_invisible(path: ElementTree.Element) -> bool:
    """Neither filled nor drawn: the frames of figures without a background."""
    return INVISIBLE.fullmatch(path.attrib.get("style", "")) is not None


def _merged(children: list[ElementTree.Element]) -> list[ElementTree.Element]:
    """Neighbouring paths that differ in nothing but their place, as one."""
    found: list[ElementTree.Element] = []
    for child in children:
        if found and _look(found[-1]) is not None and _look(found[-1]) == _look(child):
            found[-1].set("d", f"{found[-1].attrib['d']} {child.attrib['d']}")
        else:
            found.append(child)
    return found


def _look(element: ElementTree.Element) -> tuple[tuple[str, str], ...] | None:
    """Everything about a path but its place; None for what must stay alone."""
    if (
        element.tag != "path"
        or "d" not in element.attrib
        or "id" in element.attrib
        or "marker" in element.attrib.get("style", "")
    ):
        return None
    return tuple(sorted((key, value) for key, value in element.attrib.items() if key != "d"))
