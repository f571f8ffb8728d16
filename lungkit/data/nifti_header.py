"""NIfTI headers, checked before a single voxel is allocated.

The layout is that of NIfTI-1 and NIfTI-2 (Cox et al. 2004, "A (sort of) new image data format standard:
NIfTI-1"); nibabel reads the fields and the geometry, the checks are ours.
"""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungkit.data.integrity import VerifiedStream
from lungkit.errors import DataError

_LOG = logging.getLogger("lungkit")

_NIFTI1_BYTES = 348
_NIFTI2_BYTES = 540
_MAX_EXTENSION_BYTES = 1 << 28
_DTYPES = {
    2: np.uint8,
    4: np.int16,
    8: np.int32,
    16: np.float32,
    64: np.float64,
    256: np.int8,
    512: np.uint16,
    768: np.uint32,
    1024: np.int64,
    1280: np.uint64,
}
_REFUSED_DTYPES = {
    32: "complex64",
    128: "RGB",
    1536: "float128",
    1792: "complex128",
    2048: "complex256",
    2304: "RGBA",
}


@dataclass(frozen=True)
class NiftiHeader:
    """What it takes to read the voxels; ``shape`` is (X, Y, Z), ``dtype`` the stored one."""

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    slope: float
    intercept: float
    affine: np.ndarray
    skip_bytes: int


def read_header(stream: VerifiedStream, path: Path, *, max_voxels: int) -> NiftiHeader:
    """Read and check the header at the start of ``stream``.

    Raises:
        DataError: not NIfTI, an unsupported kind of voxel, more than three axes, more than ``max_voxels``,
            more voxels than the file can hold, or a geometry that cannot be used.
    """
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header
    from nibabel.spatialimages import HeaderDataError

    block = _read_bytes(stream, path, _NIFTI1_BYTES)
    size_little, size_big = struct.unpack("<i", block[:4])[0], struct.unpack(">i", block[:4])[0]
    if _NIFTI2_BYTES in (size_little, size_big):
        block += _read_bytes(stream, path, _NIFTI2_BYTES - _NIFTI1_BYTES)
        header_class: type[Nifti1Header] = Nifti2Header
        magic, wanted = block[4:12], b"n+2\0\r\n\x1a\n"
    else:
        header_class, magic, wanted = Nifti1Header, block[344:348], b"n+1\0"
        if _NIFTI1_BYTES not in (size_little, size_big):
            raise DataError(
                f"{path}: not a NIfTI file (header size {size_little}, expected 348 or 540); "
                "convert the scan to .nii or .nii.gz"
            )
    if magic != wanted:
        raise DataError(
            f"{path}: wrong NIfTI mark {magic!r}, expected {wanted!r}; "
            "an .hdr/.img pair or another format must be converted to .nii or .nii.gz"
        )
    endianness = "<" if size_little == len(block) else ">"
    header = header_class(block, endianness=endianness, check=False)
    shape = _shape(header, path, max_voxels)
    dtype = _dtype(header, path)
    skip_bytes = _skip_bytes(header, path, len(block))
    claimed = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if claimed > stream.capacity:
        raise DataError(
            f"{path}: the header describes {shape} voxels of {dtype.name} ({claimed} bytes), more than the "
            "file can hold; it is truncated or damaged: copy or download it again"
        )
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise DataError(f"{path}: {error}; correct scl_slope and scl_inter in the header") from error
    return NiftiHeader(
        shape=shape,
        dtype=dtype,
        slope=1.0 if slope is None else slope,
        intercept=0.0 if intercept is None else intercept,
        affine=_affine(header, path, shape),
        skip_bytes=skip_bytes,
    )


