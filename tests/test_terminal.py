"""Progress and colours: on a terminal alone, and not where somebody asked for quiet."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from lungkit._terminal import coloured, progress_bars, set_quiet, shows_progress


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    yield
    set_quiet(False)


def pretend_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)


def run_bar() -> None:
    with progress_bars() as bars:
        bars.update(bars.add_task("[measuring]", total=4), completed=3)
        bars.refresh()


def test_on_a_terminal_bars_say_what_is_done_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_terminal(monkeypatch)
    run_bar()
    out, err = capsys.readouterr()
    assert out == "" and "[measuring]" in err and "3/4" in err and ":" in err.split("3/4")[1]


def test_a_file_gets_no_bars(capsys: pytest.CaptureFixture[str]) -> None:
    run_bar()
    assert capsys.readouterr() == ("", "")


def test_quiet_shows_no_bars_on_a_terminal_either(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_terminal(monkeypatch)
    assert shows_progress()
    set_quiet(True)
    assert not shows_progress()
    run_bar()
    assert capsys.readouterr().err == ""


def test_colours_are_for_terminals_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_terminal(monkeypatch)
    assert coloured("bad", "red") == "\x1b[31mbad\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert coloured("bad", "red") == "bad"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert coloured("bad", "red") == "bad"


def test_a_file_gets_no_colours() -> None:
    assert coloured("bad", "red") == "bad"
