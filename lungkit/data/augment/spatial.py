"""Geometric augmentation: every transform composed into one map, images and labels sampled once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from lungkit.data.augment.config import AugmentConfig
from lungkit.data.augment.draws import Draws, indices_of, per_sample


class SpatialParameters(NamedTuple):
    """Geometry of a batch of B samples, all on the CPU, axes in the order of the tensor's (zyx or yx)."""

    flips: torch.Tensor
    """bool (B, dims)"""
    matrices: torch.Tensor
    """float64 (B, dims, dims + 1): from the coordinates of the result to those of the input, flips included.
    A coordinate runs from -1 to 1 over the edges of the patch."""
    warped: torch.Tensor
    """bool (B,): the samples that need interpolation, not just a flip."""
    elastic: torch.Tensor
    """bool (B,)"""
    coefficients: torch.Tensor
    """float64 (B, dims, \\*control points): elastic displacement of the result's coordinates."""


def draw_spatial(
    config: AugmentConfig,
    shape: Sequence[int],
    spacing: Sequence[float],
    *,
    in_plane_only: bool,
    draws: Draws,
) -> SpatialParameters:
    """Draw the geometry of a batch of patches of ``shape`` with voxels of ``spacing``.

    With H the half extent of the patch in millimetres, rotation R, scaling s, flips F (diagonal, +-1) and
    shift t, a point p of the result comes from H^-1 F R^-1 H (p - t) / s of the input: rotation acts in
    millimetres, so that it stays a rotation where voxels are not cubes.
    """
    dims = len(shape)
    rotated = draws.events(config.rotation_probability)
    angle = draws.uniform(*config.rotation_degrees)
    tilt = draws.uniform(*config.tilt_degrees, 2)
    scaled = draws.events(config.scaling_probability)
    scale = draws.log_uniform(*config.scaling_range)
    flips = draws.events(config.flip_probability, dims)
    shifted = draws.events(config.translation_probability)
    shift = draws.uniform(*config.translation_fraction, dims)
    elastic = draws.events(config.elastic_probability)
    displacement = draws.uniform(*config.elastic_displacement)

    rotation = _plane_rotation(angle, dims, (dims - 2, dims - 1))
    if dims == 3 and not in_plane_only:
        rotation = rotation @ _plane_rotation(tilt[:, 0], 3, (0, 2)) @ _plane_rotation(tilt[:, 1], 3, (0, 1))
    rotation = torch.where(rotated[:, None, None], rotation, torch.eye(dims, dtype=rotation.dtype))
    scale = torch.where(scaled, scale, torch.ones_like(scale))
    shift = torch.where(shifted[:, None], 2.0 * shift, torch.zeros_like(shift))

    half = torch.tensor([length * size / 2 for length, size in zip(shape, spacing, strict=True)]).double()
    signs = 1.0 - 2.0 * flips.double()
    linear = signs[:, :, None] * rotation.transpose(1, 2) * (half / half[:, None]) / scale[:, None, None]
    matrices = torch.cat([linear, -linear @ shift[:, :, None]], dim=2)

    finest = min(spacing)
    control = [
        math.ceil(length * size / (config.elastic_spacing * finest)) + 3
        for length, size in zip(shape, spacing, strict=True)
    ]
    coefficients = draws.uniform(-1.0, 1.0, dims, *control)
    coefficients *= (displacement[:, None] * finest / half).view(-1, dims, *(1,) * dims)
    if in_plane_only:
        coefficients[:, 0] = 0.0
    warped = rotated | scaled | shifted | elastic
    return SpatialParameters(flips, matrices, warped, elastic, coefficients)


