"""``lungkit-train``: train a U-Net or an Attention U-Net on a folder of CT scans, or on the built-in phantom."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import lungkit
from lungkit.cli._common import run_command
from lungkit.cli._parser import CommandParser
from lungkit.cli._shares import parse_shard
from lungkit.errors import UsageError
from lungkit.training.config import TrainConfig
from lungkit.training.config_io import option_choices

if TYPE_CHECKING:
    from lungkit.training.run_folder import RunFolder
    from lungkit.training.trainer import Trainer

_LOG = logging.getLogger("lungkit")

_PREVIEW_PATCHES = 5

_EPILOG = """
options of the configuration, those that are used most:
  --data DIR                 dataset: nnU-Net raw, Decathlon, or images/ and masks/ (default: the built-in phantom)
  --model NAME               unet or attention-unet (default: attention-unet)
  --epochs N                 (default: by the dataset), likewise --steps_per_epoch N and --batch_size N
  --max_minutes M            train for M minutes; the learning rate reaches its end when the time does
  --data.patch_size Y X      in voxels, or Z Y X; --data.spacing_mm, --data.window (default: by the dataset)
  --model.features 32 64 ..  channels per level (default: by the dataset)
  --optimiser.learning_rate, --loss.dice_weight, --loss.ce_weight, --augment.enabled false, --engine.precision ...
  --init RUN|MODEL           begin with the weights of a run, a checkpoint or a model of lungkit-models list
  --init.freeze encoder      and train the decoder alone
  --device cuda:1            or cpu, cuda (default: the GPU where there is one)
  --data.fold K              which fold validates (default: 0), of --data.folds N (default: 5)
  --seed N                   of weights, patches, augmentation and dropout (default: 0)
  --logger NAME              also log to tensorboard, mlflow or wandb (pip install 'lungkit[NAME]')
  --runs DIR, --name NAME    the run is kept in DIR/NAME (default: runs, and a name from data and model)
  --config FILE              a YAML file of options; options after it change what it says
All of them: --help-options says what they are and do, --print-config shows them as a YAML file for --config.
Examples:
  lungkit-train                                         the CT phantom, a few minutes on a laptop
  lungkit-train --data DIR --model unet                 your scans: nnU-Net raw, Decathlon, or images/ and masks/
  lungkit-train --config run.yaml --epochs 100          a YAML file and changes to it
  lungkit-train --data DIR --model.features 32 64 128 256 --data.patch_size 96 96 96
  lungkit-train --data DIR --fold all --name NAME       every fold; lungkit-predict --model runs/NAME is their ensemble
  lungkit-train --resume runs/NAME                      go on where a run stopped
  lungkit-train --resume runs/NAME --epochs 60          train it to 60 epochs in all, though it was finished
  lungkit-train --data DIR --init lidc-nodules          fine-tune a trained model on your scans
Exit codes: 0 ok, 2 usage, 3 bad data, 4 checkpoint, 5 resources, 75 interrupted and saved.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = CommandParser(
        more=option_choices,
        prog="lungkit-train",
        description="Train a U-Net or an Attention U-Net on CT scans.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--resume",
        metavar="RUN|auto",
        help="continue the run in this folder; auto: that of --name where there is one, else begin it, so that a "
        "scheduler can start the same command again and again",
    )
    parser.add_argument(
        "--checkpoint",
        choices=("last", "previous"),
        help="which checkpoint --resume continues (default: last)",
    )
    parser.add_argument(
        "--fold",
        metavar="K|all",
        help="which fold validates, as --data.fold; all trains a run for each in RUNS/NAME/fold-K and measures every "
        "case by the run that did not see it (needs --name); the same command again goes on",
    )
    parser.add_argument(
        "--shard", metavar="I/N", help="with --fold all: train share I (from 0) of the folds; or auto"
    )
    parser.add_argument(
        "--help-options", action="store_true", help="explain every option of the configuration"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the configuration as YAML and stop"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="read and build everything, train one step; leaves no run, only the cache of preprocessed scans",
    )
    parser.add_argument(
        "--preview-augmentation",
        metavar="FILE",
        nargs="?",
        const="augmentation.png",
        help="write a picture of augmented patches and stop",
    )
    parser.add_argument(
        "--no-report",
        action="store_true",
        help="no report.html and pages for the browser, as --report false",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the run's folder and result as JSON on standard output"
    )
    parser.add_argument("--version", action="version", version=lungkit.__version__)
    return run_command(lambda: _run(*parser.parse_known_args(arguments)))


