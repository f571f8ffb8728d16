"""From what a network gives to a mask: the class of every voxel, and what is done after that, all off by default."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import cc3d
import numpy as np
import torch
from torch import Tensor

from lungkit.errors import DataError, UsageError
from lungkit.inference.lesions import Lesions, beside_largest, voxels_of
from lungkit.inference.lungs import lung_mask, near_lungs

_LOG = logging.getLogger("lungkit")

LUNG_MARGIN_MM = 5.0
"""How far from the lungs a lesion may begin and still be kept by ``inside_lungs``."""

PROBABILITY_STEPS = 200
"""Steps from probability 0 to 1 in which the mass of lesions is counted."""


@dataclass(frozen=True)
class Postprocessing:
    """What is done to a prediction, in this order.

    Args:
        threshold: a voxel is foreground where the probabilities of all foreground classes together are at least this,
            and then of the most probable of them; None takes the most probable class, the background among them.
        fill_holes: background that foreground of one class encloses within an axial slice becomes that class, as it is
            in a reader's outline; a cavity counts as a hole.
        inside_lungs: remove lesions of which no voxel lies in the lungs or within 5 mm of them. The rest of a lesion is
            kept whole, so that one that grows into the chest wall or the mediastinum is not cut. Needs HU.
        lesion_probability: remove lesions of which no voxel has this foreground probability: pieces that the network is
            nowhere sure of. With a lower ``threshold`` it is a hysteresis. 0 removes none.
        smallest_lesion_ml: remove smaller lesions; 0 removes none.
        lesion_share: remove lesions whose mass, the sum of the foreground probability of their voxels in steps of half
            a percent (:func:`probability_steps`), is below this share of the largest of their class in the scan. 1
            leaves the largest alone, nnU-Net's "all but the largest component" (Isensee et al., 2021); 0 removes none.
            Where scans may hold several tumours, those of lesser mass go too.

    A lesion is a 26-connected component of one class, as in :func:`lungkit.metrics.label_lesions`.

    Raises:
        UsageError: a value out of its range.

    Example:
        >>> Postprocessing(threshold=0.4, smallest_lesion_ml=0.05).to_dict()
        {'threshold': 0.4, 'fill_holes': False, 'inside_lungs': False,
         'lesion_probability': 0.0, 'smallest_lesion_ml': 0.05, 'lesion_share': 0.0}
    """

    threshold: float | None = None
    fill_holes: bool = False
    inside_lungs: bool = False
    lesion_probability: float = 0.0
    smallest_lesion_ml: float = 0.0
    lesion_share: float = 0.0

    def __post_init__(self) -> None:
        if self.threshold is not None and not (_is_number(self.threshold) and 0 < self.threshold < 1):
            raise UsageError(f"threshold is {self.threshold!r}; give a probability between 0 and 1, or None")
        if not (_is_number(self.lesion_probability) and 0 <= self.lesion_probability < 1):
            raise UsageError(
                f"lesion_probability is {self.lesion_probability!r}; give a probability of at least 0 and below 1"
            )
        if not (_is_number(self.smallest_lesion_ml) and 0 <= self.smallest_lesion_ml < math.inf):
            raise UsageError(
                f"smallest_lesion_ml is {self.smallest_lesion_ml!r}; give a volume of at least 0 ml"
            )
        if not (_is_number(self.lesion_share) and 0 <= self.lesion_share <= 1):
            raise UsageError(
                f"lesion_share is {self.lesion_share!r}; give a share of the largest lesion, from 0 to 1"
            )
        for name in ("fill_holes", "inside_lungs"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} is {getattr(self, name)!r}; give True or False")

    @property
    def changes_masks(self) -> bool:
        """Whether :func:`postprocess` does anything; the threshold acts before it."""
        return self != Postprocessing(threshold=self.threshold)

    def summary(self) -> str:
        """What is done, in a few words.

        Example:
            >>> Postprocessing(threshold=0.4, smallest_lesion_ml=0.05).summary()
            'threshold 0.4, lesions below 0.05 ml removed'
        """
        parts = {
            f"threshold {self.threshold}": self.threshold is not None,
            "holes filled": self.fill_holes,
            "lesions outside the lungs removed": self.inside_lungs,
            f"lesions nowhere at probability {self.lesion_probability:g} removed": self.lesion_probability
            > 0,
            f"lesions below {self.smallest_lesion_ml:g} ml removed": self.smallest_lesion_ml > 0,
            f"lesions below {self.lesion_share:g} of the largest removed": 0 < self.lesion_share < 1,
            "lesions beside the largest removed": self.lesion_share == 1,
        }
        return ", ".join(part for part, done in parts.items() if done) or "none"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON and checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Postprocessing:
        """Inverse of :meth:`to_dict`; what is not said is off.

        Raises:
            DataError: an entry is unknown or its value impossible.

        Example:
            >>> Postprocessing.from_dict({"fill_holes": True}).fill_holes
            True
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(content) - set(known)) if isinstance(content, Mapping) else None
        if unknown is None or unknown:
            raise DataError(
                f"postprocessing: {unknown or content!r} is unknown; there are {', '.join(known)}"
            )
        try:
            return cls(**content)
        except UsageError as error:
            raise DataError(f"postprocessing: {error}") from error


