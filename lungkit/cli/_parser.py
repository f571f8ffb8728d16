"""The parser of every command: the nearest option for a mistyped one, ``--quiet``, shell completion."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from lungkit._terminal import set_quiet
from lungkit.cli._common import be_quiet
from lungkit.cli._completion import SHELLS, completion_script

_CHOICE = re.compile(r"invalid choice: '?(?P<given>[^' ]+)'? \(choose from (?P<choices>.+)\)")


class CommandParser(argparse.ArgumentParser):
    """An :class:`argparse.ArgumentParser` without abbreviations, with options that all commands have.

    ``-q``/``--quiet`` shows warnings and errors alone; ``--print-completion SHELL`` prints a script and ends.

    Args:
        more: options that the command hands on (name and choices), so that unknown ones are no error here.
        options: as for :class:`argparse.ArgumentParser`.

    Example:
        >>> parser = CommandParser(prog="tool")
        >>> _ = parser.add_argument("--input")
        >>> parser.parse_args(["--inptu=scan.nii"])
        Traceback (most recent call last):
        SystemExit: 2
    """

    def __init__(
        self, *, more: Callable[[], Mapping[str, Sequence[str]]] | None = None, **options: Any
    ) -> None:
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options}
        super().__init__(**options)
        self._more = more
        self.add_argument(
            "-q",
            "--quiet",
            action=_Quiet,
            nargs=0,
            default=argparse.SUPPRESS,
            help="warnings and errors alone",
        )
        self.add_argument(
            "--print-completion",
            action=_PrintCompletion,
            choices=SHELLS,
            default=argparse.SUPPRESS,
            help="print a script that completes options and their choices, and stop",
        )

    def option_choices(self) -> dict[str, list[str]]:
        """Every option, those of subcommands and those that are handed on among them, with its choices."""
        found: dict[str, list[str]] = {}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    found |= parser.option_choices()
            for option in action.option_strings:
                found[option] = [str(choice) for choice in action.choices or ()]
        if self._more is not None:
            found |= {name: list(choices) for name, choices in self._more().items()}
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As that of the base class, which ``parse_args`` calls; an unknown option is refused with the nearest."""
        given = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:
            own = self._option_string_actions
            others = () if self._more is None else self._more()
            for word in given[: given.index("--")] if "--" in given else given:
                name = word.partition("=")[0]
                if (
                    not name.startswith("--")
                    or name in own
                    or name.replace("-", "_")[2:] in (n[2:] for n in others)
                ):
                    continue
                hint = nearest(name, [*own, *others])
                # Who takes the options that are handed on says what is wrong with those.
                if self._more is None or any(repr(option) in hint for option in own):
                    self.error(f"unknown option {name}{hint}")
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and a message, which for an unknown choice names the nearest."""
        match = _CHOICE.search(message)
        if match is not None:
            message += nearest(match["given"], re.findall(r"[^', ]+", match["choices"]))
        super().error(message)


def nearest(name: str, known: Any) -> str:
    """A hint with the one of ``known`` that is most like ``name``, or nothing.

    Example:
        >>> nearest("--outptu", ["--output", "--input"])
        "; did you mean '--output'?"
    """
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


class _Quiet(argparse.Action):
    def __call__(self, *_: object, **__: object) -> None:
        set_quiet(True)
        be_quiet()


class _PrintCompletion(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: object,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, CommandParser)
        command = parser.prog.split()[0]
        sys.stdout.write(completion_script(command, parser.option_choices(), values))
        parser.exit()
