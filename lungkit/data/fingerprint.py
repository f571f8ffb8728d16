"""The fingerprint of a dataset: what its training cases are like, measured before anything is planned."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lungkit.data.dataset import BLACK_AND_WHITE, IGNORE_INDEX, Case, Dataset, read_case
from lungkit.data.geometry import plan_geometry
from lungkit.data.volume import DEFAULT_MAX_VOXELS, NanPolicy
from lungkit.errors import DataError, UsageError, shorten

_LOG = logging.getLogger("lungkit")

_SAMPLES_PER_CASE = 20_000
_SAMPLES_OF_ALL_VOXELS = 2_000
_AIR_HU = -500.0


@dataclass(frozen=True)
class ChannelFingerprint:
    """Intensities of one channel over the training cases.

    ``units`` is "HU", "8-bit" or "arbitrary". ``mean``, ``std`` and the percentiles are over the foreground
    (classes 1 to K-1), over a sample of all voxels where there is no foreground at all; ``minimum`` and
    ``maximum`` are over all voxels. ``volume_percentiles`` (1, 50 and 99) are over a sample of all voxels; None where
    an older version took the fingerprint.
    """

    name: str
    units: str
    dtype: str
    minimum: float
    maximum: float
    mean: float
    std: float
    percentile_00_5: float
    percentile_99_5: float
    volume_percentiles: tuple[float, float, float] | None = None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ChannelFingerprint:
        """Inverse of :func:`dataclasses.asdict`."""
        percentiles = content.get("volume_percentiles")
        if percentiles is not None:
            first, middle, last = (float(value) for value in percentiles)
            percentiles = first, middle, last
        return cls(
            name=str(content["name"]),
            units=str(content["units"]),
            dtype=str(content["dtype"]),
            minimum=float(content["minimum"]),
            maximum=float(content["maximum"]),
            mean=float(content["mean"]),
            std=float(content["std"]),
            percentile_00_5=float(content["percentile_00_5"]),
            percentile_99_5=float(content["percentile_99_5"]),
            volume_percentiles=percentiles,
        )


@dataclass(frozen=True)
class Fingerprint:
    """Shapes, spacings (both z, y, x), intensities and foreground of the training cases, and notices.

    ``foreground_fractions`` holds foreground voxels over all voxels of each case, in the order of
    ``case_ids``; ``class_voxels`` the number of voxels of each class; ``notices`` are sentences for people.
    """

    case_ids: tuple[str, ...]
    shapes: tuple[tuple[int, int, int], ...]
    spacings_mm: tuple[tuple[float, float, float], ...]
    channels: tuple[ChannelFingerprint, ...]
    foreground_fractions: tuple[float, ...]
    class_voxels: tuple[int, ...]
    label_map: Mapping[int, int]
    notices: tuple[str, ...]

    def summary(self) -> str:
        """Some lines for people."""
        shapes, spacings = np.asarray(self.shapes), np.asarray(self.spacings_mm)
        fractions = np.asarray(self.foreground_fractions)
        lines = [
            f"{len(self.case_ids)} cases",
            (
                f"size (z, y, x): median {_join(np.median(shapes, axis=0))}, "
                f"from {_join(shapes.min(axis=0))} to {_join(shapes.max(axis=0))}"
            ),
            (
                f"spacing (z, y, x): median {_join(np.median(spacings, axis=0))} mm, "
                f"from {_join(spacings.min(axis=0))} to {_join(spacings.max(axis=0))} mm"
            ),
            (
                f"foreground: median {100 * np.median(fractions):.3g} % of a case, "
                f"{np.count_nonzero(fractions == 0)} cases without"
            ),
        ]
        lines += [
            f"channel {c.name}: {c.units}, {c.dtype}, {c.minimum:g} to {c.maximum:g}; foreground mean "
            f"{c.mean:.4g}, std {c.std:.4g}, percentiles 0.5 and 99.5: {c.percentile_00_5:.4g}, "
            f"{c.percentile_99_5:.4g}"
            for c in self.channels
        ]
        return "\n".join([*lines, *(f"note: {notice}" for notice in self.notices)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {**asdict(self), "label_map": {str(value): index for value, index in self.label_map.items()}}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Fingerprint:
        """Inverse of :meth:`to_dict`.

        Raises:
            DataError: an entry is missing or of the wrong kind.
        """
        try:
            return cls(
                case_ids=tuple(content["case_ids"]),
                shapes=tuple((int(z), int(y), int(x)) for z, y, x in content["shapes"]),
                spacings_mm=tuple((float(z), float(y), float(x)) for z, y, x in content["spacings_mm"]),
                channels=tuple(ChannelFingerprint.from_dict(channel) for channel in content["channels"]),
                foreground_fractions=tuple(content["foreground_fractions"]),
                class_voxels=tuple(content["class_voxels"]),
                label_map={int(value): int(index) for value, index in content["label_map"].items()},
                notices=tuple(content["notices"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"fingerprint cannot be restored: {error!r}; measure it again") from error


def fingerprint_dataset(
    dataset: Dataset,
    case_ids: Iterable[str],
    *,
    max_voxels: int = DEFAULT_MAX_VOXELS,
    nan_policy: NanPolicy = NanPolicy.REFUSE,
    progress: Callable[[int, int], None] | None = None,
) -> Fingerprint:
    """Read the cases of ``case_ids`` and measure them; every file is verified on the way.

    Mean and standard deviation are exact; percentiles come from up to 20,000 evenly spaced foreground voxels
    of each case, weighted by how many each stands for. The result does not depend on the number of threads.

    Args:
        dataset: the dataset.
        case_ids: the training cases; validation cases must stay out, their intensities are not known yet.
        max_voxels: refuse larger files.
        nan_policy: what to do with voxels that are not finite.
        progress: called with (cases done, cases in all) after each case.

    Raises:
        UsageError: no case is named, or one is unknown or has no label.
        DataError: a file cannot be used.

    Example:
        >>> import tempfile
        >>> from lungkit.data import open_dataset, write_phantom_dataset
        >>> root = write_phantom_dataset(tempfile.mkdtemp() + "/phantoms", cases=2, shape=(8, 32, 32), dims=3)
        >>> dataset = open_dataset(root)
        >>> fingerprint = fingerprint_dataset(dataset, [case.case_id for case in dataset.cases])
        >>> fingerprint.channels[0].units, fingerprint.shapes
        ('HU', ((8, 32, 32), (8, 32, 32)))
    """
    cases = [dataset.case(case_id) for case_id in case_ids]
    if not cases:
        raise UsageError("case_ids: no case to take a fingerprint of")
    without = [case.case_id for case in cases if case.label is None]
    if without:
        raise UsageError(f"case_ids: no label for {shorten(without)}; the fingerprint needs the foreground")
    label_map = dataset.label_map

    # Decompression and numpy release the interpreter lock; four scans at a time bound the memory.
    pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1))
    measured = []
    try:
        jobs = [
            pool.submit(_measure, case, label_map, dataset.num_classes, max_voxels, nan_policy)
            for case in cases
        ]
        for done, job in enumerate(jobs, start=1):
            measured.append(job.result())
            if progress is not None:
                progress(done, len(cases))
    finally:
        pool.shutdown(cancel_futures=True)

    has_foreground = any(case.foreground_voxels for case in measured)
    channels = tuple(
        _merge_channel(name, [case.channels[index] for case in measured], has_foreground)
        for index, name in enumerate(dataset.channel_names)
    )
    fingerprint = Fingerprint(
        case_ids=tuple(case.case_id for case in cases),
        shapes=tuple(case.shape for case in measured),
        spacings_mm=tuple(case.spacing_mm for case in measured),
        channels=channels,
        foreground_fractions=tuple(case.foreground_voxels / math.prod(case.shape) for case in measured),
        class_voxels=tuple(int(count) for count in np.sum([case.class_voxels for case in measured], axis=0)),
        label_map=label_map,
        notices=_notices(cases, measured, channels),
    )
    for notice in fingerprint.notices:
        _LOG.warning("%s: %s", dataset.root, notice)
    return fingerprint


@dataclass(frozen=True, eq=False)
class _ChannelMeasure:
    dtype: str
    minimum: float
    maximum: float
    foreground: _Sample
    everything: _Sample


@dataclass(frozen=True, eq=False)
class _Sample:
    """Exact moments of a set of voxels, and some of them, each standing for ``weight``."""

    count: int
    mean: float
    squares: float
    values: np.ndarray
    weight: float


@dataclass(frozen=True, eq=False)
class _CaseMeasure:
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    class_voxels: np.ndarray
    channels: tuple[_ChannelMeasure, ...]
    label_notes: tuple[str, ...]

    @property
    def foreground_voxels(self) -> int:
        return int(self.class_voxels[1:].sum())


def _measure(
    case: Case, label_map: Mapping[int, int], num_classes: int, max_voxels: int, nan_policy: NanPolicy
) -> _CaseMeasure:
    volumes, label = read_case(case, label_map, max_voxels=max_voxels, nan_policy=nan_policy)
    if label is None:
        raise UsageError(f"case_ids: {case.case_id} has no label")
    geometry = plan_geometry(volumes[0])
    # One memory order for mask and image, so that picking the foreground is one pass over both.
    flat_label = label.array.ravel(order="F")
    foreground = np.flatnonzero((flat_label > 0) & (flat_label != IGNORE_INDEX))
    class_voxels = np.bincount(flat_label[foreground], minlength=num_classes)[:num_classes]
    class_voxels[0] = np.count_nonzero(flat_label == 0)
    channels = []
    for volume in volumes:
        values = volume.array.ravel(order="F")
        channels.append(
            _ChannelMeasure(
                dtype=volume.array.dtype.name,
                minimum=float(values.min()),
                maximum=float(values.max()),
                foreground=_sample(values[foreground]),
                everything=_sample(values[:: max(1, values.size // _SAMPLES_OF_ALL_VOXELS)]),
            )
        )
    return _CaseMeasure(geometry.shape, geometry.spacing_mm, class_voxels, tuple(channels), label.notes)


def _sample(values: np.ndarray) -> _Sample:
    if values.size == 0:
        return _Sample(0, 0.0, 0.0, values, 0.0)
    mean = float(values.mean(dtype=np.float64))
    squares = float(np.square(values - mean, dtype=np.float64).sum())
    # A copy, since a view would keep the whole scan in memory.
    picked = values[:: -(-values.size // _SAMPLES_PER_CASE)].copy()
    return _Sample(values.size, mean, squares, picked, values.size / picked.size)


def _merge_channel(name: str, cases: list[_ChannelMeasure], has_foreground: bool) -> ChannelFingerprint:
    samples = [case.foreground if has_foreground else case.everything for case in cases]
    counts = np.array([sample.count for sample in samples], np.float64)
    means = np.array([sample.mean for sample in samples])
    mean = float((counts * means).sum() / counts.sum())
    squares = sum(sample.squares for sample in samples) + float((counts * (means - mean) ** 2).sum())
    low, high = _percentiles(samples, (0.005, 0.995))
    first, middle, last = _percentiles([case.everything for case in cases], (0.01, 0.5, 0.99))
    return ChannelFingerprint(
        name=name,
        units=_units(cases),
        dtype=", ".join(sorted({case.dtype for case in cases})),
        minimum=min(case.minimum for case in cases),
        maximum=max(case.maximum for case in cases),
        mean=mean,
        std=math.sqrt(squares / counts.sum()),
        percentile_00_5=low,
        percentile_99_5=high,
        volume_percentiles=(first, middle, last),
    )


def _percentiles(samples: list[_Sample], fractions: tuple[float, ...]) -> list[float]:
    values = np.concatenate([sample.values for sample in samples])
    weights = np.concatenate([np.full(sample.values.size, sample.weight) for sample in samples])
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[order])
    index = np.searchsorted(below, np.asarray(fractions) * below[-1])
    return [float(value) for value in values[order][np.minimum(index, values.size - 1)]]


def _units(cases: list[_ChannelMeasure]) -> str:
    minima = np.array([case.minimum for case in cases])
    maxima = np.array([case.maximum for case in cases])
    # A lung CT holds air, whatever padding (-2000, -3024) surrounds it.
    if -10_000 <= np.median(minima) <= _AIR_HU and np.median(maxima) > _AIR_HU:
        return "HU"
    whole = all((case.everything.values % 1 == 0).all() for case in cases)
    if minima.min() >= 0 and 1 < maxima.max() <= 255 and whole:
        return "8-bit"
    return "arbitrary"


def _notices(
    cases: list[Case], measured: list[_CaseMeasure], channels: tuple[ChannelFingerprint, ...]
) -> tuple[str, ...]:
    notices = []
    for index, channel in enumerate(channels):
        prefix = f"channel {channel.name}: " if len(channels) > 1 else ""
        extent = f"{channel.minimum:g} to {channel.maximum:g}"
        if channel.units == "8-bit":
            notices.append(
                f"{prefix}8-bit data, not HU: window presets do not apply; "
                "percentiles from the foreground are used"
            )
        elif channel.units == "arbitrary":
            shifted = channel.minimum >= 0 and 1500 <= channel.maximum <= 5000
            reason = ", which looks like CT stored without its intercept of -1024" if shifted else ""
            notices.append(f"{prefix}intensities from {extent}{reason}: not HU; window presets do not apply")
        else:
            airless = [
                case.case_id
                for case, measure in zip(cases, measured, strict=True)
                if measure.channels[index].minimum > _AIR_HU
            ]
            if airless:
                notices.append(
                    f"{prefix}{len(airless)} cases hold no air and may not be in HU: {shorten(airless)}"
                )
    empty = [c.case_id for c, measure in zip(cases, measured, strict=True) if not measure.foreground_voxels]
    if len(empty) == len(cases):
        notices.append("no case holds any foreground: intensities are taken over all voxels")
    elif empty:
        notices.append(f"{len(empty)} of {len(cases)} cases hold no foreground: {shorten(empty)}")
    if all(measure.spacing_mm == (1.0, 1.0, 1.0) for measure in measured):
        notices.append("every spacing is exactly 1 mm: probably unknown, so lengths in mm mean little")
    white = sum(BLACK_AND_WHITE in measure.label_notes for measure in measured)
    if white:
        notices.append(f"{white} of {len(cases)} masks hold 0 and 255, which are read as 0 and 1")
    slices = sum(measure.shape[0] == 1 for measure in measured)
    if slices:
        notices.append(f"{slices} of {len(cases)} cases are a single slice")
    return tuple(notices)


def _join(values: np.ndarray) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
