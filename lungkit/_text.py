"""Text from files and names, made harmless for what shows it: a terminal, a spreadsheet, a page in Markdown."""

from __future__ import annotations

import html
import re

# Control characters, which a terminal obeys; marks that turn the direction of writing; halves of letters.
_UNSEEN = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_LINES = re.compile(f"[{_UNSEEN}]")
_LINE = re.compile(f"[{_UNSEEN}\t\n]")
_FORMULA = re.compile(r"'*[=+\-@\t\r]", re.DOTALL)


def printable(text: str, *, lines: bool = False) -> str:
    r"""``text`` with what a terminal would obey rather than show written as its code.

    Args:
        text: any, e.g. a name of a file whose bytes are no UTF-8.
        lines: leave tabs and ends of lines as they are.

    Example:
        >>> printable("a\x1b[2Jb\nc")
        'a\\x1b[2Jb\\nc'
    """
    pattern = _LINES if lines else _LINE
    return pattern.sub(lambda found: found[0].encode("unicode_escape", "backslashreplace").decode(), text)


def is_printable(text: str) -> bool:
    """Whether :func:`printable` leaves ``text`` as it is."""
    return _LINE.search(text) is None


def csv_cell(text: str) -> str:
    """``text`` as a cell that no spreadsheet takes for a formula: with an apostrophe before it where it might.

    Numbers stay as they are. :func:`from_csv_cell` is the way back.

    Example:
        >>> csv_cell("=1+1"), csv_cell("-1.5"), csv_cell("lung_001")
        ("'=1+1", '-1.5', 'lung_001')
    """
    text = printable(text, lines=True)
    return f"'{text}" if _FORMULA.match(text) and not _is_number(text) else text


def from_csv_cell(cell: str) -> str:
    """What :func:`csv_cell` was given.

    Example:
        >>> from_csv_cell("'=1+1"), from_csv_cell("it's")
        ('=1+1', "it's")
    """
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def markdown(text: str) -> str:
    r"""``text`` as it is to be read in Markdown: no HTML, no link, no end of a cell or line.

    Example:
        >>> markdown("<b>|[x](y)")
        '&lt;b&gt;\\|[x]\\(y)'
    """
    return html.escape(printable(text), quote=False).replace("|", r"\|").replace("](", r"]\(")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text == "-"  # stands for one that is not defined
    return True
