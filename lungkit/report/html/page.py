"""The frame of every page of a report: one file, no network, and nothing of ours over somebody else's file."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import lungkit
from lungkit._atomic import atomic_path
from lungkit.errors import UsageError
from lungkit.report.html.markup import Markup, element, join, script_json

_LOG = logging.getLogger("lungkit")

NOTE = "Made by a research tool, not a medical device."
_GENERATOR = '<meta name="generator" content="lungkit'
_HEAD_BYTES = 4096  # our mark stands in the first of them


@cache
def asset(name: str) -> str:
    """Text of a script or style sheet that is shipped in the package."""
    return (resources.files("lungkit.report.html") / "assets" / name).read_text(encoding="utf-8")


def write_page(
    path: str | os.PathLike[str],
    title: str,
    body: Sequence[str],
    *,
    scripts: Sequence[str] = (),
    data: Iterable[tuple[str, str, str]] = (),
) -> None:
    """Write a page as one file: style, scripts and data are in it, and its policy forbids every connection.

    The Content-Security-Policy names our scripts and style by their digests: a script that came in by a name or a
    header would not run even if it were not escaped.

    Args:
        path: file to write; one that lungkit wrote is replaced.
        title: of the page.
        body: parts of the page; text that is no :class:`Markup` is escaped.
        scripts: names of files in ``assets``, in order.
        data: (id, media type, text) of blocks that the scripts read; the text must not hold ``<``.

    Raises:
        UsageError: ``path`` holds a file that lungkit did not write, or cannot be written.
        ResourceError: the disk is full.
    """
    path = Path(path)
    check_ours(path)
    style = asset("report.css")
    texts = [asset(name) for name in scripts]
    trusted = " ".join(map(_digest, texts)) or "'none'"
    policy = (
        f"default-src 'none'; script-src {trusted}; style-src {_digest(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    head = join(
        element("meta", charset="utf-8"),
        element("meta", name="generator", content=f"lungkit {lungkit.__version__}"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(style)),
    )
    # A name that is no Unicode, as old archives have them, is written as its bytes.
    with (
        atomic_path(path, durable=False) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
    ):
        file.write(f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n')
        file.writelines(join(part) for part in body)
        file.write(element("footer", element("p", f"lungkit {lungkit.__version__}. {NOTE}")))
        for identifier, kind, text in data:
            file.write(f'\n<script type="{kind}" id="{identifier}">')
            file.write(text)
            file.write("</script>")
        file.writelines(f"\n<script>{text}</script>" for text in texts)
        file.write("\n</body>\n</html>\n")


def json_block(identifier: str, value: object) -> tuple[str, str, str]:
    """A block of ``data`` for :func:`write_page` that holds JSON."""
    return identifier, "application/json", script_json(value)


def check_ours(path: Path) -> None:
    """Refuse to replace a file that lungkit did not write.

    Raises:
        UsageError: it is somebody else's.
    """
    if path.exists() and not is_ours(path):
        raise UsageError(f"{path} was not written by lungkit; move it away, or ask for another file")


def is_ours(path: Path) -> bool:
    """Whether a file is a page that :func:`write_page` wrote."""
    try:
        with path.open("rb") as file:
            return _GENERATOR.encode() in file.read(_HEAD_BYTES)
    except OSError:
        return False


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