def postprocess(
    label: np.ndarray,
    spacing_mm: Sequence[float],
    options: Postprocessing,
    *,
    hu: np.ndarray | None = None,
    lungs: np.ndarray | None = None,
    sure: np.ndarray | None = None,
    probability: np.ndarray | None = None,
) -> np.ndarray:
    """Apply ``options`` to a predicted mask; their threshold is not for masks and has no effect here.

    Where no lungs are found in ``hu``, ``inside_lungs`` removes nothing and says so in the log.

    Beside ``label`` and the result it takes up to 7 bytes per voxel of the box round the foreground, for
    ``lesion_share`` 9 per voxel of foreground, and what :func:`~lungkit.inference.lungs.lung_mask` takes.

    Args:
        label: uint8 (Z, Y, X), 0 background; not changed.
        spacing_mm: (z, y, x).
        options: what to do.
        hu: the scan in HU on the grid of ``label``, for ``inside_lungs``.
        lungs: their mask where it is known already, instead of ``hu``.
        sure: bool (Z, Y, X), voxels of at least ``lesion_probability``, where that is asked for.
        probability: (Z, Y, X), that of foreground, where ``lesion_share`` is asked for; in any unit, such as
            :func:`probability_steps`, as masses are held against each other alone.

    Returns:
        uint8 (Z, Y, X), a new array.

    Raises:
        UsageError: arrays do not fit, or one that an option needs is not given.

    Example:
        >>> label = np.zeros((1, 5, 9), np.uint8)
        >>> label[0, 1:4, 1:4], label[0, 2, 2], label[0, 2, 7] = 1, 0, 1
        >>> options = Postprocessing(fill_holes=True, smallest_lesion_ml=0.002)
        >>> postprocess(label, (1.0, 1.0, 1.0), options)[0, 2].tolist()
        [0, 1, 1, 1, 0, 0, 0, 0, 0]
    """
    spacing = _checked_spacing(spacing_mm)
    if label.ndim != 3 or label.dtype != np.uint8:
        raise UsageError(f"label must be uint8 (Z, Y, X), got {label.dtype} {label.shape}")
    given = {"hu": hu, "lungs": lungs, "sure": sure, "probability": probability}
    for name, other in given.items():
        if other is not None and other.shape != label.shape:
            raise UsageError(
                f"{name} has shape {other.shape}, label {label.shape}; they must lie on one grid"
            )
    if options.inside_lungs and hu is None and lungs is None:
        raise UsageError(
            "inside_lungs needs the scan in HU, by which lungs are known as air within the body; 8-bit images do not "
            "have it: switch inside_lungs off"
        )
    if options.lesion_probability and sure is None:
        raise UsageError("lesion_probability needs the voxels that reach it: pass sure, or switch it off")
    if options.lesion_share and probability is None:
        raise UsageError(
            "lesion_share needs the probability of foreground: pass probability, or switch it off"
        )
    result = label.copy()
    box = foreground_box(result)
    if box is None:
        return result
    part = result[box]
    if options.fill_holes:
        fill_holes(part)
    region = None
    if options.inside_lungs:
        if lungs is None and hu is not None:
            lungs = lung_mask(hu, spacing)
        if lungs is None or not lungs.any():
            _LOG.warning("inside_lungs: no lungs in this scan, no lesion was removed for lying outside them")
        else:
            region = near_lungs(lungs, spacing, LUNG_MARGIN_MM, box)
    likely = sure[box] if sure is not None and options.lesion_probability else None
    masses = probability[box] if probability is not None and options.lesion_share else None
    if region is not None or likely is not None or masses is not None or options.smallest_lesion_ml > 0:
        lesions = Lesions.find(part)
        kept = lesions.kept(smallest=voxels_of(options.smallest_lesion_ml, spacing), region=region)
        if likely is not None:
            kept &= lesions.kept(region=likely)
        if masses is not None:
            kept = beside_largest(
                kept, lesions.masses(masses), lesions.classes_in(part), options.lesion_share
            )
        part[lesions.foreground] *= kept[lesions.numbers]
    return result


