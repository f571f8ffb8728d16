"""The pages in docs/ speak of files and names that exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "README.md"]
# `path/to/file.py: name` or `path/to/file` in backticks; <op> and <name> stand for any.
_PLACE = re.compile(r"`((?:lungkit|csrc|tests|benchmarks|cmake|docs|examples)/[\w./-]+)(?::\s+(\w+))?`")


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


def test_readme_is_a_front_page_with_one_picture() -> None:
    text = (ROOT / "README.md").read_bytes()
    assert len(text) < 8000
    assert text.count(b"![") == 1


# Pages that the site makes as it is built.
_GENERATED = ("docs/reference/commands.md",)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        file = (page.parent / target).resolve()
        assert "://" not in target, f"{page.name}: pages link to nothing outside: {target}"
        assert file.exists() or file.relative_to(ROOT).as_posix() in _GENERATED, f"{page.name}: {target}"


def command_options() -> ModuleType:
    spec = importlib.util.spec_from_file_location("command_options", ROOT / "docs/_tools/command_options.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_commands_holds_every_option() -> None:
    from lungkit.training.config_io import options

    tool = command_options()
    page = tool.commands_page()
    for name, module in tool.commands().items():
        assert f"\n## {name}\n" in page
        for option in tool.parser_of(module)._option_string_actions:
            assert option in ("-h", "--help", "--version") or f"`{option}" in page, f"{name} {option}"
    for name in options():
        assert f"`--{name}`" in page
