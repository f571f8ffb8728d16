"""What augmentation does, how often and how strongly."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lungkit.errors import UsageError

Range = tuple[float, float]

# Coefficients of a cubic B-spline displacement below 0.40 of the control point distance keep a 3D map one to
# one (0.48 in 2D): Choi and Lee 2000, "Injectivity conditions of 2D and 3D uniform cubic B-spline functions".
_INJECTIVE = 0.40


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """One probability and one range per transform; every sample of a batch draws its own.

    A value is drawn uniformly from its range (low, high); factors and gamma are drawn uniformly in their
    logarithm, so that halving is as likely as doubling. The defaults follow nnU-Net (Isensee et al. 2021,
    Nature Methods 18:203), with smaller rotations, as a patient lies in a scanner one way up. Intensities are
    those of the normalised image (standard deviation about 1).

    Args:
        enabled: False turns all of it off.
        rotation_probability: of a rotation.
        rotation_degrees: in the axial plane (about Z), from Y towards X.
        tilt_degrees: about Y and about X, in 3D; none where slices are thick (see :class:`Augmenter`).
        scaling_probability: of a change of size.
        scaling_range: factor; above 1 magnifies.
        flip_probability: of a mirror image, drawn for each axis on its own.
        translation_probability: of a shift.
        translation_fraction: shift along each axis as a fraction of the patch.
        elastic_probability: of a smooth free-form deformation (cubic B-splines, Rueckert et al. 1999).
        elastic_displacement: largest displacement, in voxels of the finest axis.
        elastic_spacing: distance of the control points, in voxels of the finest axis.
        noise_probability: of added Gaussian noise.
        noise_std: its standard deviation.
        blur_probability: of a Gaussian blur.
        blur_sigma: its standard deviation in voxels of the finest axis.
        brightness_probability: of a shift of all intensities.
        brightness_shift: what is added.
        contrast_probability: of a stretch of the intensities about their mean, clipped to their old range.
        contrast_factor: factor of the stretch.
        gamma_probability: of a power law on the intensities, their range kept.
        gamma_range: exponent.
        low_resolution_probability: of sampling down and up again.
        low_resolution_scale: factor of sampling down, at most 1.

    Raises:
        UsageError: a value is out of range; the message names the field.

    Example:
        >>> AugmentConfig(noise_probability=0.5, noise_std=(0.0, 0.3)).noise_std
        (0.0, 0.3)
        >>> AugmentConfig(flip_probability=2.0)
        Traceback (most recent call last):
        lungkit.errors.UsageError: flip_probability is 2.0; give a probability from 0 to 1
    """

    enabled: bool = True
    rotation_probability: float = 0.2
    rotation_degrees: Range = (-30.0, 30.0)
    tilt_degrees: Range = (-10.0, 10.0)
    scaling_probability: float = 0.2
    scaling_range: Range = (0.7, 1.4)
    flip_probability: float = 0.5
    translation_probability: float = 0.2
    translation_fraction: Range = (-0.1, 0.1)
    elastic_probability: float = 0.0
    elastic_displacement: Range = (1.0, 6.0)
    elastic_spacing: float = 24.0
    noise_probability: float = 0.1
    noise_std: Range = (0.0, 0.2)
    blur_probability: float = 0.2
    blur_sigma: Range = (0.5, 1.0)
    brightness_probability: float = 0.15
    brightness_shift: Range = (-0.2, 0.2)
    contrast_probability: float = 0.15
    contrast_factor: Range = (0.75, 1.25)
    gamma_probability: float = 0.3
    gamma_range: Range = (0.7, 1.5)
    low_resolution_probability: float = 0.15
    low_resolution_scale: Range = (0.5, 1.0)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if isinstance(field.default, tuple):
                # A configuration read back from JSON or YAML holds lists.
                checked = _checked_range(field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, checked)
        for name in probability_fields():
            value = getattr(self, name)
            if not _is_number(value) or not 0.0 <= value <= 1.0:
                raise UsageError(f"{name} is {value!r}; give a probability from 0 to 1")
        for name in ("scaling_range", "contrast_factor", "gamma_range", "low_resolution_scale"):
            if getattr(self, name)[0] <= 0:
                raise UsageError(f"{name} is {getattr(self, name)}; give factors above 0")
        for name in ("noise_std", "blur_sigma", "elastic_displacement"):
            if getattr(self, name)[0] < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; give values of at least 0")
        if self.low_resolution_scale[1] > 1:
            raise UsageError(f"low_resolution_scale is {self.low_resolution_scale}; give factors up to 1")
        if not _is_number(self.elastic_spacing) or self.elastic_spacing < 2:
            raise UsageError(f"elastic_spacing is {self.elastic_spacing!r}; give at least 2 voxels")
        if self.elastic_displacement[1] > _INJECTIVE * self.elastic_spacing:
            raise UsageError(
                f"elastic_displacement is {self.elastic_displacement}; above {_INJECTIVE} of elastic_spacing "
                f"({self.elastic_spacing}) tissue would fold over itself, give less or raise elastic_spacing"
            )

    @classmethod
    def none(cls) -> AugmentConfig:
        """All probabilities zero: a base on which to switch on single transforms.

        Example:
            >>> dataclasses.replace(AugmentConfig.none(), blur_probability=1.0).flip_probability
            0.0
        """
        off: dict[str, Any] = dict.fromkeys(probability_fields(), 0.0)
        return cls(**off)


def probability_fields() -> tuple[str, ...]:
    """Names of the probabilities, in the order in which the transforms are applied."""
    return tuple(
        field.name for field in dataclasses.fields(AugmentConfig) if field.name.endswith("_probability")
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _checked_range(name: str, value: object) -> Range:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(_is_number, value)):
        raise UsageError(f"{name} is {value!r}; give two numbers, low and high")
    low, high = float(value[0]), float(value[1])
    if low > high:
        raise UsageError(f"{name} is {(low, high)}; the first number is the lower one")
    return low, high
