"""Preprocessing: canonical orientation, spacing, intensity window, normalisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lungkit.data.fingerprint import ChannelFingerprint, Fingerprint
from lungkit.data.geometry import RAS, Axes, Geometry, check_size, orient, plan_geometry
from lungkit.data.normalisation import TRIANGLE, ChannelNormalisation, Interpolation, Statistics
from lungkit.data.resampling import resample_nearest
from lungkit.data.scan_statistics import LimitedSlices, NormalisedSlices, filled
from lungkit.data.slices import ResampledSlices, Slices, chunks
from lungkit.data.volume import DEFAULT_MAX_VOXELS, Volume
from lungkit.errors import DataError, UsageError

WINDOW_PRESETS_HU: dict[str, tuple[float, float]] = {
    # Setio et al. 2016, "Pulmonary nodule detection in CT images": air to dense tissue, below bright bone.
    "lung": (-1000.0, 400.0),
    # The radiologist's soft-tissue window, width 400 at level 40.
    "mediastinum": (-160.0, 240.0),
    # All that 12-bit CT can store.
    "full": (-1024.0, 3071.0),
}
"""Named windows (low, high) in HU."""


@dataclass(frozen=True)
class Preprocessing:
    """Everything that is done to a scan before a network sees it; a model must be used with the one it had.

    ``channels`` holds one normalisation for each channel of the image. ``target_spacing_mm`` is (z, y, x), or None for
    each scan's own, of which z may be None alone. ``label_map`` maps mask values to class indices. Every scan is
    brought to ``axes`` first, RAS+ as ZYX. ``crop`` leaves out what is 0 in every channel round the "nonzero" rest.
    ``image_interpolation`` leads to the target spacing, ``score_interpolation`` brings what the network says back.
    """

    channels: tuple[ChannelNormalisation, ...]
    label_map: Mapping[int, int]
    target_spacing_mm: tuple[float | None, float, float] | None = None
    axes: Axes = RAS
    crop: Literal["none", "nonzero"] = "none"
    image_interpolation: Interpolation = TRIANGLE
    score_interpolation: Interpolation = TRIANGLE

    def __post_init__(self) -> None:
        if self.crop not in ("none", "nonzero"):
            raise UsageError(f"crop: {self.crop!r} is neither 'none' nor 'nonzero'")
        for index, channel in enumerate(self.channels):
            if channel.statistics not in get_args(Statistics):
                raise UsageError(
                    f"statistics: {channel.statistics!r} is none of {', '.join(get_args(Statistics))}"
                )
            values = (*(channel.window or ()), channel.mean, channel.std)
            if not all(math.isfinite(value) for value in values) or channel.std <= 0:
                raise UsageError(
                    f"channel {index}: mean {channel.mean}, std {channel.std} must be finite, std > 0"
                )
            if channel.window is not None and channel.window[0] >= channel.window[1]:
                raise UsageError(f"window: {channel.window} of channel {index} must have low < high")
        if self.target_spacing_mm is not None and not all(
            math.isfinite(spacing) and spacing > 0
            for spacing in self.target_spacing_mm[0 if self.target_spacing_mm[0] is not None else 1 :]
            if spacing is not None
        ):
            raise UsageError(f"target_spacing_mm: {self.target_spacing_mm} must be three lengths above zero")

    @property
    def quantisation(self) -> tuple[float, float]:
        """(slope, intercept) by which an int16 stands for a normalised intensity: q * slope + intercept.

        The 65,536 values span the window. With one channel the step is a power of two in the image's own
        units, so whole HU and 8-bit levels are kept exactly (in windows that start at a whole number and are
        up to 65,535 wide).
        """
        low = min(channel.bounds[0] for channel in self.channels)
        high = max(channel.bounds[1] for channel in self.channels)
        slope = (high - low) / 65535
        if len(self.channels) == 1 and self.channels[0].window is not None:
            (start, end), std = self.channels[0].window, self.channels[0].std
            slope = 2.0 ** math.ceil(math.log2((end - start) / 65535)) / std
        return slope, low + 32768 * slope

    def geometry_of(self, volume: Volume) -> Geometry:
        """The grid that a network sees ``volume`` on."""
        return plan_geometry(volume, target_spacing_mm=self.target_spacing_mm, axes=self.axes)

    def spacings_mm(self, volume: Volume) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Spacing (z, y, x) of a scan and the one asked for, in the network's axes."""
        own = plan_geometry(volume, axes=self.axes).spacing_mm
        if self.target_spacing_mm is None:
            return own, own
        depth, *plane = self.target_spacing_mm
        return own, (own[0] if depth is None else depth, plane[0], plane[1])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON and checkpoints."""
        return {**asdict(self), "label_map": {str(value): index for value, index in self.label_map.items()}}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Preprocessing:
        """Inverse of :meth:`to_dict`; also reads the first form, which held channel 0 apart from the others.

        Raises:
            DataError: an entry is missing or of the wrong kind.
        """
        try:
            channels = content["channels"] if "channels" in content else [content, *content["other_channels"]]
            spacing = content["target_spacing_mm"]
            return cls(
                channels=tuple(
                    ChannelNormalisation(
                        None if c["window"] is None else _pair(c["window"]),
                        float(c["mean"]),
                        float(c["std"]),
                        str(c["units"]),
                        c.get("statistics", "training"),
                    )
                    for c in channels
                ),
                label_map={int(value): int(index) for value, index in content["label_map"].items()},
                target_spacing_mm=None
                if spacing is None
                else (None, *_pair(spacing[1:]))
                if spacing[0] is None
                else _triple(spacing),
                axes=_axes(content.get("axes", {})),
                crop=content.get("crop", "none"),
                image_interpolation=Interpolation(**content.get("image_interpolation", {})),
                score_interpolation=Interpolation(**content.get("score_interpolation", {})),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"preprocessing cannot be restored from {dict(content)!r:.200}: {error!r}"
            ) from error


@dataclass(frozen=True, eq=False)
class PreprocessedImage:
    """A scan ready for a network: ``array`` float32 (C, Z, Y, X), ``spacing_mm`` (z, y, x)."""

    array: np.ndarray
    spacing_mm: tuple[float, float, float]
    geometry: Geometry


def plan_preprocessing(
    fingerprint: Fingerprint,
    *,
    window: str | tuple[float, float] = "auto",
    spacing_mm: str | tuple[float, float, float] = "auto",
) -> Preprocessing:
    """Choose the preprocessing for the training cases that ``fingerprint`` describes.

    Every channel is normalised by the mean and standard deviation of the training foreground.

    Args:
        fingerprint: of the training cases only, so that validation stays unseen.
        window: "lung", "mediastinum" or "full" (HU data only), "percentiles" (0.5 and 99.5 of the training
            foreground, Isensee et al. 2021), (low, high), or "auto": "lung" for HU, else "percentiles". With
            several channels a named or explicit window is for those in HU, the others use percentiles.
        spacing_mm: "native" (no resampling), (z, y, x), or "auto": the median spacing of the training
            cases where they differ by more than 1 %, else no resampling.

    Raises:
        UsageError: an option is unknown, or names an HU window for data that are not in HU.

    Example:
        >>> ct = ChannelFingerprint("CT", "HU", "int16", -1024, 3071, -38.0, 200.0, -850.0, 156.0)
        >>> fingerprint = Fingerprint(("a",), ((60, 512, 512),), ((2.5, 0.7, 0.7),), (ct,), (0.01,),
        ...     (15_571_353, 157_287), {0: 0, 1: 1}, ())
        >>> plan = plan_preprocessing(fingerprint, window="mediastinum")
        >>> plan.channels[0].window, plan.channels[0].mean, plan.target_spacing_mm
        ((-160.0, 240.0), -38.0, None)
    """
    in_hu = any(channel.units == "HU" for channel in fingerprint.channels)
    channels = []
    for channel in fingerprint.channels:
        usable = channel.units == "HU" or not in_hu
        low, high = _window(channel, window if usable else "percentiles")
        # Foreground of a single intensity has no spread to divide by.
        std = channel.std if channel.std > 0 else high - low
        channels.append(ChannelNormalisation((low, high), channel.mean, std, channel.units))
    return Preprocessing(
        tuple(channels), dict(fingerprint.label_map), _target_spacing(fingerprint, spacing_mm)
    )


class ClippedSlices:
    """The channels of a scan reoriented and clipped to the window of each, in their own units."""

    def __init__(self, volumes: Sequence[Volume], preprocessing: Preprocessing, geometry: Geometry) -> None:
        channels = zip(volumes, preprocessing.channels, strict=True)
        self._channels = [(orient(volume.array, geometry), channel.window) for volume, channel in channels]
        self.shape = (len(self._channels), *geometry.oriented_shape)

    def read(self, first: int, last: int) -> Tensor:
        """Slices of the scan's own grid."""
        slices = torch.empty((self.shape[0], last - first, *self.shape[2:]))
        for target, (stored, window) in zip(slices, self._channels, strict=True):
            if window is None:
                target.copy_(torch.from_numpy(stored[first:last].astype(np.float32)))
            else:
                np.clip(stored[first:last], *window, out=target.numpy(), dtype=np.float32, casting="unsafe")
        return slices


