"""Training patches: random crops of cached cases, a fixed share of them on foreground."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from lungkit.data.dataset import IGNORE_INDEX
from lungkit.errors import DataError, UsageError, shorten

_BACKGROUND_ATTEMPTS = 20


class PatchSource(Protocol):
    """What a :class:`PatchSampler` needs of a case; :class:`lungkit.data.CachedCase` has it.

    ``image`` (C, Z, Y, X) int16, ``label`` (Z, Y, X) uint8 and ``foreground`` (N, 3) int32 voxel indices in
    zyx order may be memory maps. The normalised intensity is ``image * slope + intercept``.
    """

    @property
    def case_id(self) -> str: ...
    @property
    def image(self) -> np.ndarray: ...
    @property
    def label(self) -> np.ndarray: ...
    @property
    def foreground(self) -> np.ndarray: ...
    @property
    def slope(self) -> float: ...
    @property
    def intercept(self) -> float: ...


class Patch(NamedTuple):
    """One crop: ``image`` float32 (C, \\*patch_size), normalised, and ``label`` uint8 (\\*patch_size)."""

    image: np.ndarray
    label: np.ndarray
    case_id: str
    start: tuple[int, int, int]
    """First voxel (z, y, x) of the patch in the case; negative where the patch hangs over the border."""
    on_foreground: bool
    """True where a foreground voxel was chosen and lies inside the patch."""


class PatchSampler:
    """Random patches of a set of cases, where patch ``index`` is a pure function of ``(seed, index)``.

    The order in which patches are asked for, the batch size, the number of workers and a restart change
    nothing: a run resumed at index i sees what an uninterrupted run saw.

    *Foreground oversampling.* Patch i is a foreground patch if and only if
    floor((i + 1) f) > floor(i f) with f = ``foreground_fraction``. Any n consecutive indices therefore
    hold floor(n f) or ceil(n f) foreground patches: the share is exact, as in nnU-Net's rule "the last
    third of a batch" (Isensee et al. 2021, Nature Methods 18:203), and needs no knowledge of the batch.
    A foreground patch draws a case uniformly from those that have foreground, then one of its foreground
    voxels uniformly, then one position uniformly from all that hold that voxel. The voxel falls anywhere in the
    patch, so that its centre tells a network nothing. Any other patch draws a case uniformly from all cases, and
    the voxel of its middle uniformly.

    *Borders.* A patch that would hang over the border of a larger case is moved inside and lies along the border then,
    as often as its middle would have been too near to it. Where every position inside had the same chance, voxels at
    the border would hardly be seen, and patches along it neither, which most are in prediction.

    *Background.* Foreground is rarely far in small crops, and a network learns little of what merely looks like it.
    With ``background_fraction`` so many of the other patches, at random, draw their position again until no foreground
    lies in them, up to 20 times: a case may have no such place.

    *Two dimensions.* With a ``patch_size`` of two entries a patch is part of one axial slice: the slice of
    the chosen voxel, or a uniformly drawn one.

    *Context.* A 2D patch may carry the slices above and below as further channels, which is what tells a nodule
    from a vessel: the channels are those of slice z - n, then z - n + 1, up to z + n; beyond the first and the last
    slice that one is repeated.

    *Padding.* Along an axis where the case is smaller than the patch, the position of the case inside the
    patch is random; around it the image holds the smallest value of the case (air), the label ``pad_label``.

    Only the cropped part of the memory maps is read (and the whole image once, for its minimum, of a case
    that needs padding).

    Args:
        cases: the cases of one fold.
        patch_size: (Y, X) or (Z, Y, X) in voxels.
        foreground_fraction: share of foreground patches, from 0 to 1.
        background_fraction: share of the other patches that hold no foreground where the case allows it, from 0 to 1.
        seed: non-negative integer.
        pad_label: label of padding; the ignore label keeps padding out of the loss.
        context_slices: n, slices on either side that a 2D patch carries as channels.

    Raises:
        UsageError: an option is out of its range.
        DataError: there is no case, cases differ in their channels, or none of them has foreground
            while ``foreground_fraction`` is above zero.

    Example:
        >>> from types import SimpleNamespace
        >>> label = np.zeros((4, 40, 40), np.uint8)
        >>> label[2, 30, 31] = 1
        >>> case = SimpleNamespace(
        ...     case_id="lung_1", image=np.zeros((1, 4, 40, 40), np.int16), label=label,
        ...     foreground=np.argwhere(label).astype(np.int32), slope=0.5, intercept=-1.0)
        >>> sampler = PatchSampler([case], (16, 16), foreground_fraction=1.0)
        >>> patch = sampler.sample(7)
        >>> patch.image.shape, int(patch.label.sum()), patch.start[0]
        ((1, 16, 16), 1, 2)
        >>> images, labels = sampler.batch(range(5))
        >>> images.shape, labels.dtype
        (torch.Size([5, 1, 16, 16]), torch.uint8)
    """

    def __init__(
        self,
        cases: Sequence[PatchSource],
        patch_size: Sequence[int],
        *,
        foreground_fraction: float = 0.33,
        background_fraction: float = 0.0,
        seed: int = 0,
        pad_label: int = 0,
        context_slices: int = 0,
    ) -> None:
        self.cases = tuple(cases)
        self.patch_size = _checked_patch_size(patch_size)
        self.foreground_fraction = float(foreground_fraction)
        self.background_fraction = float(background_fraction)
        self.seed = operator.index(seed)
        self.pad_label = operator.index(pad_label)
        self.context_slices = operator.index(context_slices)
        if self.context_slices < 0 or (self.context_slices and self.dims == 3):
            raise UsageError(
                f"context_slices is {context_slices} for {self.dims}D patches; give 0 or more, and 0 in 3D"
            )
        for name in ("foreground_fraction", "background_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(f"{name} is {getattr(self, name)}; give a share from 0 to 1")
        if self.seed < 0:
            raise UsageError(f"seed is {seed}; give a non-negative integer")
        if not 0 <= self.pad_label <= 255:
            raise UsageError(f"pad_label is {pad_label}; labels are 8-bit, give 0 to 255")
        if not self.cases:
            raise DataError("there is no case to draw patches from; check the fold and the dataset")
        channels = {case.image.shape[0] for case in self.cases}
        if len(channels) > 1:
            odd = next(case for case in self.cases if case.image.shape[0] != self.cases[0].image.shape[0])
            raise DataError(
                f"case {odd.case_id} has {odd.image.shape[0]} channels, case {self.cases[0].case_id} has "
                f"{self.cases[0].image.shape[0]}; all cases of a dataset need the same channels"
            )
        self._with_foreground = tuple(case for case in self.cases if len(case.foreground))
        if self.foreground_fraction > 0 and not self._with_foreground:
            raise DataError(
                f"none of the {len(self.cases)} cases of this fold has foreground "
                f"({shorten(case.case_id for case in self.cases)}); check their labels, or set foreground_fraction to 0"
            )
        self._air: dict[str, np.ndarray] = {}

    @property
    def dims(self) -> int:
        """2 for patches of slices, 3 for patches of volumes."""
        return len(self.patch_size)

    def is_foreground(self, index: int) -> bool:
        """Whether patch ``index`` is one of those that are sure to hold foreground."""
        fraction = self.foreground_fraction
        return math.floor((index + 1) * fraction) > math.floor(index * fraction)

    def sample(self, index: int) -> Patch:
        """Patch number ``index`` (0, 1, 2, ... without end)."""
        index = operator.index(index)
        if index < 0:
            raise UsageError(f"index is {index}; patches are numbered from 0")
        random = np.random.default_rng((self.seed, index))
        on_foreground = self.is_foreground(index)
        population = self._with_foreground if on_foreground else self.cases
        case = population[random.integers(len(population))]
        voxel = case.foreground[random.integers(len(case.foreground))] if on_foreground else None
        # A 2D patch is a 3D patch of one slice.
        size = (1,) * (3 - self.dims) + self.patch_size
        start = _position(case.label.shape, size, voxel, random)
        if voxel is None and self.background_fraction and random.random() < self.background_fraction:
            for _ in range(_BACKGROUND_ATTEMPTS):
                inside, _ = _overlap(case.label.shape, start, size)
                if not _holds_foreground(case.label[inside]):
                    break
                start = _position(case.label.shape, size, None, random)
        z, y, x = start
        label = self._crop_label(case, start, size)
        last = case.label.shape[0] - 1
        slices = range(z - self.context_slices, z + self.context_slices + 1) if self.dims == 2 else (z,)
        # In 3D a patch may hang over the ends; in 2D it lies on a slice, and so do those beside it.
        starts = [(min(max(i, 0), last) if self.dims == 2 else i, y, x) for i in slices]
        image = np.concatenate([self._crop_image(case, first, size) for first in starts])
        shape = self.patch_size
        return Patch(image.reshape(-1, *shape), label.reshape(shape), case.case_id, (z, y, x), on_foreground)

    def batch(self, indices: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The patches ``indices`` as tensors.

        Returns:
            images float32 (B, C, \\*patch_size) and labels uint8 (B, \\*patch_size).
        """
        patches = [self.sample(index) for index in indices]
        if not patches:
            raise UsageError("indices is empty; a batch needs at least one patch index")
        images = np.stack([patch.image for patch in patches])
        labels = np.stack([patch.label for patch in patches])
        return torch.from_numpy(images), torch.from_numpy(labels)

    def _crop_image(self, case: PatchSource, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        (z, y, x), target = _overlap(case.label.shape, start, size)
        stored = case.image[:, z, y, x]
        if stored.shape[1:] == tuple(size):
            image = stored.astype(np.float32)
        else:
            image = np.empty((stored.shape[0], *size), np.float32)
            image[:] = self._air_of(case)[:, None, None, None]
            z, y, x = target
            image[:, z, y, x] = stored
        image *= np.float32(case.slope)
        image += np.float32(case.intercept)
        return image

    def _crop_label(self, case: PatchSource, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        inside, target = _overlap(case.label.shape, start, size)
        label = np.full(size, self.pad_label, np.uint8)
        label[target] = case.label[inside]
        return label

    def _air_of(self, case: PatchSource) -> np.ndarray:
        """Smallest stored value of each channel; the same for any order of calls, hence safe to keep."""
        if case.case_id not in self._air:
            self._air[case.case_id] = np.asarray(case.image).min(axis=(1, 2, 3)).astype(np.float32)
        return self._air[case.case_id]


def _position(
    shape: Sequence[int], size: Sequence[int], voxel: np.ndarray | None, random: np.random.Generator
) -> list[int]:
    """A position of a patch in its case: the patch lies around a point or a voxel, and moves inside from the border."""
    start = []
    for axis, (length, extent) in enumerate(zip(size, shape, strict=True)):
        room = extent - length
        if room <= 0:
            first, last = room, 0
        elif voxel is None:
            first, last = -(length // 2), extent - 1 - length // 2
        else:
            first, last = int(voxel[axis]) - length + 1, int(voxel[axis])
        drawn = int(random.integers(first, last + 1))
        start.append(min(max(drawn, min(0, room)), max(0, room)))
    return start


def _holds_foreground(label: np.ndarray) -> bool:
    return bool(((label != 0) & (label != IGNORE_INDEX)).any())


def _overlap(
    shape: Sequence[int], start: Sequence[int], size: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a patch lies in its case, and where that part lies in the patch."""
    inside, target = [], []
    for first, length, extent in zip(start, size, shape, strict=True):
        low, high = max(first, 0), min(first + length, extent)
        inside.append(slice(low, high))
        target.append(slice(low - first, high - first))
    return tuple(inside), tuple(target)


def _checked_patch_size(patch_size: Sequence[int]) -> tuple[int, ...]:
    size = tuple(operator.index(length) for length in patch_size)
    if len(size) not in (2, 3) or min(size) < 1:
        raise UsageError(
            f"patch_size is {tuple(patch_size)}; give (Y, X) or (Z, Y, X) in voxels, each at least 1"
        )
    return size
