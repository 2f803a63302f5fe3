"""Figures inside a page: SVG that takes the page's colours and font, under a strict content policy."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from markupsafe import Markup

from neft.report.figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_HREF = f"{{{_XLINK}}}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
# The page's own colours instead: they follow its light or dark theme.
_THEMED = {"#000000": "currentColor", "#b0b0b0": "var(--soft)"} | {
    colour.casefold(): f"var(--series-{number})"
    for number, colour in enumerate(COLOURS)
    if colour != "#000000"
}
_PAINTS = ("fill", "stroke")
# The page's font is set by its stylesheet.
_DROPPED = ("font-family", "font-style", "font-weight", "font-stretch", "font-variant", "font")


def inline_svg(figure: Figure, name: str, alternative: str) -> Markup:
    """A figure as an SVG element.

    Matplotlib styles its elements by ``style`` attributes, which a content policy without exceptions
    forbids; they become presentation attributes here. Texts stay texts.

    Args:
        figure: is drawn on no background.
        name: unique within the page; prefix of all ids.
        alternative: the figure in words, for those who cannot see it.
    """
    root = _drawn(figure)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        _set_presentation(element)
    _rename_ids(root, name)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.attrib |= {
        "role": "img",
        "aria-label": alternative,
        "class": "plot",
        # What matplotlib says in a style sheet of its own.
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
    }
    # Escaped by the XML writer, and shortened: matplotlib indents every path.
    return Markup(re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode")))


def _drawn(figure: Figure) -> ElementTree.Element:
    from matplotlib import rc_context

    # Without a date and with fixed ids, the same numbers give the same bytes.
    with rc_context({"svg.hashsalt": "neft", "svg.fonttype": "none", "path.simplify": True}):
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return ElementTree.fromstring(file.getvalue())


def _set_presentation(element: ElementTree.Element) -> None:
    """Style as attributes of their own, in the page's colours."""
    for declaration in filter(None, element.attrib.pop("style", "").split(";")):
        name, _, value = declaration.partition(":")
        element.set(name.strip(), value.strip())
    font = element.get("font", "")
    if size := re.search(r"([\d.]+)px", font):
        element.set("font-size", size[1])
    if "text-align" in element.attrib:
        del element.attrib["text-align"]
    for name in _DROPPED:
        element.attrib.pop(name, None)
    if element.tag == f"{{{_SVG}}}text":
        # Black is the initial colour of a text, so matplotlib does not write it.
        element.attrib.setdefault("fill", "currentColor")
    for name in _PAINTS:
        paint = element.get(name, "")
        element.attrib |= {name: _THEMED[paint.casefold()]} if paint.casefold() in _THEMED else {}


def _rename_ids(root: ElementTree.Element, name: str) -> None:
    """Give ids that something refers to the figure's own prefix, and drop the others."""
    used = set(_REFERENCE.findall(" ".join(v for e in root.iter() for v in e.attrib.values())))
    used |= {e.attrib[_HREF][1:] for e in root.iter() if e.get(_HREF, "").startswith("#")}
    for element in root.iter():
        found = element.attrib.pop("id", None)
        if found in used:
            element.set("id", f"{name}-{found}")
        for key, value in element.attrib.items():
            element.set(key, _REFERENCE.sub(rf"url(#{name}-\1)", value))
        if element.get(_HREF, "").startswith("#"):
            element.set(_HREF, f"#{name}-{element.attrib[_HREF][1:]}")
