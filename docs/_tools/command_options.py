"""The page of the commands, from their own parsers: nothing about an option is written by hand."""

from __future__ import annotations

import argparse
import html
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]

_INTRODUCTION = (
    "Made from the parsers of the commands. Every command also takes `--help` and `--version`, prints errors as one "
    "sentence, and says by its exit code what happened: [exit codes](files.md#exit-codes).\n"
)


class _Caught(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def commands() -> dict[str, str]:
    """Name of every command -> its module, as the installation declares them."""
    declared = re.findall(
        r'^(lungkit-[\w-]+) = "([\w.]+):main"$', (ROOT / "pyproject.toml").read_text(), re.M
    )
    return dict(declared)


def parser_of(module: str, arguments: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """The parser that a command has made by the time it reads its arguments."""

    def catch(parser: argparse.ArgumentParser, *_: object, **__: object) -> Any:
        raise _Caught(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", catch):
        try:
            importlib.import_module(module).main(list(arguments))
        except _Caught as caught:
            return caught.parser
    raise AssertionError(f"{module} reads no arguments")


def commands_page() -> str:
    """The whole page as Markdown."""
    parts = ["# Commands\n", _INTRODUCTION]
    for name, module in commands().items():
        parser = parser_of(module)
        parts += [f"## {name}\n", *_described(parser)]
        if name == "lungkit-predict":
            merge = parser_of(module, ("merge", "FOLDER"))
            parts += ["### lungkit-predict merge\n", *_described(merge)]
        if name == "lungkit-train":
            parts += ["### Options of the configuration\n", _configuration()]
    return "\n".join(parts)


def _described(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"{parser.description or ''}\n"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield f"### {parser.prog} {name}\n"
                yield from _described(child)
            return
    rows = [_row(action) for action in parser._actions if action.dest not in ("help", "version")]
    yield "\n".join(["| option | meaning |", "|---|---|", *rows]) + "\n"
    if parser.epilog:
        yield f"```text\n{parser.epilog.strip()}\n```\n"


def _row(action: argparse.Action) -> str:
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
    value = "" if action.nargs == 0 else f" {action.metavar or choices or action.dest}"
    names = (
        ", ".join(f"`{option}{value}`" for option in action.option_strings)
        or f"`{action.metavar or action.dest}`"
    )
    meaning = (action.help or "") % {"default": action.default, "prog": ""} if action.help else ""
    if action.nargs in ("+", "*") and action.option_strings:
        meaning += "; one or more"
    if action.required and action.option_strings:
        meaning += " (required)"
    return f"| {_cell(names)} | {_cell(html.escape(meaning, quote=False))} |"


def _configuration() -> str:
    from lungkit.training.config import TrainConfig
    from lungkit.training.config_io import config_to_dict, options

    rows = ["| option | default | meaning |", "|---|---|---|"]
    plain = config_to_dict(TrainConfig())
    for name, option in options().items():
        value: Any = plain
        for part in name.split("."):
            value = value[part]
        default = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        rows.append(f"| `--{name}` | {_cell(default)} | {_cell(html.escape(option.meaning, quote=False))} |")
    return (
        "The same names in YAML (`--config run.yaml`), on the command line and in Python "
        "(`lungkit.training.TrainConfig`). `null` is decided by the dataset.\n\n" + "\n".join(rows) + "\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
