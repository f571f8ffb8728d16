"""What mkdocs does for this site beyond its plugins: generated pages, files from outside docs/, maths as MathML."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_MATHS = re.compile(r'<(div|span) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', re.DOTALL)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the page of the commands, CONTRIBUTING.md and the measured tables."""
    sys.path.insert(0, str(HERE))
    try:
        from command_options import commands_page
    finally:
        sys.path.remove(str(HERE))
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    contributing = (ROOT / "CONTRIBUTING.md").read_text().replace("(docs/", "(")
    files.append(File.generated(config, "contributing.md", content=contributing))
    results = ROOT / "benchmarks" / "results"
    for path in sorted(results.rglob("*")):
        if path.suffix in (".md", ".png"):
            name = f"benchmark-results/{path.relative_to(results).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave docs/ in the tree stay within the site."""
    markdown = re.sub(r"\]\((?:\.\./)+benchmarks/results/", "](benchmark-results/", markdown)
    return re.sub(r"\]\(((?:\.\./)*)\.\./CONTRIBUTING\.md\)", r"](\1contributing.md)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""
    return _MATHS.sub(_mathml, html)


def _mathml(found: re.Match[str]) -> str:
    import html

    formula = html.unescape(found[3]).strip()
    return str(convert(formula, display="block" if found[2] == "[" else "inline"))
