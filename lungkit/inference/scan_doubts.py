"""Whether a scan is like those that a model was trained on: units and range of its intensities, size of its voxels.

HU mean the same in every scan, so for models of HU the rules are about CT: where its air and its bone lie. Other
intensities are compared with the training scans that the checkpoint describes. Ordinary CT raises no doubt, be it
padded (-2000, -3024), a small crop without air, with metal, or clipped no closer than the training scans were.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lungkit.data.fingerprint import ChannelFingerprint
from lungkit.data.geometry import plan_geometry
from lungkit.data.preprocessing import ChannelNormalisation
from lungkit.data.volume import Volume
from lungkit.inference.trained_model import TrainedModel

_SAMPLES = 200_000
_AIR_HU = -500.0
_LOWEST_HU = -2000.0
"""Noise makes air darker than -1000, but no darker than this."""
_FEW_VALUES = 16
"""A drawing of so few different values says nothing about units or windows."""
_IN_PLANE, _BETWEEN_SLICES = 1.2, 1.5
"""Factor beyond the range of training from which a voxel size is unknown."""


def scan_doubts(model: TrainedModel, volumes: Sequence[Volume]) -> list[str]:
    """Sentences about what in a scan is unlike the training scans; none for an ordinary one."""
    doubts = []
    for index, (volume, channel) in enumerate(zip(volumes, model.preprocessing.channels, strict=True)):
        known = model.intensities[index] if model.intensities is not None else None
        problem = _intensity_doubt(volume.array, channel, known)
        if problem is not None:
            where = f"channel {model.channels[index]}: " if len(volumes) > 1 else ""
            trained = {"HU": "HU", "8-bit": "8-bit pictures"}.get(channel.units, "other intensities")
            if known is not None and channel.units not in ("HU", "8-bit"):
                trained = f"intensities from {known.minimum:g} to {known.maximum:g}"
            doubts.append(
                f"{where}voxels lie between {volume.array.min():g} and {volume.array.max():g}: {problem}, but "
                f"{model.name} was trained on {trained}; the mask cannot be trusted"
            )
    spacing = _spacing_doubt(model, volumes[0])
    return doubts if spacing is None else [*doubts, spacing]


def _intensity_doubt(
    array: np.ndarray, channel: ChannelNormalisation, known: ChannelFingerprint | None
) -> str | None:
    low, high = float(array.min()), float(array.max())
    if low == high:
        return None
    sample = _sample(array)
    if channel.units == "HU":
        return _hu_doubt(sample, low, high, channel, known)
    if channel.units == "8-bit":
        return _picture_doubt(sample, low, high)
    return None if known is None else _other_doubt(sample, known)


def _sample(array: np.ndarray) -> np.ndarray:
    """Voxels in equal steps through the whole volume."""
    flat = array.ravel(order="K")
    # An odd step meets every column of an image whose rows are of an even size.
    return flat[:: max(1, flat.size // _SAMPLES) | 1].astype(np.float64)


def _hu_doubt(
    sample: np.ndarray,
    low: float,
    high: float,
    channel: ChannelNormalisation,
    known: ChannelFingerprint | None,
) -> str | None:
    small = _small_range(sample, low, high)
    if small is not None:
        return small
    if 0 <= low <= 10 and high <= 255:
        return "this looks like an 8-bit picture"
    # Padding is one value; real air and lungs are many.
    values = sample[sample > low] if low < _AIR_HU else sample
    padded = low < _AIR_HU and not (values < _AIR_HU).any() and np.unique(sample).size > _FEW_VALUES
    if (low >= _AIR_HU or padded) and values.size:
        # Soft tissue lies about 0 HU; where an eighth and more lies here, and no fat below, it was moved.
        bright = float(np.quantile(values, 0.875))
        if float(values.min()) >= -60 and bright >= 700:
            return (
                f"no air (nothing below {_AIR_HU:g} HU but padding) and an eighth above {bright:.4g}: this looks like "
                "CT stored without its intercept of -1024, or like another scale"
            )
    below = sample[sample < _LOWEST_HU]
    if float(np.quantile(sample, 0.98)) > 4000 or (
        below.size > 0.01 * sample.size and np.unique(below).size > _FEW_VALUES
    ):
        return "this is no scale of HU, which run from -1024 to 3071"
    return _clip_doubt(sample, low, high, channel, known)


def _small_range(sample: np.ndarray, low: float, high: float) -> str | None:
    """Noise alone makes HU differ by more than these."""
    fractions = bool((sample % 1 != 0).any())
    if high - low > 50 or not (fractions or (low >= -1 and high <= 1)):
        return None
    if low >= -0.01 and high <= 1.01:
        return "this looks scaled to 0..1"
    if low >= -1.01 and high <= 1.01:
        return "this looks scaled to -1..1"
    return "this looks normalised (z-scores)"


def _clip_doubt(
    sample: np.ndarray,
    low: float,
    high: float,
    channel: ChannelNormalisation,
    known: ChannelFingerprint | None,
) -> str | None:
    """Clipped closer than the model's window and the training scans: what the network looks for may be cut off."""
    if np.unique(sample).size <= _FEW_VALUES:
        return None
    least, most = channel.window or (-np.inf, np.inf)
    if known is not None:
        least, most = max(least, known.minimum), min(most, known.maximum)
    at_low, at_high = float((sample == low).mean()), float((sample == high).mean())
    if (at_low >= 0.01 and low > max(least, -900.0) + 1) or (at_high >= 0.002 and high < most - 1):
        return (
            f"{100 * at_low:.2g} % at the lower end, {100 * at_high:.2g} % at the upper: this looks clipped"
        )
    return None


