"""The terminal, for every command alike: whether to be quiet, bars with the time left, colours where they show."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from lungkit._text import printable

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

_STYLES = {"red": "31", "yellow": "33"}
_quiet = False


class SafeFormatter(logging.Formatter):
    """Messages without what a terminal would obey: names of files and classes come from elsewhere."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


def set_quiet(quiet: bool) -> None:
    """Show no progress from now on; or show it again."""
    global _quiet
    _quiet = quiet


def shows_progress() -> bool:
    """Whether somebody is looking: standard error is a terminal, and nobody asked for quiet."""
    return not _quiet and sys.stderr.isatty()


def progress_bars(*columns: ProgressColumn) -> Progress:
    """Bars on standard error: what is done, of how much, the time left. None where :func:`shows_progress` is false.

    Args:
        columns: further ones, at the end.

    Example:
        >>> with progress_bars() as bars:
        ...     task = bars.add_task("measuring", total=2)
        ...     bars.update(task, completed=2)
        >>> bars.finished
        True
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        *columns,
        console=Console(stderr=True),
        transient=True,
        disable=not shows_progress(),
    )


def coloured(text: str, colour: str) -> str:
    """``text`` in "red" or "yellow" where standard error is a terminal that has colours, else as it is.

    ``NO_COLOR`` (https://no-color.org) and ``TERM=dumb`` turn colours off.
    """
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\033[{_STYLES[colour]}m{text}\033[0m"
