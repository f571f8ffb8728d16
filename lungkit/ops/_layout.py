"""How features lie in memory: what the fake kernels allocate is what the native ones do."""

from __future__ import annotations

from torch import Tensor


def is_channels_last(features: Tensor) -> bool:
    """Whether the channels of a voxel are neighbours in memory and the voxels lie in a row."""
    voxel_stride = [features.stride(d) for d in range(2, features.dim()) if features.shape[d] > 1]
    flat = all(
        features.stride(d) == features.stride(d + 1) * features.shape[d + 1]
        for d in range(2, features.dim() - 1)
        if features.shape[d] > 1 and features.shape[d + 1] > 1
    )
    return (
        features.shape[1] > 1
        and features.stride(1) == 1
        and flat
        and bool(voxel_stride)
        and voxel_stride[-1] != 1
    )


def new_features(like: Tensor) -> Tensor:
    """Uninitialised, in ``like``'s shape: channels-last where ``like`` is, else contiguous."""
    if is_channels_last(like):
        return like.new_empty((like.shape[0], *like.shape[2:], like.shape[1])).movedim(-1, 1)
    return like.new_empty(like.shape)
