"""``lungkit-compare``: train the arms of an experiment under one budget and compare them case by case."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lungkit
from lungkit._terminal import progress_bars
from lungkit.cli._common import run_command
from lungkit.cli._parser import CommandParser
from lungkit.cli._shares import parse_shard
from lungkit.errors import Interrupted, UsageError
from lungkit.experiments.ablations import ABLATIONS
from lungkit.training.config_io import option_choices

if TYPE_CHECKING:
    from rich.progress import Progress

    from lungkit.experiments.results import ComparisonRow

_LOG = logging.getLogger("lungkit")

_EPILOG = """
Any option of lungkit-train can follow and holds for all arms, e.g. --data DIR --epochs 50 --data.patch_size 96 96.
Written to the output folder: table.md/.csv/.tex/.txt (each metric with its bootstrap interval, the paired difference,
p, cases better and worse), cases/ (every metric of every case), forest.png, distributions.png, curves.png, overlays/
(worst, median and best case, chosen by rule), runs/ and comparison.json.
Examples:
  lungkit-compare                                        the paper's experiment on the CT phantom
  lungkit-compare --data DIR --seeds 0 1 2               on your scans, three seeds
  lungkit-compare --data DIR --ablation paper --seeds 0 1 2   the paper's two changes told apart; likewise recipe
  lungkit-compare --data DIR --ablation arms.yaml --budget minutes=20 --shard 0/4
  lungkit-compare --data DIR --arm A=a.yaml --arm B=b.yaml   any configurations, the others against the first
  lungkit-compare --data DIR --arm plain model=unet --arm residual model=unet model.residual=true
  lungkit-compare --runs runs/unet runs/attention-unet           finished runs, one an arm
  lungkit-compare --runs A0 A1 A2 --runs B0 B1 B2                several of each arm
The same command again goes on where it was stopped. Exit codes: 0 ok, 2 usage, 3 bad data, 4 checkpoint, 5 resources,
75 interrupted and saved.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = CommandParser(
        more=option_choices,
        prog="lungkit-compare",
        description="Compare ways to train a network, by default the paper's two: a U-Net with cross-entropy, and an "
        "Attention U-Net with Dice + cross-entropy, with the same data, folds, seeds and budget.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("comparison"), help='(default: "comparison")'
    )
    parser.add_argument(
        "--arm",
        action="append",
        nargs="+",
        metavar="WORD",
        help="an arm of your own, twice or more: NAME=FILE.yaml, or NAME KEY=VALUE ... with the options it changes",
    )
    parser.add_argument(
        "--ablation",
        metavar="NAME|FILE",
        help=f"many arms, each compared with the first: {', '.join(ABLATIONS)}, or a YAML file of arms",
    )
    parser.add_argument(
        "--budget",
        metavar="minutes=M|steps=N",
        help="the same for every arm: minutes of training, or optimiser steps (default: what the options say)",
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="train and measure share I (from 0) of the N that go on side by side; auto takes it from torchrun or a "
        "Slurm array. The last share to end writes the tables",
    )
    parser.add_argument(
        "--runs",
        action="append",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="finished runs, one an arm; given twice or more, all runs of one arm each time (one a fold and seed); "
        "nothing is trained",
    )
    parser.add_argument("--folds", type=int, nargs="+", help="folds to hold out (default: 0)")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to train with (default: 0)")
    parser.add_argument(
        "--test", type=Path, metavar="DIR", help="measure this dataset instead of the held-out folds"
    )
    parser.add_argument(
        "--checkpoint",
        choices=("last", "best"),
        default="last",
        help="weights to measure: at the end of the budget, or the best on the held-out fold (default: last)",
    )
    parser.add_argument(
        "--device",
        help="cpu, cuda, cuda:1 ...: to train and to measure on (default: the GPU where there is one)",
    )
    parser.add_argument(
        "--no-report", dest="report", action="store_false", help="no report.html and pages for the browser"
    )
    parser.add_argument("--json", action="store_true", help="print comparison.json in place of the table")
    parser.add_argument("--version", action="version", version=lungkit.__version__)
    return run_command(lambda: _run(*parser.parse_known_args(arguments)))


def _run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from lungkit.experiments.ablations import ablation_arms
    from lungkit.experiments.arms import paper_arms, parse_arm, with_budget
    from lungkit.experiments.compare import Experiment, compare, compare_runs
    from lungkit.experiments.results import format_comparison

    of_training = ("arm", "ablation", "budget", "shard", "folds", "seeds")
    given = [f"--{name}" for name in of_training if getattr(options, name)] + list(rest)
    if options.runs and given:
        raise UsageError(
            f"--runs compares finished runs and trains nothing, so {given[0]} has no meaning with it"
        )
    if options.arm and options.ablation:
        raise UsageError("--arm and --ablation both name the arms; leave one of them out")
    if options.device is not None and not options.runs:
        rest = [*rest, "--device", options.device]
    if not options.report and not options.runs:
        rest = [*rest, "--report", "false"]
    if options.runs:
        arms = []
    elif options.arm:
        arms = [parse_arm(words, rest) for words in options.arm]
    elif options.ablation:
        arms = ablation_arms(options.ablation, rest)
    else:
        arms = paper_arms(rest)
    if options.budget:
        arms = with_budget(arms, options.budget)
    experiment = Experiment(
        arms=tuple(arms),
        folds=tuple(options.folds or (0,)),
        seeds=tuple(options.seeds or (0,)),
        test=options.test,
        checkpoint=options.checkpoint,
        published=not (options.arm or options.ablation or options.runs),
        device=options.device,
        report=options.report,
    )
    rows: list[ComparisonRow] | None
    if options.runs:
        with _Bar() as bar:
            rows = compare_runs(experiment, _arms_of(options.runs), options.output, progress=bar.update)
    else:
        try:
            with _Bar() as bar:
                shard = parse_shard(options.shard, os.environ)
                rows = compare(experiment, options.output, shard=shard, progress=bar.update)
        except Interrupted:
            _LOG.info("the same command again goes on with the comparison")
            raise
    if rows is None:
        return 0
    text = format_comparison(rows) + "\n"
    sys.stdout.write((options.output / "comparison.json").read_text() if options.json else text)
    _LOG.info("everything is in %s", options.output)
    return 0


def _arms_of(given: Sequence[Sequence[Path]]) -> dict[str, Sequence[Path]]:
    """Runs by the name of their arm: each run of a single ``--runs`` is an arm, else each ``--runs`` is one."""
    arms = [[path] for path in given[0]] if len(given) == 1 else given
    if len(arms) < 2:
        raise UsageError("--runs needs the runs of two arms: --runs A B, or --runs A ... --runs B ...")
    folders = [path.resolve() for paths in arms for path in paths]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UsageError(f"--runs must name different runs, but {folder} comes twice")
    named = {", ".join(path.name for path in paths): paths for paths in arms}
    return named if len(named) == len(arms) else {", ".join(map(str, paths)): paths for paths in arms}


class _Bar:
    """A bar while a run's cases are measured: only then, since training shows its own."""

    def __init__(self) -> None:
        self._bars: Progress | None = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def update(self, run: str, done: int, total: int) -> None:
        """``done`` of ``total`` cases of a run are measured."""
        if self._bars is None:
            self._bars = progress_bars()
            self._bars.add_task(run, total=total)
            self._bars.start()
        self._bars.update(self._bars.task_ids[0], completed=done)
        if done == total:
            self.__exit__()
            _LOG.info("measured %d cases of %s", total, run)