def _picture_doubt(sample: np.ndarray, low: float, high: float) -> str | None:
    if low < -0.5 or high > 255.5:
        if low < _AIR_HU:
            return "this looks like HU"
        return "this is no 8-bit picture"
    return _small_range(sample, low, high)


def _other_doubt(sample: np.ndarray, known: ChannelFingerprint) -> str | None:
    extent = known.maximum - known.minimum
    margin = 0.1 * extent
    outside = float(((sample < known.minimum - margin) | (sample > known.maximum + margin)).mean())
    if outside > 0.01:
        return f"{100 * outside:.2g} % lie outside of the training scans"
    if known.volume_percentiles is None:
        return None
    first, middle, last = known.volume_percentiles
    own_first, own_middle, own_last = np.quantile(sample, (0.01, 0.5, 0.99))
    spread, own_spread = last - first, float(own_last - own_first)
    if spread > 0 and (own_spread < spread / 4 or own_spread > 4 * spread):
        return f"98 % lie within {own_spread:.4g}, those of the training scans within {spread:.4g}"
    if spread > 0 and abs(float(own_middle) - middle) > spread:
        return f"the median is {own_middle:.4g}, that of the training scans {middle:.4g}"
    return None


def _spacing_doubt(model: TrainedModel, volume: Volume) -> str | None:
    known = model.spacing_range_mm
    if known is None:
        return None
    geometry = plan_geometry(volume)
    for axis in range(3 - model.dims, 3):
        factor = _IN_PLANE if axis else _BETWEEN_SLICES
        size, least, most = geometry.spacing_mm[axis], known["min"][axis], known["max"][axis]
        if geometry.shape[axis] > 1 and not least / factor <= size <= most * factor:
            own = " x ".join(f"{length:.4g}" for length in geometry.spacing_mm)
            ends = [" x ".join(f"{length:.4g}" for length in known[name]) for name in ("min", "max")]
            return (
                f"voxels of {own} mm (z, y, x), but {model.name} was trained on {ends[0]} to {ends[1]} mm; the scan is "
                "resampled, but the mask cannot be trusted"
            )
    return None
