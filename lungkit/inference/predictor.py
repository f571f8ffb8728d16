"""From a scan to a mask on the scan's own grid, with one trained model or several."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lungkit.data.geometry import check_size, on_grid_of, orient, plan_geometry
from lungkit.data.nifti_space import NiftiSpace
from lungkit.data.slices import CHUNK_VOXELS, chunks
from lungkit.data.volume import DEFAULT_MAX_VOXELS, Volume, read_volume, write_nifti
from lungkit.errors import DataError, UsageError
from lungkit.inference.attempts import Attempt, attempts
from lungkit.inference.patches import count_patches, patches_per_call, prediction_patch
from lungkit.inference.postprocessing import (
    Postprocessing,
    classes_from_logits,
    classes_from_probabilities,
    classes_from_regions,
    foreground_probability,
    postprocess,
    probability_steps,
)
from lungkit.inference.precision import Precision, choose_precision
from lungkit.inference.scan_doubts import scan_doubts
from lungkit.inference.scan_scores import class_probabilities, ensemble_scores
from lungkit.inference.sliding_window import Progress
from lungkit.inference.trained_model import TrainedModel, model_folders

if TYPE_CHECKING:
    from lungkit.inference.at_points import Box, PointedPrediction

_LOG = logging.getLogger("lungkit")

Image = Volume | str | os.PathLike[str] | Sequence[Volume | str | os.PathLike[str]]


@dataclass(frozen=True, eq=False)
class Prediction:
    """The mask of one scan and how it came about; arrays are (X, Y, Z) as in the scan's file.

    ``mask`` holds the values of ``labels``; ``probabilities`` (float32, by class name, background left out) and
    ``attention`` (float32, alpha of the finest gate) are there where they were asked for. ``space`` is the scan's,
    see :attr:`lungkit.data.Volume.space`.
    """

    mask: np.ndarray
    affine: np.ndarray
    labels: dict[str, int]
    seconds: float
    device: str
    precision: str
    warnings: tuple[str, ...] = ()
    probabilities: dict[str, np.ndarray] = field(default_factory=dict)
    attention: np.ndarray | None = None
    space: NiftiSpace | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask as NIfTI (uint8, uint16 where a label is beyond 255), whole or not at all.

        It gets the geometry fields of the scan's own header, so that it lies on the scan in every program.
        """
        write_nifti(path, self.mask, self.affine, space=self.space)


