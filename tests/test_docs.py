"""The pages in docs/ speak of files and names that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
# `path/to/file.py: name` or `path/to/file` in backticks; <op> and <name> stand for any.
_PLACE = re.compile(r"`((?:lungkit|csrc|tests|benchmarks|cmake)/[\w./-]+)(?::\s+(\w+))?`")


def places() -> list[tuple[str, str, str]]:
    found = [
        (page.name, match[1], match[2] or "") for page in PAGES for match in _PLACE.finditer(page.read_text())
    ]
    return sorted({place for place in found if "_native" not in place[1]})


@pytest.mark.parametrize(("page", "path", "name"), places())
def test_what_a_page_names_exists(page: str, path: str, name: str) -> None:
    file = ROOT / path
    assert file.exists(), f"{page} speaks of {path}, which does not exist"
    if name:
        defined = rf"^(?:\s*(?:def|class)\s+{name}\b|{name}\b\s*[:=])"
        assert re.search(defined, file.read_text(), re.MULTILINE), f"{page}: {path} defines no {name}"


def test_the_table_of_imports_is_the_one_that_is_tested() -> None:
    source = (ROOT / "tests" / "test_layout.py").read_text()
    may_import = dict(re.findall(r'^    "(\w+)": \{(.*)\},$', source, re.MULTILINE))
    rows = re.findall(
        r"^\| `lungkit/(\w+)(?:/|\.py)` \| .* \| (.*) \|$",
        (ROOT / "docs" / "architecture.md").read_text(),
        re.MULTILINE,
    )
    assert rows
    for folder, told in rows:
        if told != "everything":
            assert set(re.findall(r"`(\w+)`", told)) == set(re.findall(r'"(\w+)"', may_import[folder])), (
                folder
            )
