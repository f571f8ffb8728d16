"""Docstrings as the site needs them: roles and maths of reStructuredText become Markdown when the API is collected."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +\S.*| *(?=\n\1 +\S)))*)", re.MULTILINE)
_INLINE = re.compile(r":math:`([^`]+)`")
_SHARED = re.compile(r"^    (\w+(?:,\s+\w+)+): (.*(?:\n {8}.*)*)", re.MULTILINE)
_ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`~?([^`]+)`")


def markdown_of(docstring: str) -> str:
    r"""The same docstring with ``$$`` round displayed maths, ``$`` round inline maths, and code for names.

    Example:
        >>> markdown_of("Sum :math:`x^2` of :class:`Tensor`.")
        'Sum $x^2$ of `Tensor`.'
        >>> print(markdown_of(".. math:: a = b\n\nText."))
        <BLANKLINE>
        $$
        a = b
        $$
        <BLANKLINE>
        <BLANKLINE>
        Text.
    """
    text = re.sub(r"^Example:$", "Examples:", docstring, flags=re.MULTILINE)
    text = _SHARED.sub(_each_by_itself, _BLOCK.sub(_displayed, text))
    return _ROLE.sub(r"`\1`", _INLINE.sub(r"$\1$", text))


def _displayed(found: re.Match[str]) -> str:
    formula = textwrap.dedent(found[2]).strip()
    return textwrap.indent(f"\n$$\n{formula}\n$$\n", found[1], predicate=lambda _: True)


def _each_by_itself(found: re.Match[str]) -> str:
    """One line of several arguments as a line for each of them."""
    return "\n".join(f"    {name}: {found[2]}" for name in re.split(r",\s+", found[1]))


class RestDocstrings(griffe.Extension):
    """Rewrites every docstring as it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown_of(obj.docstring.value)
