"""How features lie in memory: what the fake kernels allocate is what the native ones do."""

from __future__ import annotations

from torch import Tensor


def new_features(like: Tensor) -> Tensor:
    """Uninitialised, in ``like``'s shape: channels-last where ``like`` is, else contiguous."""
    spatial = like.dim() - 2
    voxel_stride = [like.stride(d) for d in range(2, like.dim()) if like.shape[d] > 1]
    flat = all(
        like.stride(d) == like.stride(d + 1) * like.shape[d + 1]
        for d in range(2, like.dim() - 1)
        if like.shape[d] > 1 and like.shape[d + 1] > 1
    )
    if like.shape[1] > 1 and like.stride(1) == 1 and flat and voxel_stride and voxel_stride[-1] != 1:
        return like.new_empty((like.shape[0], *like.shape[2:], like.shape[1])).movedim(spatial + 1, 1)
    return like.new_empty(like.shape)
