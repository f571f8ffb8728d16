"""Surface distances of CUDA tensors with CuPy's exact Euclidean distance transform."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lungkit.ops._labels import equal_to

_log = logging.getLogger("lungkit")


@functools.cache
def is_available() -> bool:
    """Whether CuPy is installed; where it is not, says so once."""
    if importlib.util.find_spec("cupyx") is not None:
        return True
    _log.warning(
        "surface distances of CUDA tensors run on the CPU: CuPy is not installed (pip install 'lungkit[gpu]')"
    )
    return False


def surface_distances(
    prediction: Tensor, truth: Tensor, *, labels: Sequence[int], spacing_mm: Sequence[float]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """As the native function of the same name, for two label maps on one device; see ``csrc/geometry``."""
    results = []
    for label in labels:
        boundaries = [boundary_of(equal_to(volume, label)) for volume in (prediction, truth)]
        box = _box(boundaries[0] | boundaries[1])
        first, second = (boundary[box] for boundary in boundaries)
        results.append((_distances(first, second, spacing_mm), _distances(second, first, spacing_mm)))
    return results


def boundary_of(mask: Tensor) -> Tensor:
    """Voxels of a mask with a face neighbour outside of it; the border of the volume counts as outside."""
    inside = mask.clone()
    for axis in range(mask.dim()):
        length = mask.shape[axis]
        inside.narrow(axis, 1, length - 1).logical_and_(mask.narrow(axis, 0, length - 1))
        inside.narrow(axis, 0, length - 1).logical_and_(mask.narrow(axis, 1, length - 1))
        inside.narrow(axis, 0, 1).fill_(False)
        inside.narrow(axis, length - 1, 1).fill_(False)
    return mask & ~inside


def _box(mask: Tensor) -> tuple[slice, ...]:
    voxels = mask.nonzero()
    if not len(voxels):
        return tuple(slice(0, 0) for _ in mask.shape)
    first, last = voxels.amin(0).tolist(), voxels.amax(0).tolist()
    return tuple(slice(low, high + 1) for low, high in zip(first, last, strict=True))


def _distances(origin: Tensor, target: Tensor, spacing_mm: Sequence[float]) -> np.ndarray:
    count = int(origin.sum())
    if not count or not target.any():
        return np.full(count, np.inf, np.float32)
    import cupy
    from cupyx.scipy.ndimage import distance_transform_edt

    # DLPack hands the memory over without a copy; it knows no bool on older CuPy, hence uint8.
    background = (~target).to(torch.uint8).contiguous()
    with cupy.cuda.Device(target.device.index):
        field = distance_transform_edt(
            cupy.from_dlpack(background), sampling=list(spacing_mm), float64_distances=True
        )
    return torch.from_dlpack(field)[origin].float().cpu().numpy()