def apply_spatial(
    images: torch.Tensor,
    labels: torch.Tensor,
    parameters: SpatialParameters,
    *,
    pad_value: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, C, \\*S) by linear, labels (B, \\*S) by nearest interpolation, both on the same grid.

    Samples that are only flipped are flipped, without interpolation.
    """
    only_flipped = parameters.flips.any(dim=1) & ~parameters.warped
    if not bool(only_flipped.any() | parameters.warped.any()):
        return images, labels
    images, labels = images.clone(), labels.clone()
    for sample in only_flipped.nonzero().flatten().tolist():
        axes = [axis - parameters.flips.shape[1] for axis in _true_positions(parameters.flips[sample])]
        images[sample] = images[sample].flip(axes)
        labels[sample] = labels[sample].flip(axes)
    if bool(parameters.warped.any()):
        at = indices_of(parameters.warped, images.device)
        grid = _sampling_grid(images, parameters)
        images[at] = _sample_images(images[at], grid, pad_value)
        # float32 holds every label up to 2^24; outside the patch there is background.
        chosen = labels[at].unsqueeze(1).to(torch.float32)
        sampled = F.grid_sample(
            chosen, grid.float(), mode="nearest", padding_mode="zeros", align_corners=False
        )
        labels[at] = sampled.squeeze(1).to(labels.dtype)
    return images, labels


def _sample_images(images: torch.Tensor, grid: torch.Tensor, pad_value: float | None) -> torch.Tensor:
    # grid_sample pads with zero, so air has to be zero while it runs.
    if pad_value is None:
        air = images.amin(dim=tuple(range(2, images.ndim)), keepdim=True)
    else:
        air = torch.full((), pad_value, dtype=images.dtype, device=images.device)
    return F.grid_sample(images - air, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + air


def _sampling_grid(images: torch.Tensor, parameters: SpatialParameters) -> torch.Tensor:
    """(n, \\*S, dims) input coordinates, in the order x, y(, z) of grid_sample, for the n warped samples."""
    shape = images.shape[2:]
    dims = len(shape)
    matrices = parameters.matrices[parameters.warped].to(images.device, images.dtype, non_blocking=True)
    axes = [
        (2.0 * torch.arange(length, device=images.device, dtype=images.dtype) + 1.0) / length - 1.0
        for length in shape
    ]
    points: list[torch.Tensor] = [
        axes[k].view(*(-1 if k == j else 1 for j in range(dims))) for k in range(dims)
    ]
    elastic = parameters.elastic[parameters.warped]
    if bool(elastic.any()):
        bent = indices_of(elastic, images.device)
        coefficients = parameters.coefficients[parameters.warped & parameters.elastic]
        field = _displacement(coefficients.to(images.device, images.dtype, non_blocking=True), shape)
        full = [point.expand(len(matrices), *shape).clone() for point in points]
        for k in range(dims):
            full[k][bent] += field[:, k]
        points = full
    # Adding axis by axis keeps the intermediate results of a pure affine map one-dimensional for longest.
    columns = []
    for row in reversed(range(dims)):
        column = per_sample(matrices[:, row, dims], images)[:, 0]
        for k in range(dims):
            column = column + per_sample(matrices[:, row, k], images)[:, 0] * points[k]
        columns.append(column)
    return torch.stack(columns, dim=-1)


def _displacement(coefficients: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Cubic B-spline field (n, dims, \\*shape) of control coefficients (n, dims, \\*control points)."""
    field = coefficients
    for axis, length in enumerate(shape, start=2):
        weights = _spline_weights(length, coefficients.shape[axis])
        weights = weights.to(field.device, field.dtype, non_blocking=True)
        field = torch.tensordot(field, weights, dims=([axis], [1])).movedim(-1, axis)
    return field


def _spline_weights(length: int, control: int) -> torch.Tensor:
    """float64 (length, control): weight of each control point at each voxel; rows sum to 1."""
    position = (torch.arange(length, dtype=torch.float64) + 0.5) / length * (control - 3)
    cell = position.floor().long().clamp(max=control - 4)
    t = position - cell
    basis = torch.stack(
        [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], dim=1
    )
    weights = torch.zeros(length, control, dtype=torch.float64)
    return weights.scatter_(1, cell[:, None] + torch.arange(4), basis / 6)


def _plane_rotation(degrees: torch.Tensor, dims: int, plane: tuple[int, int]) -> torch.Tensor:
    """(B, dims, dims) rotation from the first axis of ``plane`` towards the second."""
    first, second = plane
    angle = torch.deg2rad(degrees)
    matrix = torch.eye(dims, dtype=degrees.dtype).repeat(len(degrees), 1, 1)
    matrix[:, first, first] = matrix[:, second, second] = angle.cos()
    matrix[:, first, second] = -angle.sin()
    matrix[:, second, first] = angle.sin()
    return matrix


def _true_positions(mask: torch.Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()