class ScanSlices:
    """A scan as a network sees it: reoriented, clipped, resampled and normalised, a few axial slices at a time.

    Training's cache and prediction both read it, so that a network is given the same image in both.

    Args:
        volumes: one for each channel, on one grid.
        preprocessing: what to do.
        geometry: the grid to resample to, of :func:`~lungkit.data.geometry.plan_geometry`.
        max_voxels: refuse a larger grid.

    Raises:
        UsageError: the number of channels is not the one that ``preprocessing`` was made for.
        DataError: the grid has more than ``max_voxels`` voxels.
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        preprocessing: Preprocessing,
        geometry: Geometry,
        *,
        max_voxels: int | None = None,
    ) -> None:
        channels = preprocessing.channels
        if len(volumes) != len(channels):
            raise UsageError(
                f"volumes: {len(volumes)} channels, but the preprocessing was made for {len(channels)}"
            )
        if max_voxels is not None:
            check_size(volumes[0], geometry, max_voxels)
        # Clipped before resampling: metal beyond the window must not bleed into its neighbours.
        source: Slices = ClippedSlices(volumes, preprocessing, geometry)
        means, deviations = [c.mean for c in channels], [c.std for c in channels]
        if any(channel.statistics != "training" for channel in channels):
            source = NormalisedSlices(source, channels, _nonzero(volumes, preprocessing, geometry))
            means, deviations = [0.0] * len(channels), [1.0] * len(channels)
        own, target = preprocessing.spacings_mm(volumes[0])
        interpolation = preprocessing.image_interpolation
        filters = interpolation.filters(own, target)
        self._slices: Slices = ResampledSlices(source, geometry.shape, filters)
        if "cubic" in filters and geometry.shape != geometry.oriented_shape:
            self._slices = LimitedSlices(self._slices, source, interpolation.separate_axis(own, target))
        self._means, self._deviations = (
            torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 1) for values in (means, deviations)
        )
        self.shape = self._slices.shape

    def read(self, first: int, last: int) -> Tensor:
        """Normalised slices of the grid."""
        return (self._slices.read(first, last) - self._means).div_(self._deviations)


def _nonzero(
    volumes: Sequence[Volume], preprocessing: Preprocessing, geometry: Geometry
) -> np.ndarray | None:
    """Where any channel is not 0, and the holes in there; None where nobody asks."""
    if all(channel.statistics != "nonzero" for channel in preprocessing.channels):
        return None
    mask = np.zeros(geometry.oriented_shape, bool)
    for volume in volumes:
        mask |= orient(volume.array, geometry) != 0
    return filled(mask)


def preprocess_image(
    volumes: Volume | Sequence[Volume], preprocessing: Preprocessing, *, max_voxels: int = DEFAULT_MAX_VOXELS
) -> PreprocessedImage:
    """All of :class:`ScanSlices` in memory.

    Args:
        volumes: one volume for each channel, on one grid.
        preprocessing: what to do.
        max_voxels: refuse a resampled grid larger than this.

    Raises:
        UsageError: the number of channels is not the one that ``preprocessing`` was made for.
        DataError: the resampled grid would exceed ``max_voxels``.

    Example:
        >>> plan = Preprocessing((ChannelNormalisation((-1000, 400), -1000, 1400, "HU"),), {0: 0, 1: 1},
        ...     target_spacing_mm=(1.0, 1.4, 1.4))
        >>> scan = Volume(np.full((8, 8, 4), 400, np.int16), np.diag([-0.7, -0.7, 2.0, 1.0]))
        >>> image = preprocess_image(scan, plan)
        >>> image.array.shape, float(image.array.max())
        ((1, 8, 4, 4), 1.0)
    """
    volumes = [volumes] if isinstance(volumes, Volume) else list(volumes)
    geometry = preprocessing.geometry_of(volumes[0])
    slices = ScanSlices(volumes, preprocessing, geometry, max_voxels=max_voxels)
    array = np.empty(slices.shape, np.float32)
    for first, last in chunks(geometry.shape[0], array[:, 0].size):
        array[:, first:last] = slices.read(first, last)
    return PreprocessedImage(array, geometry.spacing_mm, geometry)


def preprocess_label(label: Volume, geometry: Geometry) -> np.ndarray:
    """Class indices (Z, Y, X) of ``label`` on the grid of the preprocessed image, by the nearest voxel.

    Nearest neighbours can lose a structure thinner than the target spacing.
    """
    return np.ascontiguousarray(resample_nearest(orient(label.array, geometry), geometry.shape))


def quantise(array: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """int16 for the normalised ``array``, see :attr:`Preprocessing.quantisation`."""
    slope, intercept = preprocessing.quantisation
    scaled = (array - np.float32(intercept)) * np.float32(1 / slope)
    np.rint(scaled, out=scaled)
    return np.clip(scaled, -32768, 32767, out=scaled).astype(np.int16)


def _window(channel: ChannelFingerprint, window: str | tuple[float, float]) -> tuple[float, float]:
    if not isinstance(window, str):
        return _pair(window)
    if window == "auto":
        window = "lung" if channel.units == "HU" else "percentiles"
    if window == "percentiles":
        low, high = channel.percentile_00_5, channel.percentile_99_5
        if low < high:
            return low, high
        # A foreground of one intensity: fall back on everything there is.
        return channel.minimum, max(channel.maximum, channel.minimum + 1.0)
    if window not in WINDOW_PRESETS_HU:
        raise UsageError(
            f"window: {window!r} is neither auto, percentiles, {', '.join(WINDOW_PRESETS_HU)} nor (low, high)"
        )
    if channel.units != "HU":
        raise UsageError(
            f"window: the preset {window!r} is in HU, but the data are {channel.units} "
            f"({channel.minimum:g} to {channel.maximum:g}); use 'percentiles' or (low, high)"
        )
    return WINDOW_PRESETS_HU[window]


def _target_spacing(
    fingerprint: Fingerprint, spacing_mm: str | tuple[float, float, float]
) -> tuple[float, float, float] | None:
    if spacing_mm == "native":
        return None
    if spacing_mm == "auto":
        spacings = np.asarray(fingerprint.spacings_mm)
        median = np.median(spacings, axis=0)
        if (np.abs(spacings / median - 1) <= 0.01).all():
            return None
        return _triple(median.tolist())
    if isinstance(spacing_mm, str):
        raise UsageError(f"spacing_mm: {spacing_mm!r} is neither 'auto', 'native' nor (z, y, x) in mm")
    return _triple(spacing_mm)


def _axes(content: Mapping[str, Any]) -> Axes:
    first, second, third = (int(axis) for axis in content.get("order", (0, 1, 2)))
    return Axes(content.get("orientation", "RAS"), (first, second, third))


def _pair(values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2:
        raise UsageError(f"window: {values!r} must be (low, high)")
    return float(values[0]), float(values[1])


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) != 3:
        raise UsageError(f"spacing_mm: {values!r} must be (z, y, x) in mm")
    return float(values[0]), float(values[1]), float(values[2])
