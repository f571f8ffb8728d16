"""``lungkit-models``: the models that are known by name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import lungkit
from lungkit.cli._common import run_command
from lungkit.cli._parser import CommandParser
from lungkit.errors import UsageError

_EPILOG = """
--model NAME of lungkit-predict and lungkit-export takes these names. Registry files of others, JSON, are named by the
environment variable LUNGKIT_MODELS, separated as PATH is; nothing is ever fetched from a network.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(lambda: _run(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="lungkit-models",
        description="List the models that are known by name, or show the card of one.",
        epilog=_EPILOG,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names and what they are for")
    commands.add_parser("show", help="the card of a model: data, figures, limits").add_argument("name")
    parser.add_argument("--version", action="version", version=lungkit.__version__)
    return parser


def _run(options: argparse.Namespace) -> int:
    from lungkit.inference import TrainedModel, known_models

    models = known_models()
    if options.command == "list":
        for model in models.values():
            sys.stdout.write(f"{model.name}: {model.summary}\n")
        return 0
    if options.name not in models:
        raise UsageError(f"{options.name}: no model of that name; known are {', '.join(sorted(models))}")
    model = models[options.name]
    trained = TrainedModel.load(model.folder)
    weights = sum(parameter.numel() for parameter in trained.network.parameters())
    sys.stdout.write(f"{model.name}: {model.summary}\nlicence: {model.licence}\nfolder: {model.folder}\n")
    sys.stdout.write(f"{weights:,} weights, sha256 {trained.digest}\n")
    if model.card is not None:
        try:
            sys.stdout.write("\n" + model.card.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{model.card}: the card cannot be read ({error.strerror})") from error
    return 0
