"""The folder of a run: what it was told, where it ran, what it measured."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import lungkit
from lungkit._atomic import new_folder, write_json_atomic, write_text_atomic
from lungkit._reading import read_json
from lungkit.checkpoint import LAST, PREVIOUS
from lungkit.data import Split, write_splits
from lungkit.errors import CheckpointError, UsageError
from lungkit.ops import _library

METRIC_COLUMNS = (
    "epoch",
    "step",
    "train_loss",
    "learning_rate",
    "val_dice",
    "val_iou",
    "val_ppv",
    "val_sensitivity",
    "seconds_waiting_for_data",
    "seconds_computing",
    "seconds_validating",
)


class RunFolder:
    """Files of one run.

    ``config.yaml``, ``env.json``, ``dataset.json``, ``splits_final.json``, ``metrics.csv``, ``metrics.jsonl``,
    ``train.log``, ``progress.png``, ``overlays/``, ``checkpoints/``, ``status.json`` and, at the end, ``validation.*``,
    before them ``postprocessing.json`` where one was to be chosen; ``validation/`` holds masks where they are kept,
    ``tensorboard/`` event files and ``logger.json`` the run's name with MLflow or W&B where it is logged there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.overlays = self.path / "overlays"

    @staticmethod
    def check_root(runs: str | os.PathLike[str]) -> None:
        """Refuse, before any work, a folder in which no run can be made.

        Raises:
            UsageError: it is none, or cannot be written.
        """
        path = there = Path(runs).absolute()
        try:
            there = next(parent for parent in (path, *path.parents) if parent.exists())
            with tempfile.TemporaryDirectory(dir=there):  # to try is surer than to ask
                pass
        except OSError as error:
            raise UsageError(
                f"runs: no run can be kept in {path}, as {there} cannot be written ({error.strerror}); "
                "name another folder with --runs"
            ) from error

    @classmethod
    def create(
        cls,
        runs: str | os.PathLike[str],
        name: str,
        describe: Callable[[RunFolder], None] = lambda folder: None,
    ) -> RunFolder:
        """Make ``runs/name``, or ``runs/name-2`` and so on where that exists: no run is overwritten.

        ``describe`` writes what the run is into the folder before it gets its name, so that no kill leaves a folder
        that cannot be resumed.

        Raises:
            UsageError: the folder cannot be made, or ``name`` is not that of a folder in ``runs``.
        """
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            raise UsageError(f"name is {name!r}; give the name of a folder, without a path")
        names = (Path(runs) / (name if n == 1 else f"{name}-{n}") for n in itertools.count(1))
        with new_folder(names) as new:
            folder = cls(new.path)
            folder.checkpoints.mkdir()
            folder.overlays.mkdir()
            describe(folder)
        return cls(new.path)

    @classmethod
    def latest(cls, runs: str | os.PathLike[str], name: str) -> RunFolder | None:
        """The last run called ``name``, or ``name-2`` and so on, that has a checkpoint; None without one."""
        found = []
        for path in Path(runs).glob("*"):
            number = re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", path.name)
            checkpoints = [path / "checkpoints" / kept / "manifest.json" for kept in (LAST, PREVIOUS)]
            if number and (path / "config.yaml").is_file() and any(file.is_file() for file in checkpoints):
                found.append((int(number[1] or 1), path))
        return cls.open(max(found)[1]) if found else None

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        try:
            return bool(json.loads((self.path / "status.json").read_bytes())["state"] == "finished")
        except (OSError, ValueError, LookupError, TypeError):
            return False

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """A run that exists.

        Raises:
            CheckpointError: it is not a run folder.
        """
        folder = cls(path)
        for name in ("config.yaml", "dataset.json"):
            if not (folder.path / name).is_file():
                raise CheckpointError(f"{folder.path}: not a run folder, {name} is missing")
        return folder

    @property
    def has_saved_nothing(self) -> bool:
        """Whether the run ended before its first epoch did: it can only begin again."""
        saved = (self.checkpoints / LAST, self.checkpoints / PREVIOUS, self.path / "metrics.csv")
        return not any(path.exists() for path in saved)

    def write_description(
        self, config_yaml: str, dataset: Mapping[str, Any], splits: Sequence[Split]
    ) -> None:
        """Write ``config.yaml``, ``dataset.json``, ``splits_final.json`` and ``env.json``."""
        write_text_atomic(self.path / "config.yaml", config_yaml)
        write_json_atomic(self.path / "dataset.json", dataset)
        write_splits(self.path, splits)
        write_json_atomic(self.path / "env.json", environment())

    def dataset(self) -> dict[str, Any]:
        """Contents of ``dataset.json``.

        Raises:
            CheckpointError: it is damaged.
        """
        path = self.path / "dataset.json"
        try:
            content = read_json(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: expected an object")
        return content

    def write_status(self, state: str, **details: Any) -> None:
        """Write ``status.json``: "running", "finished", "interrupted" or "failed", and details."""
        write_json_atomic(
            self.path / "status.json",
            {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **details},
        )

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write ``metrics.csv`` and ``metrics.jsonl``, a row an epoch; a value that is absent stays empty."""
        table = io.StringIO()
        writer = csv.DictWriter(table, METRIC_COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text_atomic(self.path / "metrics.csv", table.getvalue())
        write_text_atomic(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def environment() -> dict[str, Any]:
    """Versions, platform and devices of this process."""
    packages = ("torch", "numpy", "nibabel", "safetensors", "lightning-fabric", "monai")
    versions: dict[str, str | None] = {"lungkit": lungkit.__version__}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "versions": versions,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "kernels": {"cpu": _library.cpu_isa(), "cuda": _library.CUDA_LIBRARY.loaded},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else [],
    }
