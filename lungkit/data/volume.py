"""NIfTI volumes: every byte checked on the way in, nothing half written on the way out."""

from __future__ import annotations

import enum
import logging
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungkit._atomic import atomic_path
from lungkit.data.integrity import VerifiedStream, open_verified
from lungkit.data.nifti_header import NiftiHeader, read_header
from lungkit.data.nifti_names import split_suffix
from lungkit.data.nifti_space import NiftiSpace, affine_text, problem_of_affine
from lungkit.errors import DataError, ResourceError, UsageError

_LOG = logging.getLogger("lungkit")

DEFAULT_MAX_VOXELS = 2**29
"""Largest volume read unless told otherwise: 512 x 512 x 2048 voxels, 1 GiB of int16."""


class NanPolicy(enum.Enum):
    """What to do with voxels that are NaN or infinite."""

    REFUSE = "refuse"
    """Raise DataError with their number and the first position."""
    MINIMUM = "minimum"
    """Replace each with the smallest finite value of the volume, and warn with their number."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan or a mask as it lies in its file.

    ``array`` has shape (X, Y, Z), a 2D file (X, Y, 1); ``affine`` (4, 4) maps voxel indices to millimetres in
    RAS+ world space (x to the right, y to the front, z to the head), as in nibabel. ``space`` holds the geometry
    fields of the NIfTI header that it was read from, and ``notes`` what its reader has to say to people.

    Raises:
        UsageError: the array is not one of numbers with three axes, none of them empty, or the affine is not an
            invertible (4, 4).

    Example:
        >>> Volume(np.zeros((4, 4)), np.eye(4))
        Traceback (most recent call last):
        lungkit.errors.UsageError: array: shape (4, 4), expected (X, Y, Z); a slice is (X, Y, 1)
    """

    array: np.ndarray
    affine: np.ndarray
    path: Path | None = None
    space: NiftiSpace | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        array = np.asarray(self.array)
        if array.ndim != 3:
            raise UsageError(f"array: shape {array.shape}, expected (X, Y, Z); a slice is (X, Y, 1)")
        if array.size == 0:
            raise UsageError(
                f"array: shape {array.shape} holds no voxels; expected (X, Y, Z), each at least 1"
            )
        if array.dtype.kind not in "biuf":
            raise UsageError(f"array: dtype {array.dtype}, expected integers, floats or bool")
        object.__setattr__(self, "array", array)
        object.__setattr__(self, "affine", _usable_affine(self.affine))

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along X, Y, Z in mm.

        Example:
            >>> Volume(np.zeros((4, 4, 2)), np.diag([-0.7, -0.7, 2.5, 1])).spacing_mm
            (0.7, 0.7, 2.5)
        """
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)


def read_volume(
    path: str | os.PathLike[str],
    *,
    max_voxels: int = DEFAULT_MAX_VOXELS,
    nan_policy: NanPolicy = NanPolicy.REFUSE,
) -> Volume:
    """Read a 2D or 3D ``.nii`` or ``.nii.gz`` file, verified to its last byte.

    A gzip stream is decompressed whole and its checksums compared; a plain ``.nii`` carries no checksum, so
    there only its length is. Voxels keep their stored type where the header asks for no scaling, and
    ``scl_slope * stored + scl_inter`` is applied where it does: the result is int16 or int32 if slope,
    intercept and voxels are whole numbers, else float32.

    Args:
        path: the file.
        max_voxels: refuse a header that claims more; checked before memory is allocated.
        nan_policy: what to do with voxels that are not finite.

    Raises:
        DataError: absent, empty, truncated or corrupt file; trailing bytes; not NIfTI; complex or RGB voxels;
            more than three axes; too many voxels; unusable affine; voxels that are not finite.
        ResourceError: the memory does not suffice.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "scan.nii.gz"
        >>> write_nifti(path, np.full((4, 3, 2), -1000, np.int16), np.diag([0.7, 0.7, 2.5, 1.0]))
        >>> volume = read_volume(path)
        >>> volume.array.shape, volume.array.dtype.name, int(volume.array[0, 0, 0])
        ((4, 3, 2), 'int16', -1000)
    """
    path = Path(path)
    if not split_suffix(path.name)[1]:
        raise DataError(f"{path}: not a .nii or .nii.gz file; convert the scan to NIfTI first")
    with open_verified(path) as stream:
        header = read_header(stream, path, max_voxels=max_voxels)
        stored = _read_voxels(stream, header, path)
        stream.finish()
    array, notes = _refuse_or_replace_nan(_scale(stored, header), path, nan_policy)
    return Volume(array, header.affine, path, header.space, (*header.notes, *notes))


def write_nifti(
    path: str | os.PathLike[str], array: np.ndarray, affine: np.ndarray, *, space: NiftiSpace | None = None
) -> None:
    """Write ``array`` (X, Y, Z) or (X, Y) with ``affine`` (4, 4) as NIfTI-1, whole or not at all.

    bool is written as uint8; integers wider than 32 bits as the smallest of uint8, int16, int32 that holds
    their values; float16 as float32. The same array gives the same bytes.

    Args:
        path: the file, .nii or .nii.gz.
        array: the voxels.
        affine: voxel indices to mm in RAS+.
        space: of the volume that the array belongs to, see :attr:`Volume.space`; its geometry fields are written as
            they stood in that file, so that both lie in one place in every reader.

    Raises:
        UsageError: the name does not end with .nii or .nii.gz, the array or the affine cannot be written, or
            ``space`` puts the voxels elsewhere than ``affine``.
        ResourceError: the disk is full; nothing is left behind.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "mask.nii.gz"
        >>> write_nifti(path, np.ones((4, 3, 2), bool), np.eye(4))
        >>> read_volume(path).array.dtype.name
        'uint8'
    """
    from nibabel.nifti1 import Nifti1Header

    path = Path(path)
    if not split_suffix(path.name)[1]:
        raise UsageError(f"path: {path} does not end with .nii or .nii.gz")
    array = _storable(np.asarray(array))
    affine = _usable_affine(affine)
    header = Nifti1Header(endianness="<")
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_xyzt_units("mm")
    # Spacing first: set_sform and set_qform do not agree on whether they write it.
    header.set_zooms(np.linalg.norm(affine[:3, : array.ndim], axis=0))
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    if not np.allclose(header.get_qform(), affine, atol=1e-3):
        header.set_qform(affine, code=0)  # a quaternion cannot hold shear; readers then take the sform
    if space is not None:
        shape = (*array.shape, 1)[:3]
        if not np.allclose(space.choose(shape, "space")[0], affine, atol=1e-3, rtol=1e-5):
            raise UsageError(
                f"space: puts the voxels elsewhere than affine {affine.tolist()}; give those of one volume"
            )
        space.write_to(header)
    header["vox_offset"] = 352
    header["scl_slope"], header["scl_inter"] = 1.0, 0.0
    head = header.binaryblock + b"\0\0\0\0"
    voxels = np.asfortranarray(array, dtype=array.dtype.newbyteorder("<")).ravel(order="K")
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        if path.name.lower().endswith(".gz"):
            # zlib writes no time stamp, so equal arrays give equal files.
            deflate = zlib.compressobj(level=4, wbits=16 + zlib.MAX_WBITS)
            file.write(deflate.compress(head))
            file.write(deflate.compress(voxels.view(np.uint8).data))
            file.write(deflate.flush())
        else:
            file.write(head)
            file.write(voxels.view(np.uint8).data)


def _read_voxels(stream: VerifiedStream, header: NiftiHeader, path: Path) -> np.ndarray:
    _skip(stream, header.skip_bytes)
    count = int(np.prod(header.shape, dtype=np.int64))
    try:
        voxels = np.empty(count, dtype=header.dtype)
    except MemoryError as error:
        raise ResourceError(f"{path}: no memory for {count} voxels of {header.dtype.name}") from error
    view = voxels.view(np.uint8).data
    got = stream.readinto(view)
    if got < len(view):
        raise DataError(
            f"{path}: the header describes {header.shape} voxels of {header.dtype.name} ({len(view)} bytes), "
            f"the file holds {got}; it is truncated or damaged: copy or download it again"
        )
    if not header.dtype.isnative:
        voxels = voxels.byteswap(inplace=True).view(header.dtype.newbyteorder("="))
    return voxels.reshape(header.shape, order="F")


def _skip(stream: VerifiedStream, count: int) -> None:
    scratch = memoryview(bytearray(min(count, 1 << 20)))
    while count > 0:
        got = stream.readinto(scratch[: min(count, len(scratch))])
        if got == 0:
            return  # the voxels are missing too, and their reader says so
        count -= got


def _scale(stored: np.ndarray, header: NiftiHeader) -> np.ndarray:
    slope, intercept = header.slope, header.intercept
    if slope == 1 and intercept == 0:
        return stored.astype(np.float32) if stored.dtype == np.float64 else stored
    whole = slope.is_integer() and intercept.is_integer() and max(abs(slope), abs(intercept)) < 2**31
    if stored.dtype.kind in "iu" and whole:
        # CT stored with an offset (0 to 4095, intercept -1024) is whole HU: no need for floats.
        ends = [
            int(stored.min()) * int(slope) + int(intercept),
            int(stored.max()) * int(slope) + int(intercept),
        ]
        for dtype in (np.int16, np.int32):
            if np.iinfo(dtype).min <= min(ends) and max(ends) <= np.iinfo(dtype).max:
                return _scale_whole(stored, int(slope), int(intercept), np.dtype(dtype))
    return _scale_floats(stored, slope, intercept)


def _scale_floats(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """``stored * slope + intercept`` in float32; wide types are computed in float64, a part at a time."""
    result = np.empty_like(stored, np.float32)
    wide = np.float64 if stored.dtype.itemsize >= 4 else np.float32
    flat, target = stored.reshape(-1, order="F"), result.reshape(-1, order="F")
    for start in range(0, flat.size, 1 << 20):
        part = flat[start : start + (1 << 20)].astype(wide)
        part *= slope
        part += intercept
        target[start : start + (1 << 20)] = part
    return result


def _scale_whole(stored: np.ndarray, slope: int, intercept: int, dtype: np.dtype[Any]) -> np.ndarray:
    """``stored * slope + intercept`` as ``dtype``, in place where the size allows, a part at a time."""
    result = stored.view(dtype) if stored.dtype.itemsize == dtype.itemsize else np.empty_like(stored, dtype)
    # A wrap-around on the way is harmless, since the final values fit.
    wide = np.int64 if stored.dtype.itemsize > 4 else np.int32
    flat, target = stored.reshape(-1, order="F"), result.reshape(-1, order="F")
    for start in range(0, flat.size, 1 << 20):
        part = slice(start, start + (1 << 20))
        target[part] = (flat[part].astype(wide) * slope + intercept).astype(dtype)
    return result


def _refuse_or_replace_nan(
    array: np.ndarray, path: Path, policy: NanPolicy
) -> tuple[np.ndarray, tuple[str, ...]]:
    # Minimum and maximum carry NaN and infinity along, without a mask as large as the volume.
    if array.dtype.kind != "f" or (np.isfinite(array.min()) and np.isfinite(array.max())):
        return array, ()
    bad = ~np.isfinite(array)
    count = int(np.count_nonzero(bad))
    first = tuple(int(axis) for axis in np.unravel_index(int(np.argmax(bad)), bad.shape))
    found = f"{count} of {array.size} voxels are NaN or infinite, the first at (x, y, z) = {first}"
    if policy is NanPolicy.REFUSE or count == array.size:
        raise DataError(
            f"{path}: {found}; repair the file, or have them replaced by the smallest "
            "value: --nan minimum (lungkit-predict), --data.nan minimum (lungkit-train), NanPolicy.MINIMUM (Python)"
        )
    note = f"{found}; replaced with the smallest finite value"
    _LOG.warning("%s: %s", path, note)
    array[bad] = array[~bad].min()
    return array, (note,)


def _usable_affine(affine: Any) -> np.ndarray:
    try:
        usable = np.asarray(affine, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"affine: {error}; expected an invertible (4, 4)") from error
    problem = problem_of_affine(usable)
    if problem is not None:
        shown = affine_text(usable) if usable.ndim <= 2 else ""
        raise UsageError(f"affine: {problem} {shown}; expected an invertible (4, 4), voxels to mm in RAS+")
    return usable


def _storable(array: np.ndarray) -> np.ndarray[Any, Any]:
    if array.ndim not in (2, 3) or array.size == 0 or max(array.shape) > 32767:
        raise UsageError(
            f"array: shape {array.shape} cannot be written; "
            "expected (X, Y, Z) or (X, Y), each from 1 to 32767"
        )
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype == np.float16:
        return array.astype(np.float32)
    if array.dtype.kind in "iu" and array.dtype.itemsize == 8:
        low, high = int(array.min()), int(array.max())
        for dtype in (np.uint8, np.int16, np.int32):
            if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
                return array.astype(dtype)
    elif array.dtype.kind in "iu" or array.dtype in (np.float32, np.float64):
        return array
    raise UsageError(f"array: dtype {array.dtype} cannot be written; convert it to uint8, int16 or float32")
