"""HTML that is safe by construction: what is not marked as HTML is escaped, in elements, attributes and JSON alike."""

from __future__ import annotations

import html
import json
from typing import Any

_VOID = {"br", "hr", "img", "input", "link", "meta"}
# Letters with which a text inside <script> could end the element, open a comment, or break old JavaScript.
_IN_SCRIPT = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


class Markup(str):
    """Text that is HTML already; all other text is escaped by :func:`element`."""

    __slots__ = ()


def element(name: str, /, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """An element of HTML or SVG with its children, of which those that are no :class:`Markup` are escaped.

    Args:
        name: of the element.
        children: in order; None is left out.
        attributes: ``class_`` and ``for_`` lose their underscore, others become hyphens; None and False are left out,
            True stands without a value.

    Example:
        >>> element("a", "<b> & co", href='x"y', hidden=False, data_place=3)
        '<a href="x&quot;y" data-place="3">&lt;b&gt; &amp; co</a>'
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*parts: str | None) -> Markup:
    """Parts one after the other, escaped where they are no :class:`Markup`; None is left out.

    Example:
        >>> join("1 < 2", element("br"), None)
        '1 &lt; 2<br>'
    """
    return Markup(
        "".join(part if isinstance(part, Markup) else html.escape(part) for part in parts if part is not None)
    )


def script_json(value: Any) -> Markup:
    """JSON that may stand between ``<script>`` and ``</script>``, whatever its texts hold.

    Raises:
        ValueError: a number is not finite.

    Example:
        >>> script_json({"name": "</script><b>"})
        '{"name":"\\\\u003c/script\\\\u003e\\\\u003cb\\\\u003e"}'
    """
    return Markup(json.dumps(value, allow_nan=False, separators=(",", ":")).translate(_IN_SCRIPT))
