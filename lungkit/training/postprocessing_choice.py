"""Which postprocessing pays, tried on the validation cases of a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lungkit._atomic import write_json_atomic
from lungkit.checkpoint import BEST, describe_checkpoint
from lungkit.data import CachedCase, Preprocessing
from lungkit.data.dataset import IGNORE_INDEX
from lungkit.inference import Postprocessing
from lungkit.inference.classes import classes_from_probabilities, largest
from lungkit.inference.lungs import lung_mask, near_lungs
from lungkit.inference.postprocessing import (
    LUNG_MARGIN_MM,
    Lesions,
    fill_holes,
    foreground_box,
    postprocess,
    voxels_of,
)
from lungkit.metrics import overlap_metrics
from lungkit.training.engine import gather_objects, on_first_process
from lungkit.training.planning import Plan
from lungkit.training.run_folder import RunFolder
from lungkit.training.session import Session
from lungkit.training.validation import Predict, stream_logits_of

MARGIN = 0.002
"""By how much the mean Dice must rise for an option to be kept."""
# Nearest to 1/2 first: of equal ones the first is taken.
_THRESHOLDS = (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8)
_SIZES_ML = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# Windows that tell free air from lung and lung from tissue.
_LUNG_WINDOW_HU = (-980.0, -300.0)


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
            f"{self.dice_without:.4f} to {self.dice:.4f} on the grid of training."
        )

    def predict(self, preprocessing: Preprocessing) -> Predict:
        """Prediction of cached cases with :attr:`options` applied, on the grid of the cache."""

        def predict(network: nn.Module, case: CachedCase, plan: Plan) -> np.ndarray:
            label = np.zeros(case.shape, np.uint8)
            for first, last, rows in stream_logits_of(network, case, plan):
                classes = classes_from_probabilities(rows.softmax(0), self.options.threshold)
                label[first:last] = classes.cpu().numpy()
            hu = hu_of(case, preprocessing) if self.options.inside_lungs else None
            return postprocess(label, case.spacing_mm, self.options, hu=hu)

        return predict

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
    network: nn.Module,
    cases: Sequence[CachedCase],
    plan: Plan,
    class_names: Sequence[str],
    preprocessing: Preprocessing,
    *,
    rank: int = 0,
    world_size: int = 1,
    after_case: Callable[[], None] | None = None,
) -> Choice:
    """Try the options of :class:`~lungkit.inference.Postprocessing` one after the other on validation cases.

    Threshold, holes, lesions outside the lungs (where the cases are in HU), small lesions: of each the value with the
    highest mean Dice is kept if it beats going without by more than :data:`MARGIN`, together with what was kept before.
    Dice is that of the table of validation during training: on the grid of the cache, mean over the cases of each
    class, then over the classes.

    Every case is predicted once, and all that is tried is counted before the next: 3 bytes a voxel, and no
    probabilities. With several processes each takes its share of the cases; all return the same.

    Args:
        network: with the weights to choose for.
        cases: validation cases; truth that is to be ignored is left out.
        plan: of the run.
        class_names: of all classes, the background first.
        preprocessing: that of the cases.
        rank: of this process.
        world_size: processes.
        after_case: called after each case; may raise to give up.
    """
    in_hu = _shows_lungs(preprocessing)
    thresholds = tuple(
        t for t in _THRESHOLDS if t != 0.5 or len(class_names) > 2
    )  # of two classes 0.5 is argmax
    mine = []
    for case in cases[rank::world_size]:
        hu = hu_of(case, preprocessing) if in_hu else None
        logits = stream_logits_of(network, case, plan)
        mine.append((case.case_id, _count(case, logits, thresholds, len(class_names), hu)))
        if after_case is not None:
            after_case()
    counts = dict(entry for part in gather_objects(mine, world_size) for entry in part)
    values: dict[str, tuple[Any, ...]] = {
        "threshold": (None, *thresholds),
        "fill_holes": (False, True),
        "inside_lungs": (False, True) if in_hu else (False,),
        "smallest_lesion_ml": (0.0, *_SIZES_ML),
    }
    if not counts:
        return Choice(Postprocessing(), math.nan, math.nan, ())
    dice = overlap_metrics(np.stack([counts[case.case_id] for case in cases]))["dice"]
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
    case: CachedCase,
    logits: Iterator[tuple[int, int, Tensor]],
    thresholds: Sequence[float],
    num_classes: int,
    hu: np.ndarray | None,
) -> np.ndarray:
    """TP, FP and FN of every foreground class for all that is tried.

    int64 (1 + thresholds, 2, 2 or 1, 1 + sizes, classes - 1, 3); the axes are those of the options.
    """
    ascending = sorted(thresholds)
    plain, likely, reached = (np.zeros(case.shape, np.uint8) for _ in range(3))
    for first, last, rows in logits:
        probabilities = rows.softmax(0)
        foreground = probabilities[1] if num_classes == 2 else probabilities[1:].sum(0)
        plain[first:last] = classes_from_probabilities(probabilities).cpu().numpy()
        likely[first:last] = (largest(probabilities[1:]) + 1).cpu().numpy()
        levels = torch.bucketize(foreground, foreground.new_tensor(ascending), right=True)
        reached[first:last] = levels.to(torch.uint8).cpu().numpy()
    truth = np.asarray(case.label)
    sizes = [voxels_of(volume, case.spacing_mm) for volume in (0.0, *_SIZES_ML)]
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
        lungs = lung_mask(hu, case.spacing_mm)
        regions.append(near_lungs(lungs, case.spacing_mm, LUNG_MARGIN_MM, box) if lungs.any() else None)
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


def choose_for_run(
    session: Session,
    folder: RunFolder,
    cases: Sequence[CachedCase],
    *,
    after_case: Callable[[], None] | None = None,
) -> Choice:
    """Choose for the weights that ``session.evaluated`` holds, those of the best checkpoint; write it down.

    ``postprocessing.json`` in the run folder says what was tried; the manifest of the best checkpoint gets the options
    as ``postprocessing``, which is what :class:`~lungkit.inference.TrainedModel` goes by.
    """
    fabric, prepared = session.fabric, session.prepared
    with fabric.autocast():
        choice = choose_postprocessing(
            session.evaluated,
            cases,
            session.plan,
            prepared.dataset.class_names,
            prepared.preprocessing,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            after_case=after_case,
        )

    def write() -> None:
        write_json_atomic(
            folder.path / "postprocessing.json", {"epoch": session.best_epoch, **choice.to_dict()}
        )
        describe_checkpoint(folder.checkpoints / BEST, postprocessing=choice.options.to_dict())

    on_first_process(fabric, write)
    return choice


def hu_of(case: CachedCase, preprocessing: Preprocessing) -> np.ndarray:
    """The first channel of a cached case in HU, as far as the window shows them; int16 (Z, Y, X)."""
    channel = preprocessing.channels[0]
    hu = np.empty(case.shape, np.int16)
    for plane, target in zip(case.image[0], hu, strict=True):
        normalised = plane.astype(np.float32) * np.float32(case.slope) + np.float32(case.intercept)
        target[:] = np.rint(normalised * np.float32(channel.std) + np.float32(channel.mean))
    return hu


def _shows_lungs(preprocessing: Preprocessing) -> bool:
    channel = preprocessing.channels[0]
    low, high = channel.window
    return channel.units == "HU" and low <= _LUNG_WINDOW_HU[0] and high >= _LUNG_WINDOW_HU[1]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
