"""Intensity augmentation: noise, blur, brightness, contrast, low resolution and gamma."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from lungkit.data.augment.config import AugmentConfig
from lungkit.data.augment.draws import Draws, indices_of, per_sample


def augment_intensity(
    images: torch.Tensor,
    config: AugmentConfig,
    spacing: Sequence[float],
    *,
    in_plane_only: bool,
    draws: Draws,
) -> torch.Tensor:
    """Draw for each of the images (B, C, \\*S) which transforms it gets; apply them in nnU-Net's order."""
    # All draws come first: what one transform draws does not depend on the work of another.
    noisy, noise_std = draws.events(config.noise_probability), draws.uniform(*config.noise_std)
    noise_seed = draws.seed()
    blurred, sigma = draws.events(config.blur_probability), draws.uniform(*config.blur_sigma)
    lit, shift = draws.events(config.brightness_probability), draws.uniform(*config.brightness_shift)
    stretched, factor = draws.events(config.contrast_probability), draws.log_uniform(*config.contrast_factor)
    coarse, scale = (
        draws.events(config.low_resolution_probability),
        draws.log_uniform(*config.low_resolution_scale),
    )
    bent, gamma = draws.events(config.gamma_probability), draws.log_uniform(*config.gamma_range)
    drawn = noisy | blurred | lit | stretched | coarse | bent
    if not bool(drawn.any()):
        return images
    images = images.clone()

    if bool(noisy.any()):
        at = indices_of(noisy, images.device)
        images[at] = add_noise(images[at], noise_std[noisy], seed=noise_seed)
    if bool(blurred.any()):
        at = indices_of(blurred, images.device)
        sigmas = sigma[blurred, None] * min(spacing) / torch.tensor(spacing, dtype=sigma.dtype)
        images[at] = blur(images[at], sigmas, largest=config.blur_sigma[1])
    if bool(lit.any()):
        at = indices_of(lit, images.device)
        images[at] += per_sample(shift[lit], images)
    if bool(stretched.any()):
        at = indices_of(stretched, images.device)
        images[at] = stretch_contrast(images[at], factor[stretched])
    for sample in coarse.nonzero().flatten().tolist():
        images[sample] = lower_resolution(images[sample], float(scale[sample]), keep_first_axis=in_plane_only)
    if bool(bent.any()):
        at = indices_of(bent, images.device)
        images[at] = apply_gamma(images[at], gamma[bent])
    return images


def add_noise(images: torch.Tensor, std: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Add Gaussian noise of standard deviation ``std`` (n,) to images (n, C, \\*S), drawn on their device."""
    generator = torch.Generator(device=images.device).manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return torch.addcmul(images, noise, per_sample(std, images))


def blur(images: torch.Tensor, sigma: torch.Tensor, *, largest: float) -> torch.Tensor:
    """Gaussian blur of images (n, C, \\*S) by ``sigma`` (n, dims) voxels, border voxels repeated outside.

    The kernel is cut at three times ``largest``, an upper bound of ``sigma`` that holds for all batches.
    """
    for axis in range(2, images.ndim):
        radius = min(max(1, math.ceil(3 * largest)), images.shape[axis] - 1)
        steps = torch.arange(radius + 1, dtype=sigma.dtype)
        weights = torch.exp(-0.5 * (steps / sigma[:, axis - 2, None].clamp(min=1e-3)) ** 2)
        weights = weights / (weights[:, :1] + 2 * weights[:, 1:].sum(dim=1, keepdim=True))
        length = images.shape[axis]
        before = images.narrow(axis, 0, 1).expand(*_with_size(images, axis, radius))
        after = images.narrow(axis, length - 1, 1).expand(*_with_size(images, axis, radius))
        padded = torch.cat([before, images, after], dim=axis)
        result = images * per_sample(weights[:, 0], images)
        for step in range(1, radius + 1):
            pair = padded.narrow(axis, radius - step, length) + padded.narrow(axis, radius + step, length)
            result.addcmul_(pair, per_sample(weights[:, step], images))
        images = result
    return images


def stretch_contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """(x - mean) factor + mean per image and channel, clipped to the range that x had."""
    axes = tuple(range(2, images.ndim))
    mean = images.mean(dim=axes, keepdim=True)
    stretched = (images - mean) * per_sample(factor, images) + mean
    return stretched.clamp(*_bounds(images))


def apply_gamma(images: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """low + range ((x - low) / range)^gamma per image and channel; a constant image stays as it is."""
    low, high = _bounds(images)
    extent = (high - low).clamp(min=torch.finfo(images.dtype).tiny)
    return ((images - low) / extent).pow(per_sample(gamma, images)) * extent + low


def lower_resolution(image: torch.Tensor, scale: float, *, keep_first_axis: bool) -> torch.Tensor:
    """Average an image (C, \\*S) down by ``scale`` per axis and interpolate it back linearly."""
    shape = image.shape[1:]
    small = [max(1, round(length * scale)) for length in shape]
    if keep_first_axis:
        small[0] = shape[0]
    coarse = F.interpolate(image[None], size=small, mode="area")
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    return F.interpolate(coarse, size=tuple(shape), mode=mode, align_corners=False)[0]


def _bounds(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of each image and channel, shaped to broadcast over ``images``."""
    low, high = torch.aminmax(images.flatten(2), dim=2)
    shape = (*images.shape[:2], *(1,) * (images.ndim - 2))
    return low.view(shape), high.view(shape)


def _with_size(images: torch.Tensor, axis: int, length: int) -> list[int]:
    shape = list(images.shape)
    shape[axis] = length
    return shape
