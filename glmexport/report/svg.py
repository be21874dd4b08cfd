"""SVG elements, escaped, and the frame with a text alternative that every chart is put in."""

from __future__ import annotations

from markupsafe import Markup

from glmexport.foundation.untrusted import visible


def element(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """Return an SVG element; text and attribute values are escaped, ``font_size`` becomes ``font-size``."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _attribute(value))
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{}{}>{}</{}>").format(name, written, Markup("").join(map(_shown, children)), name)


def figure(key: str, title: str, description: str, height: float, *marks: str) -> Markup:
    """Return the outer SVG, with ``title`` and ``description`` as its text alternative."""
    return element(
        "svg",
        element("title", title, id=f"{key}-title"),
        element("desc", description, id=f"{key}-desc"),
        *marks,
        class_="chart",
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
        width="100%",
        height=height,
    )


def line(x: float, top: float, bottom: float, kind: str) -> Markup:
    """Return a vertical line at ``x`` percent, from ``top`` to ``bottom`` px."""
    return element("line", x1=f"{x:.2f}%", x2=f"{x:.2f}%", y1=top, y2=bottom, class_=kind)


def text(x: float, y: float, words: str, kind: str, anchor: str) -> Markup:
    """Return ``words`` at ``x`` percent and ``y`` px."""
    return element("text", words, x=f"{x:.2f}%", y=y, class_=kind, text_anchor=anchor)


def _shown(child: str) -> str:
    return child if isinstance(child, Markup) else visible(child)


def _attribute(value: str | float) -> str:
    return visible(value) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
