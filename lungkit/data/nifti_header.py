"""NIfTI headers, checked before a single voxel is allocated.

The layout is that of NIfTI-1 and NIfTI-2 (Cox et al. 2004, "A (sort of) new image data format standard:
NIfTI-1"); nibabel reads the fields, geometry (:mod:`lungkit.data.nifti_space`) and checks are ours.
"""

from __future__ import annotations

import logging
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungkit.data.integrity import VerifiedStream
from lungkit.data.nifti_space import NiftiSpace
from lungkit.errors import DataError

_LOG = logging.getLogger("lungkit")

_NIFTI1_BYTES = 348
_NIFTI2_BYTES = 540
_MAX_EXTENSION_BYTES = 1 << 28
_BYTES_A_VOXEL = 4  # max_voxels is a limit on memory, and scans need no wider type
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
    """What it takes to read the voxels.

    ``shape`` is (X, Y, Z), ``dtype`` the stored one, ``affine`` in mm; ``notes`` are sentences that the user of the
    volume has to know.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    slope: float
    intercept: float
    affine: np.ndarray
    skip_bytes: int
    space: NiftiSpace
    notes: tuple[str, ...]


def read_header(stream: VerifiedStream, path: Path, *, max_voxels: int) -> NiftiHeader:
    """Read and check the header at the start of ``stream``.

    Raises:
        DataError: not NIfTI, an unsupported kind of voxel, more than three axes, more than ``max_voxels``,
            more voxels than the file can hold, more than four bytes for each of ``max_voxels``, or a geometry
            that cannot be used.
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
    claimed = math.prod(shape) * dtype.itemsize
    if claimed > _BYTES_A_VOXEL * max_voxels:
        raise DataError(
            f"{path}: {shape} voxels of {dtype.name} take {claimed} bytes, more than {_BYTES_A_VOXEL} * max_voxels = "
            f"{_BYTES_A_VOXEL * max_voxels}; write int16 or float32, or raise max_voxels"
        )
    if claimed > stream.capacity:
        raise DataError(
            f"{path}: the header describes {shape} voxels of {dtype.name} ({claimed} bytes), more than the "
            "file can hold; it is truncated or damaged: copy or download it again"
        )
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise DataError(f"{path}: {error}; correct scl_slope and scl_inter in the header") from error
    space = NiftiSpace.from_header(header)
    affine, notes = space.choose(shape, str(path))
    if space.millimetres != 1:
        _LOG.info("%s: geometry converted from %s to mm", path, space.unit_name)
    for note in notes:
        _LOG.warning("%s: %s", path, note)
    return NiftiHeader(
        shape=shape,
        dtype=dtype,
        slope=1.0 if slope is None else slope,
        intercept=0.0 if intercept is None else intercept,
        affine=affine,
        skip_bytes=skip_bytes,
        space=space,
        notes=notes,
    )


def _read_bytes(stream: VerifiedStream, path: Path, count: int) -> bytes:
    buffer = bytearray(count)
    got = stream.readinto(memoryview(buffer))
    if got < count:
        raise DataError(f"{path}: only {got} bytes where a NIfTI header has {count}; the file is truncated")
    return bytes(buffer)


def _shape(header: Any, path: Path, max_voxels: int) -> tuple[int, int, int]:
    dims = [int(value) for value in header["dim"]]
    axes = dims[0]
    if not 2 <= axes <= 7 or any(size < 1 for size in dims[1 : min(axes, 3) + 1]):
        raise DataError(
            f"{path}: the header gives dim {dims}, not a 2D slice or a 3D volume; write the file again"
        )
    sizes = dims[1 : axes + 1]
    # Some programs count axes beyond the third that they leave at 0, which stands for 1.
    if any(size > 1 for size in sizes[3:]):
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
