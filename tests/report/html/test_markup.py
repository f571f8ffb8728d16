"""Nothing that a name holds becomes HTML or script."""

from __future__ import annotations

import json

import pytest

from lungkit.report.html.markup import Markup, element, join, script_json

HOSTILE = '</script><img src=x onerror="alert(1)">\'&amp;\u2028'


def test_text_is_escaped_and_markup_is_not() -> None:
    assert element("b", HOSTILE).count("<") == 2
    assert element("p", element("b", "x")) == "<p><b>x</b></p>"


def test_attributes_are_escaped() -> None:
    written = element("a", href=HOSTILE)
    assert written.count('"') == 2
    assert written.count("<") == 2


def test_json_in_a_script_holds_no_tag_and_reads_back() -> None:
    written = script_json({HOSTILE: [HOSTILE]})
    assert not set("<>&\u2028") & set(written)
    assert json.loads(written) == {HOSTILE: [HOSTILE]}


def test_json_refuses_what_browsers_cannot_read() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json(float("nan"))


def test_nothing_is_left_out_without_a_word() -> None:
    assert join(None, "a", Markup("<br>")) == "a<br>"