def fill_holes(label: np.ndarray) -> None:
    """Give, in place, background that a class encloses within a slice to the class.

    Example:
        >>> label = np.ones((1, 3, 3), np.uint8)
        >>> label[0, 1, 1] = 0
        >>> fill_holes(label)
        >>> int(label.min())
        1
    """
    for plane in label:
        for value in np.unique(plane[plane != 0]):
            covered = plane == value
            rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
            part = plane[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            # A rim of outside joins everything that is not enclosed.
            rest = np.pad((part != value).view(np.uint8), 1, constant_values=1)
            pieces = cc3d.connected_components(rest, connectivity=4)
            enclosed = pieces[1:-1, 1:-1] != pieces[0, 0]
            part[enclosed & (part == 0)] = value


def foreground_box(label: np.ndarray) -> tuple[slice, slice, slice] | None:
    """The smallest box that holds all foreground; None where there is none."""
    flat = np.asarray(label.any(axis=0))
    if not flat.any():
        return None
    sides = (label.any(axis=(1, 2)), flat.any(axis=1), flat.any(axis=0))
    z, y, x = (np.flatnonzero(side) for side in sides)
    return slice(z[0], z[-1] + 1), slice(y[0], y[-1] + 1), slice(x[0], x[-1] + 1)


def _checked_spacing(spacing_mm: Sequence[float]) -> tuple[float, float, float]:
    if len(spacing_mm) != 3 or not all(math.isfinite(size) and size > 0 for size in spacing_mm):
        raise UsageError(f"spacing_mm must be three lengths (z, y, x) above 0, got {tuple(spacing_mm)}")
    z, y, x = map(float, spacing_mm)
    return z, y, x


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def largest(scores: Tensor) -> Tensor:
    r"""Index of the largest of (K, \*S), the lowest of a tie, as uint8 (\*S).

    torch.argmax gives the same, but on a CPU takes up to a hundred times as long along an outer axis.

    Example:
        >>> largest(torch.tensor([[0.5, 0.1, 0.2], [0.5, 0.2, 0.1], [0.0, 0.7, 0.2]])).tolist()
        [0, 2, 0]
    """
    if len(scores) == 1:
        return torch.zeros(scores.shape[1:], dtype=torch.uint8, device=scores.device)
    classes = (scores[1] > scores[0]).view(torch.uint8)
    if len(scores) == 2:
        return classes
    highest = torch.maximum(scores[0], scores[1])
    for index in range(2, len(scores)):
        classes = torch.where(scores[index] > highest, index, classes)
        highest = torch.maximum(highest, scores[index])
    return classes


def classes_from_logits(logits: Tensor) -> Tensor:
    r"""Class of every voxel from logits (K, \*S): the largest, above 0 for the single one of a sigmoid model.

    Returns:
        uint8 (\*S), on the device of ``logits``.

    Raises:
        UsageError: no class or more than 256 of them.

    Example:
        >>> classes_from_logits(torch.tensor([[-1.0, 2.0]])).tolist()
        [0, 1]
    """
    _check_count(len(logits))
    return (logits[0] > 0).view(torch.uint8) if len(logits) == 1 else largest(logits)


def classes_from_probabilities(probabilities: Tensor, threshold: float | None = None) -> Tensor:
    r"""Class of every voxel.

    Args:
        probabilities: (K, \*S), background first; K = 1 is the foreground of a sigmoid model.
        threshold: see :class:`Postprocessing`; None is argmax (the lowest class of a tie), above 1/2 for K = 1.

    Returns:
        uint8 (\*S), on the device of ``probabilities``.

    Raises:
        UsageError: no class or more than 256 of them.

    Example:
        >>> p = torch.tensor([[0.5, 0.1], [0.3, 0.2], [0.2, 0.7]])
        >>> classes_from_probabilities(p).tolist(), classes_from_probabilities(p, 0.5).tolist()
        ([0, 2], [1, 2])
    """
    count = len(probabilities)
    _check_count(count)
    if count == 1:
        single = probabilities[0]
        return (single > 0.5 if threshold is None else single >= threshold).to(torch.uint8)
    if threshold is None:
        return largest(probabilities)
    foreground = probabilities[1:]
    if count == 2:
        return (foreground[0] >= threshold).to(torch.uint8)
    classes = largest(foreground) + 1
    return classes * (foreground_probability(probabilities) >= threshold)


def foreground_probability(probabilities: Tensor, *, regions: bool = False) -> Tensor:
    r"""Of all foreground together (\*S), from probabilities (K, \*S), background first; of regions the largest.

    Example:
        >>> foreground_probability(torch.tensor([[0.5], [0.25], [0.25]])).tolist()
        [0.5]
    """
    foreground = probabilities[1:]
    return foreground.amax(0) if regions else foreground[0] if len(foreground) == 1 else foreground.sum(0)


def probability_steps(probability: Tensor) -> Tensor:
    r"""Probabilities (\*S) in whole steps of 1/200, downwards, as uint8.

    A byte a voxel holds what the masses of lesions need. A step is reached just where ``probability >= step / 200``
    says so, in the format of ``probability``.

    Example:
        >>> probability_steps(torch.tensor([0.0, 0.004, 0.3, 0.9, 1.0])).tolist()
        [0, 0, 60, 180, 200]
    """
    edges = probability.new_tensor([step / PROBABILITY_STEPS for step in range(1, PROBABILITY_STEPS + 1)])
    return torch.bucketize(probability.contiguous(), edges, out_int32=True, right=True).to(torch.uint8)


def classes_from_regions(scores: Tensor, sequence: Sequence[int], threshold: float | None) -> Tensor:
    r"""Class of every voxel from one score a region: regions that hold the voxel are written one over the other.

    Args:
        scores: (R, \*S), channel k - 1 of the region that is written as class k.
        sequence: classes in the order of writing: what lies inside comes last.
        threshold: a region holds a voxel from this score on; None: above 1/2.

    Returns:
        uint8 (\*S), on the device of ``scores``.

    Source: nnU-Net's ``regions_class_order`` (Isensee et al., 2021).

    Example:
        >>> classes_from_regions(torch.tensor([[0.9, 0.9, 0.1], [0.2, 0.8, 0.7]]), (1, 2), None).tolist()
        [1, 2, 2]
    """
    _check_count(len(scores) + 1)
    classes = torch.zeros(scores.shape[1:], dtype=torch.uint8, device=scores.device)
    for index in sequence:
        score = scores[index - 1]
        classes[score > 0.5 if threshold is None else score >= threshold] = index
    return classes


def _check_count(classes: int) -> None:
    if not 1 <= classes <= 256:
        raise UsageError(f"there are {classes} classes, but label maps are uint8 and hold 1 to 256")
