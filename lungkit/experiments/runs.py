"""Runs of an experiment: trained, continued where they were interrupted, or taken as they are."""

from __future__ import annotations

import csv
import functools
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lungkit._reading import read_json
from lungkit.checkpoint import LAST
from lungkit.data import Dataset, NanPolicy, open_dataset
from lungkit.data.splits import patients
from lungkit.errors import CheckpointError, DataError
from lungkit.experiments.arms import Arm
from lungkit.inference import Predictor
from lungkit.pipeline.labelled import LabelledScans
from lungkit.training.config_io import load_config
from lungkit.training.planning import Plan, prepare
from lungkit.training.run_folder import RunFolder
from lungkit.training.trainer import Trainer

_LOG = logging.getLogger("lungkit")


def train_or_resume(arm: Arm, runs: Path, fold: int, seed: int, *, name: str | None = None) -> Path:
    """Folder of the finished run of an arm: found finished, continued, or trained from the start.

    ``runs`` holds the runs of one experiment only, so that a run is known by its name, by default that of the arm.

    Raises:
        Interrupted: the run was stopped and saved; calling again continues it.
    """
    name = name or arm.run_name(fold, seed)
    finished, found = found_finished(runs, name), _latest(runs, name)
    if finished is not None:
        _LOG.info("%s: finished already", finished)
        return finished
    # A run of an earlier version may have died before it was described; one that had saved nothing begins again.
    if found is not None and (found / "dataset.json").is_file():
        return Trainer.from_run(found).fit().run_folder
    return Trainer(replace(arm.run_config(runs, fold, seed), name=name)).fit().run_folder


def found_finished(runs: Path, name: str) -> Path | None:
    """Folder of the run of this name, where it is finished."""
    found = _latest(runs, name)
    return found if found is not None and _state(found) == "finished" else None


def _latest(runs: Path, name: str) -> Path | None:
    """The newest of ``name``, ``name-2``, ... that holds a configuration: a run that died early may be repeated."""
    numbered = re.compile(re.escape(name) + r"(?:-(\d+))?")
    found = {}
    for path in runs.glob(f"{name}*"):
        match = numbered.fullmatch(path.name)
        if match and (path / "config.yaml").is_file():
            found[int(match[1] or 1)] = path
    return found[max(found)] if found else None


def _state(run: Path) -> str:
    try:
        return str(read_json(run / "status.json")["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def finished_run(path: Path) -> Path:
    """A run folder given by the user.

    Raises:
        CheckpointError: it is not a run folder, or the run is not finished.
    """
    folder = RunFolder.open(path).path
    state = _state(folder)
    if state != "finished":
        raise CheckpointError(f"{folder}: the run is {state}; finish it with lungkit-train --resume {folder}")
    return folder


def check_same_labels(test: Dataset, label_map: Mapping[int, int], labels: object) -> None:
    """A dataset to measure on must mean by its labels what the one that was trained on does.

    Raises:
        DataError: it does not; the message shows both.
    """
    if test.label_map != dict(label_map):
        raise DataError(f"{test.root}: its labels {test.labels} are not those of the run, {labels}")


def epoch_rows(run: Path) -> list[dict[str, str]]:
    """What a run measured, a row an epoch."""
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, its model, and the scans that it is measured on."""

    path: Path
    plan: Plan
    scans: LabelledScans
    weights: Path
    """The checkpoint that is measured."""
    device: str | None
    patients: Mapping[str, str]
    """Whose each of the cases is."""
    readers: int | None = None
    """How many readers the run was told of."""

    @classmethod
    def open(
        cls, path: Path, *, checkpoint: str = LAST, test: Path | None = None, device: str | None = None
    ) -> FinishedRun:
        """Load a run, to be measured on its held-out fold or on every labelled case of the dataset ``test``.

        It predicts as ``lungkit-predict --model RUN/checkpoints/CHECKPOINT`` does, on ``device`` or, where it is None,
        on the GPU where there is one.

        Raises:
            CheckpointError, DataError: the run or a dataset cannot be used.
        """
        folder = RunFolder.open(path)
        config = load_config(folder.path / "config.yaml")
        prepared = prepare(config, known=folder.dataset())
        dataset, case_ids = prepared.dataset, prepared.split.val
        if test is not None:
            dataset = open_dataset(test)
            check_same_labels(dataset, prepared.preprocessing.label_map, prepared.dataset.labels)
            case_ids = tuple(case.case_id for case in dataset.cases if case.label is not None)
        # The pattern is for the ids of the training data.
        groups = patients(dataset, None if test is not None else config.data.patient_pattern)
        return cls(
            folder.path,
            prepared.plan,
            LabelledScans(dataset, case_ids, config.data.max_voxels, NanPolicy(config.data.nan)),
            folder.checkpoints / checkpoint,
            device,
            {case_id: groups[case_id] for case_id in case_ids},
            config.data.readers,
        )

    @functools.cached_property
    def predictor(self) -> Predictor:
        """Loaded where it is used: of many runs, those that were measured before need none."""
        return Predictor.from_run(self.weights, device=self.device)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.predictor.models[0].network.parameters())