class Predictor:
    r"""Predicts scans with one trained model, or with the mean of the probabilities of several.

    A scan is reoriented, clipped and resampled as the model's training scans were; the logits of overlapping patches
    are stitched with Gaussian weights (:func:`lungkit.inference.sliding_window`); their softmax is brought back to the
    scan's own grid by linear interpolation, and every voxel gets its most probable class. All of that happens a few
    slices at a time: beyond the scan and its mask only one slab of patches is in memory. The mask does not depend on
    ``batch_size`` but for ties that rounding decides.

    Where a GPU runs out of memory, the batch is halved, then the patch, and at last the CPU is used; the prediction
    says so in its ``warnings``.

    Args:
        models: trained models of the same labels and channels.
        device: "cuda", "cpu", ...; None is the GPU where there is one.
        precision: "fp32", "bf16" or "fp16"; "auto" is the one that the models were trained and validated in, where the
            device computes with it, else the fastest that it computes with.
        overlap: of neighbouring patches, 0 <= overlap < 1.
        mirror: average over the mirror images of every patch (test-time augmentation); None does what the first model
            says (:attr:`TrainedModel.mirrored`).
        batch_size: patches in one call; None is as many as the device is fastest with.
        postprocessing: None takes what the first model was given in training; ``Postprocessing()`` turns it off.
        strict: refuse a scan of other intensities or pixel sizes than those of training, or that was not read without
            doubt (:attr:`lungkit.data.Volume.notes`), instead of saying so in the prediction's ``warnings``.
        max_voxels: refuse a scan of more voxels, as it is or resampled for the network.

    Raises:
        UsageError: models that do not belong together, or an option out of its range.

    Example:
        Predict one scan with the best weights of a run::

            import lungkit

            predictor = lungkit.Predictor.from_run("runs/phantom-attention-unet")
            prediction = predictor("scan.nii.gz")
            prediction.save("mask.nii.gz")
    """

    def __init__(
        self,
        models: Sequence[TrainedModel],
        *,
        device: str | torch.device | None = None,
        precision: Literal["auto"] | Precision = "auto",
        overlap: float = 0.5,
        mirror: bool | None = None,
        batch_size: int | None = None,
        postprocessing: Postprocessing | None = None,
        strict: bool = False,
        max_voxels: int = DEFAULT_MAX_VOXELS,
    ) -> None:
        self.models = tuple(models)
        _check_models(self.models)
        if not 0 <= overlap < 1:
            raise UsageError(f"overlap must be at least 0 and below 1, got {overlap}")
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        self.overlap, self.batch_size = overlap, batch_size
        self.mirror = self.models[0].mirrored if mirror is None else mirror
        if precision not in ("auto", *get_args(Precision)):
            raise UsageError(f"precision must be auto, fp32, bf16 or fp16, got {precision!r}")
        self.precision: Literal["auto"] | Precision = precision
        self.strict, self.max_voxels = strict, max_voxels
        self.device = usable_device(device)
        self.postprocessing = self.models[0].postprocessing if postprocessing is None else postprocessing
        if self.postprocessing.inside_lungs and not self.in_hu:
            raise UsageError(
                f"inside_lungs finds the lungs by their HU, but {self.models[0].name} was trained on data that are "
                "not in HU; leave it out"
            )

    @classmethod
    def from_run(
        cls,
        *paths: str | os.PathLike[str],
        device: str | torch.device | None = None,
        precision: Literal["auto"] | Precision = "auto",
        overlap: float = 0.5,
        mirror: bool | None = None,
        batch_size: int | None = None,
        postprocessing: Postprocessing | None = None,
        strict: bool = False,
        max_voxels: int = DEFAULT_MAX_VOXELS,
    ) -> Predictor:
        """A predictor with the models in run or checkpoint folders, see :meth:`TrainedModel.load`.

        A folder of all folds (``lungkit-train --fold all``) stands for its folds.
        """
        return cls(
            [TrainedModel.load(path) for given in paths for path in model_folders(given)],
            device=device,
            precision=precision,
            overlap=overlap,
            mirror=mirror,
            batch_size=batch_size,
            postprocessing=postprocessing,
            strict=strict,
            max_voxels=max_voxels,
        )

    @property
    def labels(self) -> dict[str, int]:
        """Class name -> value in the mask."""
        return self.models[0].labels

    @property
    def in_hu(self) -> bool:
        """Whether the first channel that the models were trained on is in HU."""
        return self.models[0].preprocessing.channels[0].units == "HU"

    def __call__(
        self,
        image: Image,
        *,
        probabilities: bool = False,
        attention: bool = False,
        progress: Progress | None = None,
    ) -> Prediction:
        """Predict one scan.

        Args:
            image: a NIfTI file, a folder with one DICOM series, or a :class:`~lungkit.data.Volume`; a sequence of them
                for several channels.
            probabilities: keep the probability of every class.
            attention: keep the attention map of the finest gate (mean over the models that have gates).
            progress: called with the patches done and the patches in all.

        Raises:
            DataError: a file cannot be used, the scan does not fit the models, or a network gives NaN or infinity
                (in bf16 and fp16 it is tried again in fp32).
            UsageError: ``attention`` for networks without attention gates.
            ResourceError: the memory does not suffice.
        """
        volumes = load_channels(image, max_voxels=self.max_voxels)
        started = time.perf_counter()
        geometry = self.models[0].own_grid_of(volumes[0])
        threshold = self.postprocessing.threshold
        # The largest logit has the largest probability, where nothing else is asked for. The mean of several models and
        # what is resampled are of logits or of probabilities as the models say.
        surest, share = self.postprocessing.lesion_probability, self.postprocessing.lesion_share
        as_logits = threshold is None and not surest and not share and not attention
        as_logits = as_logits and (
            self.models[0].averaging == "logits"
            or (len(self.models) == 1 and self.models[0].geometry_of(volumes[0]).shape == geometry.shape)
        )
        classes, sequence = len(self.labels), self.models[0].region_sequence

        def empty(dtype: type) -> tuple[np.ndarray, np.ndarray]:
            array: np.ndarray = np.zeros(geometry.original_shape, dtype, order="F")
            return array, orient(array, geometry)

        for attempt in self._attempts(volumes, attention):
            with attempt:
                mask, mask_slices = empty(np.uint8)
                maps = {name: empty(np.float32) for name in [*self.labels][1:]} if probabilities else {}
                alpha, alpha_slices = empty(np.float32) if attention else (None, None)
                sure, sure_slices = empty(np.bool_) if surest else (None, None)
                steps, steps_slices = empty(np.uint8) if share else (None, None)
                scored = self._scores(volumes, attempt, progress, as_logits=as_logits, attention=attention)
                for first, last, scores in scored:
                    if as_logits:
                        found = (
                            classes_from_logits(scores)
                            if sequence is None
                            else classes_from_regions(scores.sigmoid(), sequence, None)
                        )
                        # The mask is the same whether probabilities are asked for or not.
                        if probabilities:
                            scores = class_probabilities(scores, regions=sequence is not None)
                    elif sequence is None:
                        found = classes_from_probabilities(scores[:classes], threshold)
                    else:
                        found = classes_from_regions(scores[1:classes], sequence, threshold)
                    mask_slices[first:last] = found.cpu().numpy()
                    if surest or share:
                        foreground = foreground_probability(scores[:classes], regions=sequence is not None)
                        if sure_slices is not None:
                            sure_slices[first:last] = (foreground >= surest).cpu().numpy()
                        if steps_slices is not None:
                            steps_slices[first:last] = probability_steps(foreground).cpu().numpy()
                    for index, (_, map_slices) in enumerate(maps.values(), start=1):
                        map_slices[first:last] = scores[index].cpu().numpy()
                    if alpha_slices is not None:
                        alpha_slices[first:last] = scores[classes].cpu().numpy()
        return Prediction(
            mask=self._finish(mask, volumes, sure, steps),
            affine=volumes[0].affine,
            labels=dict(self.labels),
            seconds=time.perf_counter() - started,
            device=attempt.device.type,
            precision=attempt.precision,
            warnings=tuple(dict.fromkeys(attempt.notes)),
            probabilities={name: array for name, (array, _) in maps.items()},
            attention=alpha,
            space=volumes[0].space,
        )

    def stream_probabilities(
        self, image: Image, *, attention: bool = False, progress: Progress | None = None
    ) -> Iterator[tuple[int, int, Tensor]]:
        """What a mask is made of, before threshold and postprocessing: a block of axial slices at a time.

        A block whose ``first`` is 0 begins the scan, also where a prediction had to begin anew (in fp32 after NaN, in
        smaller patches after the memory ran out): what was given before is then void.

        Yields:
            ``(first, last, probabilities)``: float32 (K, last - first, Y, X) of slices ``first`` to ``last`` - 1 of
            the scan on its own grid in canonical orientation (:func:`lungkit.data.geometry.orient`; of models of other
            programs in the axes of :meth:`TrainedModel.own_grid_of`), the background first; the mean over the models,
            on the device. It holds until the next step. With ``attention`` the map of the finest gate is one channel
            more.

        Raises:
            DataError, UsageError, ResourceError: as for a call.

        Example:
            The volume that a model expects to be tumour, in ml::

                expected = 0.0
                for first, _, probabilities in predictor.stream_probabilities(scan):
                    expected = (0.0 if first == 0 else expected) + float(probabilities[1].sum())
                expected *= scan.spacing_mm[0] * scan.spacing_mm[1] * scan.spacing_mm[2] / 1000
        """
        volumes = load_channels(image, max_voxels=self.max_voxels)
        for attempt in self._attempts(volumes, attention):
            with attempt:
                yield from self._scores(volumes, attempt, progress, attention=attention)

    def segment_at(
        self, image: Image, points: Sequence[tuple[float, float, float] | Box], *, stability: bool = True
    ) -> PointedPrediction:
        """The nodule at each point of a scan, see :func:`lungkit.inference.at_points.segment_at`."""
        from lungkit.inference.at_points import segment_at

        return segment_at(
            self, load_channels(image, max_voxels=self.max_voxels)[0], points, stability=stability
        )

    def check_scan(self, volumes: Sequence[Volume]) -> None:
        """Refuse a scan that the models cannot take.

        Raises:
            DataError: another number of channels, channels on different grids, too few slices for a 3D network, or more
                than ``max_voxels`` voxels after resampling; under ``strict`` whatever :meth:`doubts` says.
        """
        model = self.models[0]
        where = _name(volumes)
        if len(volumes) != len(model.channels):
            raise DataError(
                f"{where}: {len(volumes)} channel{'s' if len(volumes) > 1 else ''}, but {model.name} takes "
                f"{len(model.channels)} ({', '.join(model.channels)}); the channels of a scan are files "
                "NAME_0000.nii.gz, NAME_0001.nii.gz, ..."
            )
        for other in volumes[1:]:
            on_grid_of(other, volumes[0])
        depth = model.own_grid_of(volumes[0]).oriented_shape[0]
        for model in self.models:
            check_size(volumes[0], model.geometry_of(volumes[0]), self.max_voxels)
            if model.dims == 3 and depth == 1:
                raise DataError(
                    f"{where}: a single slice, but {model.name} is a 3D model (patches of "
                    f"{' x '.join(map(str, model.patch_size))} voxels); give the whole scan, or use a 2D model"
                )

        if self.strict and (doubts := self.doubts(volumes)):
            raise DataError(f"{where}: {'; '.join(doubts)} (strict)")

    def doubts(self, volumes: Sequence[Volume]) -> list[str]:
        """Why the mask of a scan might be wrong, in sentences: how it was read, its intensities, its pixel size."""
        notes = [note for volume in volumes for note in volume.notes]
        return list(
            dict.fromkeys(
                [*notes, *(doubt for model in self.models for doubt in scan_doubts(model, volumes))]
            )
        )

    def check_attention(self) -> None:
        """Refuse to give attention maps where there are none.

        Raises:
            UsageError: no network has attention gates.
        """
        if not any(model.has_attention for model in self.models):
            raise UsageError("attention: none of the networks has attention gates")

    def estimate(self, volumes: Sequence[Volume]) -> str:
        """What predicting a scan will take, in one line: size, memory beyond the network's own, patches."""
        depth, height, width = plan_geometry(volumes[0]).oriented_shape
        voxels = depth * height * width
        total, slabs, batch = 0, 0, 0
        for model in self.models:
            shape = model.geometry_of(volumes[0]).shape
            patch = prediction_patch(model.patch_size, shape, whole_slices=model.tiling.whole_slices)
            total += count_patches(shape, patch, self.overlap, whole_steps=model.tiling.whole_steps)
            batch = max(batch, self.batch_size or patches_per_call(self.device.type, patch))
            channels = len(model.labels) + 2 * len(model.channels) * (2 * model.context_slices + 1)
            slabs += 4 * (1, *patch)[-3] * math.prod(shape[1:]) * channels
        scan = sum(volume.array.nbytes for volume in volumes)
        parts = {"scan": scan, "mask": voxels, "slabs": slabs + 16 * min(voxels, CHUNK_VOXELS)}
        sizes = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in parts.items())
        return (
            f"{depth} x {height} x {width} voxels; memory in MiB: {sizes}, and the network's own for {batch} at a time "
            f"of {total} patches; {self.device.type}, {self._precision_on(self.device)}"
        )

    def _precision_on(self, device: torch.device) -> Precision:
        if self.precision != "auto":
            return self.precision
        recorded = {model.precision for model in self.models}
        return choose_precision(device.type, recorded.pop() if len(recorded) == 1 else None)

    def _attempts(self, volumes: Sequence[Volume], attention: bool) -> Iterator[Attempt]:
        self.check_scan(volumes)
        if attention:
            self.check_attention()
        return attempts(_name(volumes), self.device, self._precision_on, self.doubts(volumes))

    def _scores(
        self, volumes: Sequence[Volume], attempt: Attempt, progress: Progress | None, **wanted: bool
    ) -> Iterator[tuple[int, int, Tensor]]:
        return ensemble_scores(
            self.models,
            volumes,
            attempt.device,
            attempt.precision,
            overlap=self.overlap,
            mirror=self.mirror,
            batch_size=self.batch_size,
            halvings=attempt.halvings,
            progress=progress,
            **wanted,
        )

    def _finish(
        self,
        mask: np.ndarray,
        volumes: Sequence[Volume],
        sure: np.ndarray | None,
        probability: np.ndarray | None,
    ) -> np.ndarray:
        """The class indices in ``mask`` postprocessed, as values of the labels; in place where uint8 holds them."""
        geometry = plan_geometry(volumes[0])
        slices = orient(mask, geometry)
        options = self.postprocessing
        if options.changes_masks:
            hu = orient(volumes[0].array, geometry) if self.in_hu else None
            maps = (None if array is None else orient(array, geometry) for array in (sure, probability))
            likely, expected = maps
            slices[...] = postprocess(
                slices, geometry.spacing_mm, options, hu=hu, sure=likely, probability=expected
            )
        values = np.array(list(self.labels.values()))
        if (values == np.arange(len(values))).all():
            return mask
        values = values.astype(np.uint8 if values.max() <= 255 else np.uint16)
        finished = mask if values.dtype == mask.dtype else np.empty_like(mask, values.dtype)
        target = orient(finished, geometry)
        for first, last in chunks(len(slices), math.prod(slices.shape[1:])):
            target[first:last] = values[slices[first:last]]
        return finished