def _run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from lungkit.training.config_io import config_to_yaml, describe_options, parse_arguments
    from lungkit.training.trainer import Trainer

    if options.fold is not None and options.fold != "all":
        rest = [*rest, "--data.fold", options.fold]
    if options.shard is not None and options.fold != "all":
        raise UsageError("--shard shares out the folds of --fold all; give that too")
    if options.help_options:
        sys.stdout.write(describe_options())
        return 0
    if options.checkpoint is not None and options.resume is None:
        raise UsageError("--checkpoint says which checkpoint --resume continues; give --resume RUN too")
    if options.no_report:
        rest = [*rest, "--report", "false"]
    if options.resume == "auto":
        found = _run_to_continue(parse_arguments(rest))
        if found is not None and found.is_finished:
            saved = ["--config", str(found.path / "config.yaml")]
            if parse_arguments(saved).epochs == parse_arguments([*saved, *rest]).epochs:
                _LOG.info("%s is finished; nothing is left to do", found.path)
                return 0
        options.resume = None if found is None else str(found.path)
    if options.resume is not None:
        others = ("print_config", "dry_run", "preview_augmentation", "fold")
        given = ["--" + name.replace("_", "-") for name in others if getattr(options, name)]
        if given:
            raise UsageError(f"--resume continues a run; {given[0]} is for a new one, leave one of them out")
        trainer = _resumed(options, rest)
    else:
        config = parse_arguments(rest)
        config.validate()
        if config.init.model is not None:
            _check_initial(config, rest)
        if options.print_config:
            sys.stdout.write(config_to_yaml(config))
            return 0
        if options.preview_augmentation is not None:
            return _preview(config, Path(options.preview_augmentation))
        if options.fold == "all" and not options.dry_run:
            return _all_folds(config, options)
        trainer = Trainer(config)
    if options.dry_run:
        _LOG.info("%s\ndry run: everything was read and built, one step trained", trainer.dry_run().summary())
        return 0
    result = trainer.fit()
    if options.json:
        means = {name: result.table.mean(name) for name in result.table.metrics}
        content = {
            "run": str(result.run_folder),
            "epochs": result.epochs,
            "best_epoch": result.best_epoch,
            "validation": {name: None if math.isnan(value) else value for name, value in means.items()},
        }
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    return 0


def _check_initial(config: TrainConfig, rest: Sequence[str]) -> None:
    """Refuse options that do not fit the model of --init before anything is read."""
    from lungkit.training.config_io import named_options
    from lungkit.training.initialisation import load_initial, with_initial

    initial = load_initial(config.init)
    if initial is not None:
        with_initial(config, initial, named=named_options(rest))


def _all_folds(config: TrainConfig, options: argparse.Namespace) -> int:
    from lungkit.experiments.cross_validation import cross_validate

    table = cross_validate(config, shard=parse_shard(options.shard, os.environ))
    if options.json and table is not None and config.name is not None:
        means = {name: table.mean(name) for name in table.metrics}
        content = {
            "folder": str(Path(config.runs) / config.name),
            "out_of_fold": {name: None if math.isnan(value) else value for name, value in means.items()},
        }
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    return 0


def _run_to_continue(config: TrainConfig) -> RunFolder | None:
    from lungkit.training.run_folder import RunFolder

    if config.name is None:
        raise UsageError("--resume auto finds the run by its name; give --name too")
    return RunFolder.latest(config.runs, config.name)


def _resumed(options: argparse.Namespace, rest: Sequence[str]) -> Trainer:
    from lungkit.checkpoint import LAST
    from lungkit.training.config_io import EXTENSIBLE, MOVABLE, config_differences, parse_arguments
    from lungkit.training.initialisation import absolute_or_name
    from lungkit.training.run_folder import RunFolder
    from lungkit.training.trainer import Trainer

    path = RunFolder.open(options.resume).path / "config.yaml"
    saved = parse_arguments(["--config", str(path)])
    asked = parse_arguments(["--config", str(path), *rest])
    asked = replace(asked, init=replace(asked.init, model=absolute_or_name(asked.init.model)))
    changes = config_differences(saved, asked)
    refused = [change for name, change in changes.items() if name not in (*MOVABLE, *EXTENSIBLE)]
    if refused:
        raise UsageError(
            f"--resume continues a run as it was started, but these options differ: {'; '.join(refused)}. "
            "Leave them out, or start a new run (with --init it begins with this run's weights)"
        )
    for change in changes.values():
        _LOG.info("%s", change)
    return Trainer(asked, resume=options.resume, checkpoint=options.checkpoint or LAST)


def _preview(config: TrainConfig, path: Path) -> int:
    from lungkit.data import PatchSampler, save_augmentation_preview
    from lungkit.training.initialisation import load_initial
    from lungkit.training.planning import prepare, prepare_cases
    from lungkit.training.progress import Display
    from lungkit.training.session import augmenter_geometry

    if path.suffix.lower() != ".png":
        raise UsageError(f"--preview-augmentation {path} does not end with .png; the picture is a PNG")
    if path.exists():
        raise UsageError(f"--preview-augmentation {path} exists; name another file, or remove it")
    with Display() as display:
        prepared = prepare(config, initial=load_initial(config.init), progress=display.preparing)
        train, _ = prepare_cases(prepared, config, progress=display.preparing)
    sampler = PatchSampler(train, prepared.plan.patch_size, foreground_fraction=1.0, seed=config.seed)
    images, labels = sampler.batch(range(_PREVIEW_PATCHES))
    save_augmentation_preview(
        path, images, labels, config.augment, seed=config.seed, **augmenter_geometry(prepared)
    )
    _LOG.info("wrote %s", path)
    return 0
