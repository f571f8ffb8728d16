"""Which postprocessing pays, tried on the validation cases of a run, and what it gives cases without a say in it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lungkit.data.dataset import IGNORE_INDEX
from lungkit.data.geometry import orient, plan_geometry
from lungkit.inference import Postprocessing, Predictor
from lungkit.inference.lesions import Lesions, beside_largest, voxels_of
from lungkit.inference.lungs import lung_mask, near_lungs
from lungkit.inference.postprocessing import (
    LUNG_MARGIN_MM,
    PROBABILITY_STEPS,
    classes_from_probabilities,
    fill_holes,
    foreground_box,
    foreground_probability,
    largest,
    probability_steps,
)
from lungkit.metrics import label_lesions, overlap_metrics
from lungkit.pipeline.labelled import LabelledScans
from lungkit.report.evaluation import class_indices
from lungkit.training.engine import gather_objects

Criterion = Literal["dice", "lesion_f1"]

MARGIN = 0.002
"""By how much the mean Dice (or lesion F1) must rise for an option to be kept."""
# Nearest to 1/2 first: of equal ones the first is taken.
_THRESHOLDS = (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8)
_SURE = (0.6, 0.7, 0.8, 0.9, 0.95)
_GROUPS = 5
_SIZES_ML = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_SHARES = (0.1, 0.2, 0.3, 0.5, 1.0)


@dataclass(frozen=True)
class Trial:
    """One value of one option, with those kept before it, and the mean Dice and lesion F1 that it reached."""

    option: str
    value: float | bool
    dice: float
    kept: bool
    lesion_f1: float = math.nan


@dataclass(frozen=True)
class Choice:
    """What :func:`choose_postprocessing` found; ``dice`` is the mean with ``options``, ``dice_without`` without.

    ``by`` is what it was chosen by; lesion F1 is given as Dice is. ``held_out`` is the mean Dice and lesion F1 where
    every case is measured with what the cases of other patients chose (cross-fitting); NaN where there is one patient.
    """

    options: Postprocessing
    dice: float
    dice_without: float
    trials: tuple[Trial, ...]
    by: Criterion = "dice"
    lesion_f1: float = math.nan
    lesion_f1_without: float = math.nan
    held_out: tuple[float, float] = (math.nan, math.nan)

    @property
    def note(self) -> str:
        """What a table of results says of it."""
        measure = {"dice": "mean Dice", "lesion_f1": "mean lesion F1"}[self.by]
        if self.options == Postprocessing():
            return f"No postprocessing raised the {measure} by more than {MARGIN:g}: none was used."
        before, after, honest = (
            (self.dice_without, self.dice, self.held_out[0])
            if self.by == "dice"
            else (self.lesion_f1_without, self.lesion_f1, self.held_out[1])
        )
        note = (
            f"Postprocessing: {self.options.summary()}; chosen on these same cases, where it raised the {measure} from "
            f"{before:.4f} to {after:.4f}."
        )
        if math.isnan(honest):
            return note
        return (
            f"{note} Chosen for each case on those of other patients, so that none has a say in how it is measured, it "
            f"is {honest:.4f}: expect that of new patients."
        )

    def to_dict(self) -> dict[str, Any]:
        """What ``postprocessing.json`` in the run folder holds."""
        return {
            "postprocessing": self.options.to_dict(),
            "dice": _or_none(self.dice),
            "dice_without": _or_none(self.dice_without),
            "chosen_by": self.by,
            "lesion_f1": _or_none(self.lesion_f1),
            "lesion_f1_without": _or_none(self.lesion_f1_without),
            "margin": MARGIN,
            "dice_held_out": _or_none(self.held_out[0]),
            "lesion_f1_held_out": _or_none(self.held_out[1]),
            "tried": [
                {**vars(trial), "dice": _or_none(trial.dice), "lesion_f1": _or_none(trial.lesion_f1)}
                for trial in self.trials
            ],
        }


def choose_postprocessing(
    predictor: Predictor,
    scans: LabelledScans,
    *,
    by: Criterion = "dice",
    patients: Mapping[str, str] | None = None,
    rank: int = 0,
    world_size: int = 1,
    after_case: Callable[[], None] | None = None,
) -> Choice:
    """Try the options of :class:`~lungkit.inference.Postprocessing` one after the other on validation cases.

    Threshold, holes, lesions outside the lungs (where scans are in HU), lesions nowhere sure, small lesions, lesions
    beside a larger one: of each the value with the highest mean Dice is kept if it beats going without by more than
    :data:`MARGIN`, together with what was kept before. Dice is that of the final table: on the scans' own grid, mean
    over the cases of each class, then over the classes. By "lesion_f1" it is the lesion F1, a lesion being found where
    one voxel is shared, and the mean Dice may not fall by more than the margin: for false pieces, which Dice hardly
    sees.

    A number of cases that were chosen on flatters. So the patients are divided into up to five groups, the choice is
    made again without each of them, and its cases are measured with that: :attr:`Choice.held_out`.

    Every case is predicted once, and all that is tried is counted before the next: 3 bytes a voxel, and no
    probabilities. With several processes each takes its share of the cases; all return the same.

    Args:
        predictor: with the weights to choose for; its own postprocessing is left out.
        scans: validation cases; truth that is to be ignored is left out.
        by: "dice" or "lesion_f1".
        patients: whose each case is; None takes each for a patient of its own.
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
        "lesion_probability": (0.0, *_SURE),
        "smallest_lesion_ml": (0.0, *_SIZES_ML),
        "lesion_share": (0.0, *_SHARES),
    }
    if not counts:
        return Choice(Postprocessing(), math.nan, math.nan, ())
    stacked = np.stack([counts[case_id] for case_id in scans.case_ids])
    dice = overlap_metrics(stacked[..., :3])["dice"].numpy()
    f1 = _lesion_f1(stacked[..., 3:])

    def chosen_on(cases: np.ndarray) -> tuple[Choice, tuple[int, ...]]:
        mean_dice, mean_f1 = (_mean(metric[cases]) for metric in (dice, f1))
        return _greedy(mean_dice, mean_f1, values, by)

    choice, _ = chosen_on(np.arange(len(stacked)))
    groups = _groups([(patients or {}).get(case_id, case_id) for case_id in scans.case_ids])
    if not groups.any():
        return choice
    honest = [np.full((len(stacked), classes - 1), math.nan) for _ in range(2)]
    for group in np.unique(groups):
        _, index = chosen_on(np.flatnonzero(groups != group))
        at = (groups == group, *index)
        for metric, kept in zip((dice, f1), honest, strict=True):
            kept[groups == group] = metric[at]
    return replace(choice, held_out=(float(_mean(honest[0])), float(_mean(honest[1]))))


