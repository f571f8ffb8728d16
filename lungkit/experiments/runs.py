"""Runs of an experiment: trained, continued where they were interrupted, or taken as they are."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lungkit.checkpoint import LAST, load_checkpoint
from lungkit.data import CachedCase, CaseCache, Dataset, open_dataset, read_volume, restore_label
from lungkit.data.dataset import IGNORE_INDEX, map_labels
from lungkit.data.geometry import orient, plan_geometry
from lungkit.errors import CheckpointError, DataError
from lungkit.experiments.arms import Arm
from lungkit.inference import attention_map
from lungkit.inference.trained_model import load_network
from lungkit.metrics import CaseTable, MetricOptions, measure_case
from lungkit.nn import AttentionUNet, MonaiAttentionUNet
from lungkit.training.config_io import load_config
from lungkit.training.planning import Prepared, cache_folder, prepare
from lungkit.training.run_folder import RunFolder
from lungkit.training.trainer import Trainer
from lungkit.training.validation import predict

_LOG = logging.getLogger("lungkit")


def train_or_resume(arm: Arm, runs: Path, fold: int, seed: int) -> Path:
    """Folder of the finished run of an arm: found finished, continued, or trained from the start.

    ``runs`` holds the runs of one experiment only, so that a run is known by its name.

    Raises:
        Interrupted: the run was stopped and saved; calling again continues it.
    """
    found = _latest(runs, arm.run_name(fold, seed))
    if found is not None and _state(found) == "finished":
        _LOG.info("%s: finished already", found)
        return found
    if found is not None and (found / "checkpoints" / LAST).is_dir():
        return Trainer.from_run(found).fit().run_folder
    return Trainer(arm.run_config(runs, fold, seed)).fit().run_folder


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
        return str(json.loads((run / "status.json").read_bytes())["state"])
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


@dataclass
class LoadedRun:
    """A trained network with the data it was trained on."""

    path: Path
    network: nn.Module
    prepared: Prepared
    cache: CaseCache
    dataset: Dataset
    """The cases to measure are of this dataset: the run's own, or another one."""
    case_ids: tuple[str, ...]

    @classmethod
    def open(cls, path: Path, *, checkpoint: str = LAST, test: Path | None = None) -> LoadedRun:
        """Load a run, to be measured on its held-out fold or on every labelled case of the dataset ``test``.

        Raises:
            CheckpointError, DataError: the run or a dataset cannot be used.
        """
        folder = RunFolder.open(path)
        config = load_config(folder.path / "config.yaml")
        prepared = prepare(config, known=folder.dataset())
        loaded = load_checkpoint(folder.checkpoints / checkpoint, with_trainer=False)
        network = load_network(loaded).to("cuda" if torch.cuda.is_available() else "cpu").eval()
        dataset, case_ids = prepared.dataset, prepared.split.val
        if test is not None:
            dataset = open_dataset(test)
            check_same_labels(dataset, prepared.preprocessing.label_map, prepared.dataset.labels)
            case_ids = tuple(case.case_id for case in dataset.cases if case.label is not None)
        cache = CaseCache(
            cache_folder(config) / "cases", dataset, prepared.preprocessing, max_voxels=config.data.max_voxels
        )
        return cls(folder.path, network, prepared, cache, dataset, case_ids)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def labels(self) -> dict[str, int]:
        """Class name -> index."""
        return {name: index for index, name in enumerate(self.dataset.class_names)}

    def case(self, case_id: str) -> CachedCase:
        """A preprocessed case."""
        return self.cache.prepare(case_id)

    def attention(self, case: CachedCase, slice_index: int) -> np.ndarray | None:
        """The finest attention map of one slice (Y, X), or None where the network has no attention gates."""
        if not isinstance(self.network, (AttentionUNet, MonaiAttentionUNet)):
            return None
        plan = self.prepared.plan
        image = torch.from_numpy(case.image_float()).to(next(self.network.parameters()).device)
        alpha = attention_map(
            self.network,
            image,
            plan.patch_size,
            slice_index,
            whole_slices=plan.dims == 2,
            context_slices=plan.context_slices,
        )
        return alpha.cpu().numpy()

    def predict(self, case: CachedCase) -> np.ndarray:
        """Label map of a case on the grid of the cache, uint8 (Z, Y, X)."""
        return predict(self.network, case, self.prepared.plan)

    def measure(self, options: MetricOptions, *, progress: Any = None) -> CaseTable:
        """Every metric of every case, on the scan's own grid against the mask as its file has it."""
        table = CaseTable(empty=options.empty)
        for number, case_id in enumerate(self.case_ids, start=1):
            prediction, truth, spacing_mm = self._on_own_grid(case_id)
            measured = measure_case(
                prediction, truth, self.labels, spacing_mm, options=options, ignore_index=IGNORE_INDEX
            )
            for label, measurement in measured.items():
                table.add_row(case_id, label, measurement.values, measurement.touched)
            if progress is not None:
                progress(number, len(self.case_ids))
        return table

    def _on_own_grid(self, case_id: str) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
        path = self.dataset.case(case_id).label
        if path is None:
            raise DataError(f"case {case_id} has no label to measure against")
        volume = read_volume(path)
        # Resampled to predict, measured where the readers drew: a coarse grid must not flatter a model.
        resampled = plan_geometry(volume, target_spacing_mm=self.prepared.preprocessing.target_spacing_mm)
        stored = restore_label(self.predict(self.case(case_id)), resampled)
        truth = map_labels(volume.array, self.dataset.label_map, str(path))
        own = plan_geometry(volume)
        return orient(stored, own), orient(truth, own), own.spacing_mm
