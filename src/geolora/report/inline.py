"""matplotlib figures as HTML that needs no other file, the same bytes for the same figure."""

import re
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from geolora.report.clean import clean

LARGEST = 400_000
"""Characters of an SVG; what is larger becomes a PNG."""
SMALLEST = 0.62
"""Share of its width to which a figure shrinks on a small screen before it scrolls."""
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@contextmanager
def plain_names() -> Iterator[None]:
    """Draw names as they are written: a dollar sign starts no formula."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):
        yield


def inline(figure: Any, label: str) -> Markup:
    """A figure as an element of a page.

    Args:
        label: what it shows, for who cannot see it; no other figure of the page has it.
    """
    from matplotlib import rc_context

    file = BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(file, format="svg", metadata=NO_METADATA)
    drawn = file.getvalue().decode("utf-8")
    label = clean(label)
    width = 96 * figure.get_figwidth()
    smallest = f"min-width:{SMALLEST * width:.0f}px"
    if len(drawn) > LARGEST:
        file = BytesIO()
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
        source = "data:image/png;base64," + b64encode(file.getvalue()).decode("ascii")
        picture = Markup('<img src="{}" alt="{}" width="{:.0f}" style="{}">')
        shown = picture.format(source, label, width, smallest)
    else:
        shown = _for_html(drawn, {"aria-label": label, "style": smallest})
    return Markup("<figure>{}</figure>").format(shown)


def _for_html(drawn: str, given: dict[str, str]) -> Markup:
    """An SVG file as an element of HTML: no namespaces, no style of its own, only ids in use.

    Args:
        given: attributes the element gets.
    """
    used = set(re.findall(r"""(?:url\(#|href="#)([^")]+)""", drawn))
    root = ElementTree.fromstring(clean(drawn))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("style", "metadata"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.tail = None
        if element.tag != "text":
            element.text = None
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        if "style" in attributes:
            attributes["style"] = re.sub(r"font-family:[^;]*;\s*", "", attributes["style"])
        element.attrib = {
            key: ("" if key == "href" else " ").join(value.split())
            for key, value in attributes.items()
        }
    root.attrib = {"role": "img", **given, **root.attrib}
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))
