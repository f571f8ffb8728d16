"""The build of one patient: sizes drawn from a seed, and the surfaces that bound body, chest and lungs."""

from __future__ import annotations

import dataclasses

import numpy as np

from lungkit.data.phantom.grid import ellipse, smooth_max

LUNG_TOP_MM, LUNG_BOTTOM_MM = 125.0, -105.0
"""Height range of the lungs; 0 lies a little below the carina."""


@dataclasses.dataclass(frozen=True)
class Patient:
    """Sizes in mm and attenuations in HU of one patient; see :meth:`draw` for their ranges.

    The chest is an adult's at mid-inspiration, of simple surfaces: a superelliptic rib cage that narrows
    towards the apex, less mediastinum, heart, spine and two domes of diaphragm.
    """

    cage_width: float
    """Half the inner width of the rib cage."""
    cage_depth: float
    fat: float
    """Thickness of subcutaneous fat at the sides."""
    muscle: float
    heart_scale: float
    heart_shift: float
    dome: tuple[float, float]
    """Height of the right and the left dome of the diaphragm."""
    vertebra_phase: float
    rib_phase: float
    blood: float
    """HU of blood; above 100 with contrast medium."""
    soft_tissue: float
    parenchyma: float
    """Mean HU of aerated lung."""

    @classmethod
    def draw(cls, random: np.random.Generator) -> Patient:
        """A random patient; four in ten have contrast medium in their vessels."""

        def between(low: float, high: float) -> float:
            return float(random.uniform(low, high))

        enhanced = random.random() < 0.4
        return cls(
            cage_width=between(116, 130),
            cage_depth=between(80, 92),
            fat=between(4, 18),
            muscle=between(11, 17),
            heart_scale=between(0.85, 1.08),
            heart_shift=between(-6, 8),
            dome=(between(-80, -62), between(-95, -75)),
            vertebra_phase=between(0, 26),
            rib_phase=between(0, 27),
            blood=between(110, 190) if enhanced else between(35, 50),
            soft_tissue=between(42, 58) + (15 if enhanced else 0),
            parenchyma=between(-875, -815),
        )

    @property
    def spine_y(self) -> float:
        """Depth of the centre of the vertebral bodies."""
        return self.cage_depth - 25.0

    @property
    def heart_centre(self) -> tuple[float, float, float]:
        """Centre (z, y, x) of the heart, left of the midline."""
        return -52.0, -0.34 * self.cage_depth, 20.0 + self.heart_shift

    @property
    def heart_semi_axes(self) -> tuple[float, float, float]:
        """Half sizes (z, y, x) of the heart."""
        return 60.0 * self.heart_scale, 48.0 * self.heart_scale, 57.0 * self.heart_scale

    def cage(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Signed distance to the inner surface of the rib cage."""
        height = np.maximum(z + 60.0, 0.0)
        width = self.cage_width * np.sqrt(np.maximum(1.0 - (height / 198.0) ** 2, 0.02))
        depth = self.cage_depth * np.sqrt(np.maximum(1.0 - (height / 212.0) ** 2, 0.02))
        return _superellipse(y, x, depth, width)

    def body(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Signed distance to the skin."""
        shoulders = 1.0 + 0.10 * np.clip((z - 50.0) / 80.0, 0.0, 1.0)
        width = (self.cage_width + 20.0 + self.fat) * shoulders
        depth = self.cage_depth + 22.0 + 0.6 * self.fat
        return _superellipse(y - 8.0, x, depth, width)

    def mediastinum(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Signed distance to the surface between the lungs and what lies between them."""
        slim = 1.0 - 0.25 * np.clip((z - 40.0) / 80.0, 0.0, 1.0)
        depth = self.cage_depth
        vessels = ellipse(y, x / slim, (-2.0, 2.0), (40.0, 35.0))
        septum = ellipse(y, x, (-0.62 * depth, 4.0), (0.52 * depth, 8.0))
        aorta = ellipse(y, x, (40.0, 25.0), (17.0, 17.0))
        behind = ellipse(y, x, (32.0, 6.0), (32.0, 20.0))
        spine = ellipse(y, x, (self.spine_y + 10.0, 0.0), (35.0, 24.0))
        heart = self.heart(z, y, x)
        flat = -smooth_max(smooth_max(-septum, -aorta, 8.0), smooth_max(-behind, -spine, 8.0), 12.0)
        return -smooth_max(smooth_max(-vessels, -flat, 10.0), -heart, 10.0)

    def heart(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Signed distance to the pericardium."""
        (cz, cy, cx), (az, ay, ax) = self.heart_centre, self.heart_semi_axes
        squares = ((z - cz) / az) ** 2 + ((y - cy) / ay) ** 2 + ((x - cx) / ax) ** 2
        return (np.sqrt(squares) - 1.0) * min(az, ay, ax)

    def below_diaphragm(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Depth in mm under the domes of the diaphragm, positive in the abdomen."""
        right = self.dome[0] - 45.0 * ((x + 68.0) / 85.0) ** 2
        left = self.dome[1] - 45.0 * ((x - 68.0) / 85.0) ** 2
        height = np.where(x < 0, right, left) - 40.0 * ((y + 15.0) / self.cage_depth) ** 2
        return height - z

    def lungs(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Signed distance to the pleura of both lungs, for a grid's axes or for arrays of points."""
        outside = smooth_max(self.cage(z, y, x), -self.mediastinum(z, y, x), 12.0)
        return smooth_max(outside, self.below_diaphragm(z, y, x), 10.0)


def _superellipse(y: np.ndarray, x: np.ndarray, depth: np.ndarray | float, width: np.ndarray) -> np.ndarray:
    power = 2.3
    total = np.abs(y / depth) ** power + np.abs(x / width) ** power
    return (total ** (1.0 / power) - 1.0) * np.minimum(depth, width)
