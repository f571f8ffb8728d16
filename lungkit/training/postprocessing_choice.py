"""Which postprocessing pays, tried on the validation cases of a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lungkit.data.dataset import IGNORE_INDEX
from lungkit.data.geometry import orient, plan_geometry
from lungkit.inference import Postprocessing, Predictor
from lungkit.inference.lungs import lung_mask, near_lungs
from lungkit.inference.postprocessing import (
    LUNG_MARGIN_MM,
    Lesions,
    classes_from_probabilities,
    fill_holes,
    foreground_box,
    largest,
    voxels_of,
)
from lungkit.metrics import overlap_metrics
from lungkit.pipeline.labelled import LabelledScans
from lungkit.report.evaluation import class_indices
from lungkit.training.engine import gather_objects

MARGIN = 0.002
"""By how much the mean Dice must rise for an option to be kept."""
# Nearest to 1/2 first: of equal ones the first is taken.
_THRESHOLDS = (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8)
_SIZES_ML = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Trial:
    """One value of one option, with those kept before it, and the mean Dice that it reached."""

    option: str
    value: float | bool
    dice: float
    kept: bool


@dataclass(frozen=True)
class Choice:
    """What :func:`choose_postprocessing` found; ``dice`` is the mean with ``options``, ``dice_without`` without."""

    options: Postprocessing
    dice: float
    dice_without: float
    trials: tuple[Trial, ...]

    @property
    def note(self) -> str:
        """One sentence for the table of results."""
        if self.options == Postprocessing():
            return f"No postprocessing raised the mean Dice by more than {MARGIN:g}: none was used."
        return (
            f"Postprocessing: {self.options.summary()}; chosen on these same cases, where it raised the mean Dice from "
            f"{self.dice_without:.4f} to {self.dice:.4f}."
        )

    def to_dict(self) -> dict[str, Any]:
        """What ``postprocessing.json`` in the run folder holds."""
        return {
            "postprocessing": self.options.to_dict(),
            "dice": _or_none(self.dice),
            "dice_without": _or_none(self.dice_without),
            "margin": MARGIN,
            "tried": [{**vars(trial), "dice": _or_none(trial.dice)} for trial in self.trials],
        }


def choose_postprocessing(
    predictor: Predictor,
    scans: LabelledScans,
    *,
    rank: int = 0,
    world_size: int = 1,
    after_case: Callable[[], None] | None = None,
) -> Choice:
    """Try the options of :class:`~lungkit.inference.Postprocessing` one after the other on validation cases.

    Threshold, holes, lesions outside the lungs (where scans are in HU), small lesions: of each the value with the
    highest mean Dice is kept if it beats going without by more than :data:`MARGIN`, together with what was kept before.
    Dice is that of the final table: on the scans' own grid, mean over the cases of each class, then over the classes.

    Every case is predicted once, and all that is tried is counted before the next: 3 bytes a voxel, and no
    probabilities. With several processes each takes its share of the cases; all return the same.

    Args:
        predictor: with the weights to choose for; its own postprocessing is left out.
        scans: validation cases; truth that is to be ignored is left out.
        rank: of this process.
        world_size: processes.
        after_case: called after each case; may raise to give up.
    """
    classes = scans.dataset.num_classes
    # Of two classes 0.5 is the largest probability.
    thresholds = tuple(t for t in _THRESHOLDS if t != 0.5 or classes > 2)
    mine = []
    for case_id in scans.case_ids[rank::world_size]:
        channels, label = scans.read(case_id)
        geometry = plan_geometry(channels[0])
        truth = class_indices(label, scans.scheme, geometry)
        hu = orient(channels[0].array, geometry) if predictor.in_hu else None
        probabilities = predictor.stream_probabilities(channels)
        mine.append((case_id, _count(probabilities, truth, geometry.spacing_mm, thresholds, classes, hu)))
        if after_case is not None:
            after_case()
    counts = dict(entry for part in gather_objects(mine, world_size) for entry in part)
    values: dict[str, tuple[Any, ...]] = {
        "threshold": (None, *thresholds),
        "fill_holes": (False, True),
        "inside_lungs": (False, True) if predictor.in_hu else (False,),
        "smallest_lesion_ml": (0.0, *_SIZES_ML),
    }
    if not counts:
        return Choice(Postprocessing(), math.nan, math.nan, ())
    dice = overlap_metrics(np.stack([counts[case_id] for case_id in scans.case_ids]))["dice"]
    return _greedy(dice.nanmean(0).nanmean(-1).numpy(), values)


def _greedy(dice: np.ndarray, values: dict[str, tuple[Any, ...]]) -> Choice:
    """Choose along one axis of ``dice`` after the other; index 0 is off."""
    index = [0] * dice.ndim
    options = Postprocessing()
    trials = []
    for axis, (name, choices) in enumerate(values.items()):
        along = dice[tuple(slice(None) if at == axis else i for at, i in enumerate(index))]
        best = int(np.argmax(along))  # of NaN: the first, which is off
        if along[best] - along[0] > MARGIN:
            index[axis] = best
            options = replace(options, **{name: choices[best]})
        trials += [Trial(name, choices[i], float(along[i]), i == index[axis]) for i in range(1, len(choices))]
    return Choice(options, float(dice[tuple(index)]), float(dice[(0,) * dice.ndim]), tuple(trials))


def _count(
    stream: Iterator[tuple[int, int, Tensor]],
    truth: np.ndarray,
    spacing_mm: tuple[float, float, float],
    thresholds: Sequence[float],
    num_classes: int,
    hu: np.ndarray | None,
) -> np.ndarray:
    """TP, FP and FN of every foreground class for all that is tried.

    int64 (1 + thresholds, 2, 2 or 1, 1 + sizes, classes - 1, 3); the axes are those of the options.
    """
    ascending = sorted(thresholds)
    plain, likely, reached = (np.zeros(truth.shape, np.uint8) for _ in range(3))
    for first, last, probabilities in stream:
        foreground = probabilities[1] if num_classes == 2 else probabilities[1:].sum(0)
        plain[first:last] = classes_from_probabilities(probabilities).cpu().numpy()
        likely[first:last] = (largest(probabilities[1:]) + 1).cpu().numpy()
        levels = torch.bucketize(foreground.contiguous(), foreground.new_tensor(ascending), right=True)
        reached[first:last] = levels.to(torch.uint8).cpu().numpy()
    sizes = [voxels_of(volume, spacing_mm) for volume in (0.0, *_SIZES_ML)]
    box = foreground_box(np.maximum(plain, reached))
    counts = np.zeros(
        (1 + len(thresholds), 2, 1 if hu is None else 2, len(sizes), num_classes - 1, 3), np.int64
    )
    for index in range(1, num_classes):
        counts[..., index - 1, 2] = np.count_nonzero(truth == index)
    if box is None:
        return counts
    regions: list[np.ndarray | None] = [None]
    if hu is not None:
        lungs = lung_mask(hu, spacing_mm)
        regions.append(near_lungs(lungs, spacing_mm, LUNG_MARGIN_MM, box) if lungs.any() else None)
    for t, level in enumerate((None, *thresholds)):
        label = plain[box].copy() if level is None else likely[box] * (reached[box] > ascending.index(level))
        for filled in range(2):
            if filled:
                fill_holes(label)
            lesions = Lesions.find(label)
            at, found, true = lesions.numbers, label[lesions.foreground], truth[box][lesions.foreground]
            # A lesion is of one class: what is tried on it only keeps or removes it.
            counted, total = true != IGNORE_INDEX, len(lesions.sizes)
            predicted = np.bincount(at[counted], minlength=total)
            right = np.bincount(at[counted & (true == found)], minlength=total)
            class_of = np.zeros(total, np.int64)
            class_of[at] = found
            for (r, region), (s, smallest) in itertools.product(enumerate(regions), enumerate(sizes)):
                kept = lesions.kept(smallest=smallest, region=region)
                for index in range(1, num_classes):
                    chosen = kept & (class_of == index)
                    positives = int(right[chosen].sum())
                    counts[t, filled, r, s, index - 1] += (
                        positives,
                        int(predicted[chosen].sum()) - positives,
                        -positives,
                    )
    return counts


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