def _mean(metric: np.ndarray) -> np.ndarray:
    """Of the cases (first axis), then of the classes (last); what is not defined is left out."""
    return torch.from_numpy(metric).nanmean(0).nanmean(-1).numpy()


def _groups(owners: Sequence[str]) -> np.ndarray:
    """A group for each case by its patient: 0 to at most :data:`_GROUPS` - 1."""
    numbers = {patient: number % _GROUPS for number, patient in enumerate(dict.fromkeys(owners))}
    return np.array([numbers[patient] for patient in owners])


def _lesion_f1(counts: np.ndarray) -> np.ndarray:
    """Lesion F1 of counts (..., 4): true lesions, those found, predicted ones, those that are real; NaN of none."""
    true, found, predicted, real = np.moveaxis(counts.astype(np.float64), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity, precision = found / true, real / predicted
        f1 = 2 * sensitivity * precision / (sensitivity + precision)
    f1 = np.where((found == 0) | (real == 0), 0.0, f1)
    return np.where(true + predicted == 0, math.nan, f1)


def _greedy(
    dice: np.ndarray, lesion_f1: np.ndarray, values: dict[str, tuple[Any, ...]], by: Criterion
) -> tuple[Choice, tuple[int, ...]]:
    """Choose along one axis after the other; index 0 is off. The choice, and where it lies in the arrays."""
    index = [0] * dice.ndim
    options = Postprocessing()
    trials = []
    for axis, (name, choices) in enumerate(values.items()):
        here = tuple(slice(None) if at == axis else i for at, i in enumerate(index))
        dice_along, f1_along = dice[here], lesion_f1[here]
        along = dice_along
        if by == "lesion_f1":
            along = np.where(dice_along >= dice_along[0] - MARGIN, f1_along, -math.inf)
        best = int(np.argmax(along))  # of NaN: the first, which is off
        if along[best] - along[0] > MARGIN:
            index[axis] = best
            options = replace(options, **{name: choices[best]})
        trials += [
            Trial(name, choices[i], float(dice_along[i]), i == index[axis], float(f1_along[i]))
            for i in range(1, len(choices))
        ]
    chosen, off = tuple(index), (0,) * dice.ndim
    choice = Choice(
        options,
        float(dice[chosen]),
        float(dice[off]),
        tuple(trials),
        by,
        float(lesion_f1[chosen]),
        float(lesion_f1[off]),
    )
    return choice, chosen


def _count(
    stream: Iterator[tuple[int, int, Tensor]],
    truth: np.ndarray,
    spacing_mm: tuple[float, float, float],
    thresholds: Sequence[float],
    num_classes: int,
    hu: np.ndarray | None,
) -> np.ndarray:
    """TP, FP and FN of every foreground class for all that is tried, and its lesions: true, found, predicted, real.

    int64 (1 + thresholds, 2, 2 or 1, 1 + sure, 1 + sizes, 1 + shares, classes - 1, 7); the axes are those of the
    options.
    """
    plain, likely, reached = (np.zeros(truth.shape, np.uint8) for _ in range(3))
    for first, last, probabilities in stream:
        foreground = foreground_probability(probabilities)
        plain[first:last] = classes_from_probabilities(probabilities).cpu().numpy()
        likely[first:last] = (largest(probabilities[1:]) + 1).cpu().numpy()
        reached[first:last] = probability_steps(foreground).cpu().numpy()
    sizes = [voxels_of(volume, spacing_mm) for volume in (0.0, *_SIZES_ML)]
    lowest = _steps(min(thresholds))
    box = foreground_box(np.maximum(plain, reached >= lowest))
    tried = (1 + len(thresholds), 2, 1 if hu is None else 2, 1 + len(_SURE), len(sizes), 1 + len(_SHARES))
    counts = np.zeros((*tried, num_classes - 1, 7), np.int64)
    true_lesions = np.zeros(truth.shape, np.int64)
    for index in range(1, num_classes):
        counts[..., index - 1, 2] = np.count_nonzero(truth == index)
        numbered, count = label_lesions(truth == index)
        counts[..., index - 1, 3] = count
        inside = numbered != 0
        true_lesions[inside] = numbered[inside] + true_lesions.max(initial=0)
    if box is None:
        return counts
    regions: list[np.ndarray | None] = [None]
    if hu is not None:
        lungs = lung_mask(hu, spacing_mm)
        regions.append(near_lungs(lungs, spacing_mm, LUNG_MARGIN_MM, box) if lungs.any() else None)
    for t, level in enumerate((None, *thresholds)):
        label = plain[box].copy() if level is None else likely[box] * (reached[box] >= _steps(level))
        for filled in range(2):
            if filled:
                fill_holes(label)
            lesions = Lesions.find(label)
            class_of, masses = lesions.classes_in(label), lesions.masses(reached[box])
            peaks = np.zeros(len(class_of), np.uint8)
            np.maximum.at(peaks, lesions.numbers, reached[box][lesions.foreground])
            count_kept = _counter(lesions, class_of, truth[box], true_lesions[box], num_classes)
            counted: dict[bytes, np.ndarray] = {}  # most of what is tried keeps the same lesions
            for (r, region), (p, sure), (s, smallest) in itertools.product(
                enumerate(regions), enumerate((0.0, *_SURE)), enumerate(sizes)
            ):
                large = lesions.kept(smallest=smallest, region=region) & (peaks >= _steps(sure))
                for h, share in enumerate((0.0, *_SHARES)):
                    kept = beside_largest(large, masses, class_of, share)
                    key = kept.tobytes()
                    if key not in counted:
                        counted[key] = count_kept(kept)
                    counts[t, filled, r, p, s, h] += counted[key]
    return counts


def _counter(
    lesions: Lesions, class_of: np.ndarray, truth: np.ndarray, true_lesions: np.ndarray, num_classes: int
) -> Callable[[np.ndarray], np.ndarray]:
    """What those lesions count that are kept, (classes - 1, 7): what keeping none gives is to be added."""
    at, true = lesions.numbers, truth[lesions.foreground]
    # A lesion is of one class: what is tried on it only keeps or removes it.
    valid, total = true != IGNORE_INDEX, len(lesions.sizes)
    predicted = np.bincount(at[valid], minlength=total)
    hit = valid & (true == class_of[at])
    right = np.bincount(at[hit], minlength=total)
    touching = np.unique(np.stack([at[hit], true_lesions[lesions.foreground][hit]]), axis=1)

    def count(kept: np.ndarray) -> np.ndarray:
        counts = np.zeros((num_classes - 1, 7), np.int64)
        for index in range(1, num_classes):
            chosen = kept & (class_of == index)
            positives = int(right[chosen].sum())
            seen = chosen & (predicted > 0)  # a lesion in voxels to ignore alone is none
            counts[index - 1] = (
                positives,
                int(predicted[chosen].sum()) - positives,
                -positives,
                0,
                len(np.unique(touching[1][chosen[touching[0]]])),
                int(seen.sum()),
                int((seen & (right > 0)).sum()),
            )
        return counts

    return count


def _steps(probability: float) -> int:
    """The step that a tried probability is: all of them are whole ones."""
    return round(probability * PROBABILITY_STEPS)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
