"""What names from elsewhere become on a terminal, in a spreadsheet and in Markdown."""

from __future__ import annotations

import os

import pytest

from lungkit._text import csv_cell, from_csv_cell, is_printable, markdown, printable

OBEYED = ["\x1b[2J", "\x9b31m", "\x07", "\r", "\b", "\x7f", "\u202e", "\u2066", "\ud800", "\x00", "\x85"]


@pytest.mark.parametrize("code", OBEYED)
def test_what_a_terminal_obeys_is_written_as_its_code(code: str) -> None:
    shown = printable(f"a{code}b")
    assert shown.startswith("a\\")
    assert shown.endswith("b")
    assert code[0] not in shown
    shown.encode()
    assert not is_printable(f"a{code}b")
    assert printable(f"a{code}b", lines=True) == shown


def test_letters_of_any_language_stay() -> None:
    text = "Läsion 肺 รอยโรค ‹x› é \N{NO-BREAK SPACE}|"
    assert printable(text) == text
    assert is_printable(text)


def test_bytes_that_are_no_text_are_shown_as_their_codes() -> None:
    assert printable(os.fsdecode(b"L\xe4sion")) == "L\\udce4sion"


def test_ends_of_lines_stay_in_messages_and_not_in_names() -> None:
    assert printable("a\n\tb", lines=True) == "a\n\tb"
    assert printable("a\n\tb") == "a\\n\\tb"


@pytest.mark.parametrize("text", ["=1+1", "+1 a", "-cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "'=1", "''=1"])
def test_what_a_spreadsheet_takes_for_a_formula_is_text(text: str) -> None:
    cell = csv_cell(text)
    assert cell == f"'{text}"
    assert from_csv_cell(cell) == text


@pytest.mark.parametrize(
    "text", ["-1.5", "+2e3", "-inf", "-", "", "lung_001", "it's", "'quoted'", "a=b", "nan"]
)
def test_numbers_and_other_text_stay(text: str) -> None:
    assert csv_cell(text) == text
    assert from_csv_cell(text) == text


def test_markdown_shows_html_as_text() -> None:
    assert markdown("<img src=x onerror=alert(1)> & a|b\n# c") == (
        "&lt;img src=x onerror=alert(1)&gt; &amp; a\\|b\\n# c"
    )