def check_affine(affine: np.ndarray, where: str) -> None:
    """Raise DataError, beginning with ``where``, unless ``affine`` maps voxels to millimetres one to one."""
    problem = None
    if affine.shape != (4, 4):
        problem = f"has shape {affine.shape}, expected (4, 4)"
    elif not np.isfinite(affine).all():
        problem = "holds values that are not finite"
    elif not np.array_equal(affine[3], (0, 0, 0, 1)):
        problem = "does not end with the row 0 0 0 1"
    else:
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        # The determinant of the unit directions: 1 for a right angle, 0 for axes in one plane.
        if (lengths == 0).any() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-4:
            problem = "is not invertible"
    if problem is not None:
        rows = "; ".join(" ".join(f"{value:g}" for value in row) for row in np.atleast_2d(affine))
        raise DataError(f"{where}: the affine {problem} [{rows}]; correct the geometry of the file")


def _read_bytes(stream: VerifiedStream, path: Path, count: int) -> bytes:
    buffer = bytearray(count)
    got = stream.readinto(memoryview(buffer))
    if got < count:
        raise DataError(f"{path}: only {got} bytes where a NIfTI header has {count}; the file is truncated")
    return bytes(buffer)


def _shape(header: Any, path: Path, max_voxels: int) -> tuple[int, int, int]:
    dims = [int(value) for value in header["dim"]]
    axes = dims[0]
    if not 2 <= axes <= 7 or any(size < 1 for size in dims[1 : axes + 1]):
        raise DataError(
            f"{path}: the header gives dim {dims}, not a 2D slice or a 3D volume; write the file again"
        )
    sizes = dims[1 : axes + 1]
    if any(size != 1 for size in sizes[3:]):
        raise DataError(
            f"{path}: {axes}D file of shape {tuple(sizes)}; write one 3D file for each channel or time point"
        )
    x, y, z = (*sizes, 1)[:3]
    if x * y * z > max_voxels:
        raise DataError(
            f"{path}: {x} x {y} x {z} = {x * y * z} voxels, more than max_voxels = {max_voxels}; "
            "crop the scan or raise max_voxels"
        )
    return x, y, z


def _dtype(header: Any, path: Path) -> np.dtype[Any]:
    code = int(header["datatype"])
    if code not in _DTYPES:
        name = _REFUSED_DTYPES.get(code, "unknown")
        raise DataError(
            f"{path}: voxels of NIfTI datatype {code} ({name}) are not supported; "
            "write int16, uint8 or float32"
        )
    dtype = np.dtype(_DTYPES[code]).newbyteorder(header.endianness)
    bits = int(header["bitpix"])
    if bits != 8 * dtype.itemsize:
        raise DataError(
            f"{path}: the header says {bits} bits a voxel, datatype {code} has {8 * dtype.itemsize}; "
            "the header is damaged"
        )
    return dtype


def _skip_bytes(header: Any, path: Path, header_bytes: int) -> int:
    offset = float(header["vox_offset"])
    lowest = header_bytes + 4  # the extension flag follows the header
    if not (lowest <= offset <= lowest + _MAX_EXTENSION_BYTES and offset == int(offset)):
        raise DataError(
            f"{path}: the header puts the voxels at byte {offset:g}, expected {lowest} or a little more"
        )
    return int(offset) - header_bytes


def _affine(header: Any, path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    if not (int(header["sform_code"]) or int(header["qform_code"])):
        # Method 1 of the NIfTI standard: spacing alone, no orientation.
        spacing = np.abs([float(value) for value in header["pixdim"][1:4]])
        if shape[2] == 1 and spacing[2] == 0:
            spacing[2] = 1.0
        _LOG.warning(
            "%s: neither sform nor qform is set, so the orientation is unknown; "
            "using pixdim (%g, %g, %g mm) and taking the axes as right, anterior, superior",
            path,
            *spacing,
        )
        affine = np.diag([*spacing, 1.0])
    else:
        try:
            affine = np.asarray(header.get_best_affine(), dtype=np.float64)
        except Exception as error:  # nibabel raises several kinds for an impossible quaternion
            raise DataError(f"{path}: the geometry in the header cannot be used ({error})") from error
    check_affine(affine, str(path))
    return affine
