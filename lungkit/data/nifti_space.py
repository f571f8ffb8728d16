"""Where a NIfTI header puts its voxels: sform, qform and units.

Read as the standard and its C library do (nifti1.h, methods 1 to 3; ``nifti_quatern_to_mat44``), which ITK follows:
a qfac that is not negative counts as 1, a quaternion that rounding made longer than 1 is scaled back, and a form that
cannot be used gives way to the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lungkit.errors import DataError

_MILLIMETRES = {1: 1e3, 2: 1.0, 3: 1e-3}  # NIFTI_UNITS_METER, _MM, _MICRON
_UNIT_NAMES = {1: "metres", 2: "mm", 3: "micrometres"}
# A unit quaternion in float32 is off by 1e-6 or so, one that was written with few digits by 1e-3.
_LONGEST_QUATERNION = 1.01
_AGREE = 0.1
"""Forms that put a corner of the volume this share of a voxel apart are one and the same."""


@dataclass(frozen=True)
class NiftiSpace:
    """The fields of a header that say where its voxels lie, as they stand in the file and in the file's own units.

    A mask that is written with those of its scan lies on it in every reader, whichever form that reader goes by.
    ``pixdim`` holds qfac and the three spacings; ``units`` is xyzt_units.
    """

    sform_code: int
    qform_code: int
    srows: tuple[tuple[float, ...], ...]
    quaternion: tuple[float, ...]
    offset: tuple[float, ...]
    pixdim: tuple[float, ...]
    units: int

    @classmethod
    def from_header(cls, header: Any) -> NiftiSpace:
        """Of a nibabel header."""

        def numbers(*names: str) -> tuple[float, ...]:
            return tuple(float(header[name]) for name in names)

        return cls(
            sform_code=int(header["sform_code"]),
            qform_code=int(header["qform_code"]),
            srows=tuple(
                tuple(float(value) for value in header[name]) for name in ("srow_x", "srow_y", "srow_z")
            ),
            quaternion=numbers("quatern_b", "quatern_c", "quatern_d"),
            offset=numbers("qoffset_x", "qoffset_y", "qoffset_z"),
            pixdim=tuple(float(value) for value in header["pixdim"][:4]),
            units=int(header["xyzt_units"]),
        )

    def write_to(self, header: Any) -> None:
        """Put the fields into a nibabel header."""
        header["sform_code"], header["qform_code"] = self.sform_code, self.qform_code
        for name, row in zip(("srow_x", "srow_y", "srow_z"), self.srows, strict=True):
            header[name] = row
        for names, values in (
            (("quatern_b", "quatern_c", "quatern_d"), self.quaternion),
            (("qoffset_x", "qoffset_y", "qoffset_z"), self.offset),
        ):
            for name, value in zip(names, values, strict=True):
                header[name] = value
        header["pixdim"][:4] = self.pixdim
        header["xyzt_units"] = self.units

    @property
    def millimetres(self) -> float:
        """Length of the file's unit in mm; a unit that is not declared is taken for mm."""
        return _MILLIMETRES.get(self.units & 7, 1.0)

    def sform(self) -> np.ndarray:
        """The sform (4, 4) in mm, whatever its code."""
        affine = np.eye(4)
        affine[:3] = np.array(self.srows) * self.millimetres
        return affine

    def qform(self) -> np.ndarray:
        """The qform (4, 4) in mm, whatever its code; NaN where it cannot be computed."""
        b, c, d = self.quaternion
        length = b * b + c * c + d * d
        affine = np.full((4, 4), np.nan)
        if not length <= _LONGEST_QUATERNION:  # NaN too
            return affine
        if length > 1 - 1e-7:  # as nifti_quatern_to_mat44 has it: half a turn
            b, c, d = (value / math.sqrt(length) for value in (b, c, d))
            a = 0.0
        else:
            a = math.sqrt(1 - length)
        rotation = np.array(
            [
                [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
                [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
                [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
            ]
        )
        qfac = -1.0 if self.pixdim[0] < 0 else 1.0
        affine[:] = np.eye(4)
        affine[:3, :3] = rotation * (self.spacing_mm * (1, 1, qfac))
        affine[:3, 3] = np.array(self.offset) * self.millimetres
        return affine

    @property
    def spacing_mm(self) -> np.ndarray:
        """pixdim in mm, without sign."""
        return np.abs(self.pixdim[1:]) * self.millimetres

    def choose(self, shape: Sequence[int], where: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """The affine (4, 4) in mm of a volume of ``shape``, and what its user has to know.

        The sform where it is set and usable, else the qform, else pixdim alone.

        Raises:
            DataError: no form can be used; begins with ``where``.
        """
        sform = self.sform() if self.sform_code > 0 else None
        qform = _with_depth(self.qform(), shape) if self.qform_code > 0 else None
        sform_problem, qform_problem = (
            None if form is None else problem_of_affine(form) for form in (sform, qform)
        )
        notes = []
        if self.units & 7 not in (0, *_MILLIMETRES):
            notes.append(f"xyzt_units is {self.units}, which names no unit of length; taken as mm")
        if min(self.pixdim[1:]) < 0:
            notes.append(
                f"pixdim {_text(self.pixdim[1:])} is negative; the signs are ignored, other programs may not"
            )
        if sform is not None and sform_problem is None:
            affine = sform
            if qform_problem is not None:
                notes.append(f"the qform {qform_problem}; the sform is used")
            else:
                note = _disagreement(sform, qform, _with_depth(self.spacing_mm, shape), shape)
                notes += [] if note is None else [note]
        elif qform is not None and qform_problem is None:
            affine = qform
            if sform_problem is not None:
                notes.append(f"the sform {sform_problem}; the qform is used")
        elif sform is not None:
            raise affine_error(sform, where)
        elif qform is not None:
            if np.isnan(qform).any():
                quaternion = ", ".join(f"{value:g}" for value in self.quaternion)
                raise DataError(
                    f"{where}: the geometry in the header cannot be used (quaternion {quaternion} is no rotation, "
                    "and there is no sform); correct it"
                )
            raise affine_error(qform, where)
        else:
            # Method 1: spacing alone, no orientation.
            spacing = _with_depth(self.spacing_mm, shape)
            affine = np.diag([*spacing, 1.0])
            if problem_of_affine(affine) is not None:
                raise affine_error(affine, where)
            notes.append(
                "neither sform nor qform is set, so the orientation is unknown; using pixdim "
                f"({_text(spacing)} mm) and taking the axes as right, anterior, superior"
            )
        return affine, tuple(notes)

    def alternatives(self, shape: Sequence[int]) -> list[np.ndarray]:
        """Every usable affine that the header holds, in mm: readers differ in which they take."""
        forms = [self.sform()] if self.sform_code > 0 else []
        if self.qform_code > 0:
            forms.append(_with_depth(self.qform(), shape))
        return [form for form in forms if problem_of_affine(form) is None]

    @property
    def unit_name(self) -> str:
        """Of the file's lengths."""
        return _UNIT_NAMES.get(self.units & 7, "unknown units")


def problem_of_affine(affine: np.ndarray) -> str | None:
    """Why ``affine`` does not map voxels to millimetres one to one, or None where it does."""
    if affine.shape != (4, 4):
        return f"has shape {affine.shape}, expected (4, 4)"
    if not np.isfinite(affine).all():
        return "holds values that are not finite"
    if not np.array_equal(affine[3], (0, 0, 0, 1)):
        return "does not end with the row 0 0 0 1"
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    # The determinant of the unit directions: 1 for a right angle, 0 for axes in one plane.
    if (lengths == 0).any() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-4:
        return "is not invertible"
    return None


def affine_error(affine: np.ndarray, where: str) -> DataError:
    """The error for an affine that cannot be used."""
    return DataError(
        f"{where}: the affine {problem_of_affine(affine)} {affine_text(affine)}; correct the geometry of the file"
    )


def affine_text(affine: np.ndarray) -> str:
    """``affine`` in one line for a message."""
    return "[" + "; ".join(" ".join(f"{value:g}" for value in row) for row in np.atleast_2d(affine)) + "]"


def _with_depth(values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """``values``, a spacing or an affine, with a depth for the single slice whose header gives none."""
    if shape[2] != 1:
        return values
    values = values.copy()
    if values.ndim == 1 and values[2] == 0:
        values[2] = 1.0
    elif values.ndim == 2 and np.isfinite(values).all() and not values[:3, 2].any():
        normal = np.cross(values[:3, 0], values[:3, 1])
        length = float(np.linalg.norm(normal))
        if length > 0:
            values[:3, 2] = normal / length
    return values


def _disagreement(
    sform: np.ndarray, qform: np.ndarray | None, spacing: np.ndarray, shape: Sequence[int]
) -> str | None:
    """A sentence where another reader would find the voxels elsewhere, or of another size."""
    own = np.linalg.norm(sform[:3, :3], axis=0)
    tolerance = _AGREE * float(own.min())
    # Written so that NaN counts as different.
    same_spacing = bool((np.abs(spacing - own) * np.asarray(shape)).max() <= tolerance)
    if qform is not None:
        corners = np.array(np.meshgrid(*((0, size - 1) for size in shape), [1])).reshape(4, -1)
        apart = float(np.linalg.norm(((sform - qform) @ corners)[:3], axis=0).max())
        if apart > tolerance or not same_spacing:
            other = np.linalg.norm(qform[:3, :3], axis=0)
            return (
                f"sform and qform disagree by up to {apart:.4g} mm (origins {_text(sform[:3, 3])} and "
                f"{_text(qform[:3, 3])}, spacings {_text(own)} and {_text(other)}); the sform is used here, other "
                "programs may go by the qform"
            )
    elif not same_spacing:
        return (
            f"the sform has a spacing of {_text(own)} mm, pixdim says {_text(spacing)}; the sform is used here, other "
            "programs may go by pixdim"
        )
    return None


def _text(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
