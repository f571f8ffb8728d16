"""A page is one file, forbids every connection, and replaces no file of others."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from pathlib import Path

import pytest

from lungkit.errors import UsageError
from lungkit.report.html.markup import element
from lungkit.report.html.page import is_ours, json_block, write_page


def test_the_policy_names_every_script_and_style_of_the_page_and_no_address(tmp_path: Path) -> None:
    write_page(tmp_path / "a.html", "a", ["x"], scripts=("tables.js", "volumes.js"))
    text = (tmp_path / "a.html").read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    inline = re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", text, re.DOTALL)
    digests = {base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in inline}
    assert digests == set(re.findall(r"sha256-([^&]+)&#x27;", policy[1]))
    assert len(digests) == 3
    assert policy[1].startswith("default-src &#x27;none&#x27;")
    assert "unsafe" not in policy[1]


@pytest.mark.parametrize("name", ["volumes.js", "planes.js", "viewer.js", "tables.js", "report.css"])
def test_what_is_shipped_asks_for_nothing_outside_the_page(name: str) -> None:
    text = (resources.files("lungkit.report.html") / "assets" / name).read_text()
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|fetch\(|XMLHttpRequest|</", text)


def test_a_title_and_data_of_hostile_names_stay_text(tmp_path: Path) -> None:
    name = "</title></script><script>alert(1)</script>"
    write_page(tmp_path / "a.html", name, [element("h1", name)], data=[json_block("d", {"name": name})])
    text = (tmp_path / "a.html").read_text()
    assert "<script>" not in text
    assert text.count("</script>") == 1


def test_a_name_that_is_no_unicode_is_written_as_its_bytes(tmp_path: Path) -> None:
    write_page(tmp_path / "a.html", "case\udcff", [])
    assert r"<title>case\udcff</title>" in (tmp_path / "a.html").read_text()


def test_a_page_of_ours_is_replaced_and_a_file_of_others_is_not(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_page(path, "first", [])
    write_page(path, "second", [])
    assert "second" in path.read_text()
    assert is_ours(path)
    path.write_text("<html>my thesis</html>")
    with pytest.raises(UsageError, match=r"report\.html was not written by lungkit"):
        write_page(path, "third", [])
    assert path.read_text() == "<html>my thesis</html>"


def contrast(one: str, other: str) -> float:
    """Ratio of WCAG 2.1 between two colours "#rrggbb"."""

    def luminance(colour: str) -> float:
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", range(3), ids=["light", "dark", "print"])
def test_texts_and_marks_stand_out_as_wcag_aa_asks(theme: int) -> None:
    style = (resources.files("lungkit.report.html") / "assets" / "report.css").read_text()
    colours = dict(
        re.findall(r"--([\w-]+): (#\w{6})", re.findall(r":root \{(.*?)\}", style, re.DOTALL)[theme])
    )
    for ground in ("paper", "panel"):
        for text in ("ink", "faint", "accent"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for series in range(1, 7):
            assert contrast(colours[f"series-{series}"], colours[ground]) >= 3, (series, ground)
