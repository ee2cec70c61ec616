"""A figure as SVG to stand inside an HTML page, together with others."""

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from .styles import BLUE, GRID, INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_PAGE_COLORS = {INK: "currentColor", GRID: "var(--grid)", BLUE: "var(--blue)"}  # so that a page can be dark


def inline(figure: "Figure", prefix: str, title: str) -> str:
    """The <svg> element, without a size so that it fits its place.

    prefix: of its ids, which are those of a page: only what the figure refers to keeps one.
    title: what a screen reader says instead of the picture.
    """
    import matplotlib

    text = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(text, format="svg", transparent=True)
    root = ElementTree.fromstring(text.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    _prefix_ids(root, prefix)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        for name in ("style", "fill", "stroke"):
            for color, other in _PAGE_COLORS.items():
                if name in element.attrib:
                    element.set(name, element.attrib[name].replace(color, other))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"xmlns": _SVG, "role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _prefix_ids(root: ElementTree.Element, prefix: str) -> None:
    used = set()
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            if name in (f"{{{_XLINK}}}href", "href") and value.startswith("#"):
                del element.attrib[name]
                element.set("href", f"#{prefix}-{value[1:]}")
                used.add(value[1:])
            elif "url(#" in value and name != "id":
                used |= set(_REFERENCE.findall(value))
                element.set(name, _REFERENCE.sub(rf"url(#{prefix}-\1)", value))
    for element in root.iter():
        name = element.attrib.pop("id", "")
        if name in used:
            element.set("id", f"{prefix}-{name}")