def load_channels(image: Image, *, max_voxels: int = DEFAULT_MAX_VOXELS) -> list[Volume]:
    """The channels of a scan, read where they are not volumes yet, in the orientation of the first one.

    Raises:
        DataError: a file cannot be used.
        UsageError: ``image`` is something else.
    """
    if isinstance(image, (Volume, str, os.PathLike)):
        image = [image]
    if not isinstance(image, Sequence) or not image:
        raise UsageError(
            f"image must be a path, a lungkit.data.Volume (array and affine) or a sequence of them, got "
            f"{type(image).__name__}"
        )
    first, *others = (
        entry if isinstance(entry, Volume) else _read(Path(entry), max_voxels) for entry in image
    )
    return [first, *(on_grid_of(other, first) for other in others)]


def _read(path: Path, max_voxels: int) -> Volume:
    if path.is_dir():
        from lungkit.data.dicom import read_series

        return read_series(path, max_voxels=max_voxels).volume
    return read_volume(path, max_voxels=max_voxels)


def _check_models(models: Sequence[TrainedModel]) -> None:
    if not models:
        raise UsageError("models: at least one trained model is needed")
    first = models[0]
    for other in models[1:]:
        for what in ("labels", "channels", "regions", "averaging", "preprocessing.axes"):
            own, found = (attrgetter(what)(model) for model in (first, other))
            if own != found:
                raise UsageError(
                    f"models of one ensemble must share their {what}, but {first.path} has {own} and {other.path} has "
                    f"{found}"
                )


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None is the GPU where there is one.

    Raises:
        UsageError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"device {str(device)!r} cannot be used: {reason}") from error
    return found


def _name(volumes: Sequence[Volume]) -> str:
    path = volumes[0].path
    return "the scan" if path is None else str(path)
