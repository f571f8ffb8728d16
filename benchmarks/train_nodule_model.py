"""Trains a model of nodules: on all patients, and once without each fifth of them for its figures.

    python benchmarks/train_nodule_model.py LIDC_FOLDER WORK_FOLDER [--epochs 12] [--processes 6] [OPTIONS]

LIDC_FOLDER is the set of nodule stacks in nnU-Net raw layout, with its five folds (split by patient); OPTIONS are those
of lungkit-train, and the card of the packaged model names those that it was trained with. WORK_FOLDER gets ``data``
(links to the set, with a sixth fold that trains on everything but one stack of a patient with several: a run needs
something to validate, and that number means nothing), ``runs/fold-0`` to ``runs/fold-4`` and ``runs/all``.
Nothing is chosen on held-out cases: the weights are those at the end of the budget. ``benchmarks/nodule_model.py
LIDC_FOLDER --folds WORK_FOLDER/runs`` then measures the out-of-fold figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

STEPS_PER_EPOCH = 800
FOLDS = 5
_TRAIN = (sys.executable, "-c", "import sys; from lungkit.cli.train import main; sys.exit(main())")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not there yet; 1 where a run failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--epochs", type=int, default=12, help=f"of {STEPS_PER_EPOCH} steps")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", nargs="*", help="names of runs, as fold-0 or all")
    options, options.more = parser.parse_known_args(arguments)  # what is left is for lungkit-train
    make_dataset(options.data.resolve(), options.work / "data")
    todo = [name for name in _runs() if not options.only or name in options.only]
    running: list[subprocess.Popen[bytes]] = []
    failed = 0
    while todo or running:
        while todo and len(running) < options.processes:
            running.append(_start(options, todo.pop(0)))
        failed += running.pop(0).wait() != 0
    return 1 if failed else 0


def make_dataset(source: Path, target: Path) -> None:
    """Links to the set, and its folds with one more."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("imagesTr", "labelsTr", "dataset.json"):
        with contextlib.suppress(FileExistsError):  # of an earlier start, or of one beside
            (target / name).symlink_to(source / name)
    folds = json.loads((source / "splits_final.json").read_text())
    everything = sorted(folds[0]["train"] + folds[0]["val"])
    stacks = Counter(name.split("_")[0] for name in everything)
    spared = next(name for name in everything if stacks[name.split("_")[0]] > 1)
    folds.append({"train": [name for name in everything if name != spared], "val": [spared]})
    (target / "splits_final.json").write_text(json.dumps(folds))


def _runs() -> dict[str, int]:
    return {**{f"fold-{fold}": fold for fold in range(FOLDS)}, "all": FOLDS}


def _start(options: argparse.Namespace, name: str) -> subprocess.Popen[bytes]:
    work: Path = options.work
    command = [
        *_TRAIN, "--data", str(work / "data"), "--data.cache", str(work / "cache"),
        "--data.fold", str(_runs()[name]), "--epochs", str(options.epochs), "--steps_per_epoch", str(STEPS_PER_EPOCH),
        "--validate_every", str(options.epochs),
        "--runs", str(work / "runs"), "--name", name, "--quiet",
        *options.more,
    ]  # fmt: skip
    if (work / "runs" / name).is_dir():
        command = [*_TRAIN, "--resume", str(work / "runs" / name), "--quiet"]
    with (work / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ)


if __name__ == "__main__":
    sys.exit(main())
