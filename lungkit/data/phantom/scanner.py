"""What a scanner does to an ideal image: blur, noise, rounding."""

from __future__ import annotations

import numpy as np

from lungkit.data.phantom.grid import Grid

_LOWEST, _HIGHEST = -1024, 3071  # 12 bits, as scanners store


def scan(image: np.ndarray, grid: Grid, body: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Blur by the point spread, add correlated noise, round to int16.

    The point spread is a Gaussian of 0.7 to 1.1 mm in plane and of a third of the slice distance across (the
    slice profile). Quantum noise has a standard deviation of 12 to 28 HU in the middle of the body, less
    outside, and is correlated over about a pixel by the reconstruction filter (Kalender 2011, "Computed
    Tomography", 3rd ed., ch. 4).
    """
    in_plane = float(random.uniform(0.7, 1.1)) / grid.softness_mm
    image = gaussian_blur(image, (0.33, in_plane, in_plane))
    grain = float(random.uniform(0.3, 0.6))
    noise = gaussian_blur(random.standard_normal(grid.shape, dtype=np.float32), (0.0, grain, grain))
    noise /= max(float(noise.std()), 1e-6)
    level = float(random.uniform(12.0, 28.0))
    depth = np.clip(0.45 - body * np.float32(0.012), 0.45, 1.4)
    image += noise * depth * level
    return np.clip(np.rint(image), _LOWEST, _HIGHEST).astype(np.int16)


def gaussian_blur(image: np.ndarray, sigma: tuple[float, float, float]) -> np.ndarray:
    """Separable Gaussian of ``sigma`` voxels per axis; border voxels are repeated outside."""
    for axis, width in enumerate(sigma):
        if width <= 0 or image.shape[axis] == 1:
            continue
        radius = max(1, int(np.ceil(3 * width)))
        weights = np.exp(-0.5 * (np.arange(radius + 1) / width) ** 2)
        weights /= weights[0] + 2 * weights[1:].sum()
        length = image.shape[axis]
        source = np.arange(-radius, length + radius).clip(0, length - 1)
        padded = image.take(source, axis)
        windows = np.lib.stride_tricks.sliding_window_view(padded, length, axis)
        # The window axis comes last and counts places; the shifted axis counts steps.
        moved = np.moveaxis(windows, axis, 0)
        moved = np.moveaxis(moved, -1, axis + 1)
        image = moved[radius] * float(weights[0])
        for step in range(1, radius + 1):
            image += (moved[radius - step] + moved[radius + step]) * float(weights[step])
    return image
