"""The augmenter: geometry in one resampling, then intensities."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lungkit.data.augment.config import AugmentConfig
from lungkit.data.augment.draws import Draws
from lungkit.data.augment.intensity import augment_intensity
from lungkit.data.augment.spatial import apply_spatial, draw_spatial
from lungkit.errors import UsageError

# From this ratio of slice distance to pixel size on, nnU-Net treats a volume as a stack of slices.
_ANISOTROPY = 3.0


class Augmenter:
    """Random transforms of a batch of images and labels, on the device they are on.

    Rotation, scaling, flips, translation and elastic displacement become one map and the batch is sampled
    once: images linearly, labels by nearest neighbour, on the same grid. Noise, blur, brightness, contrast,
    low resolution and gamma follow, on images only. A sample for which nothing is drawn is returned bit for
    bit, one that is only flipped is not interpolated. The input is never changed.

    What lies outside the patch is air in the image and 0 (background) in the labels.

    *Randomness.* All parameters come from one CPU generator, so a seed gives the same transforms on every
    device. Noise itself is drawn on the device, from a seed that the CPU generator gives: it is reproducible
    there, but differs between kinds of device.

    *Anisotropy.* In 3D rotation acts in millimetres. Where slices are at least three times as far apart as
    pixels are large, a volume is transformed slice by slice alike: no tilt, no elastic displacement along Z,
    no lower resolution along Z.

    Args:
        config: what to do, how often, how strongly.
        dims: 2 or 3.
        spacing_mm: voxel size in zyx order (its last two entries count in 2D); cubic where not given.
        pad_value: normalised intensity of air; the smallest value of each image where not given.

    Raises:
        UsageError: ``dims`` or ``spacing_mm`` is wrong or, when called, a tensor has the wrong shape or type.

    Example:
        >>> images = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> labels = (images[:, 0] > 11).to(torch.uint8)
        >>> flip = Augmenter(AugmentConfig(**{**vars(AugmentConfig.none()), "flip_probability": 1.0}), 2)
        >>> flipped, flipped_labels = flip(images, labels, generator=torch.Generator().manual_seed(0))
        >>> flipped[0, 0, 0].tolist(), flipped_labels[0, 0].tolist()
        ([15.0, 14.0, 13.0, 12.0], [1, 1, 1, 1])
    """

    def __init__(
        self,
        config: AugmentConfig,
        dims: int,
        *,
        spacing_mm: Sequence[float] | None = None,
        pad_value: float | None = None,
    ) -> None:
        if dims not in (2, 3):
            raise UsageError(f"dims is {dims!r}; give 2 or 3")
        spacing = (1.0,) * dims if spacing_mm is None else tuple(map(float, spacing_mm))
        if len(spacing) not in (dims, 3) or not all(0 < size < float("inf") for size in spacing):
            raise UsageError(f"spacing_mm is {spacing_mm!r}; give {dims} positive voxel sizes in zyx order")
        self.config = config
        self.dims = dims
        self.spacing_mm = spacing[-dims:]
        self.pad_value = pad_value
        self._in_plane_only = dims == 3 and spacing[0] >= _ANISOTROPY * min(spacing[1:])

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform float images (B, C, \\*S) and integer labels (B, \\*S); shapes and types are kept."""
        self._check(images, labels, generator)
        if not self.config.enabled or images.numel() == 0:
            return images, labels
        draws = Draws(len(images), generator)
        spatial = draw_spatial(
            self.config, images.shape[2:], self.spacing_mm, in_plane_only=self._in_plane_only, draws=draws
        )
        # Half precision is too coarse for coordinates and sums; sampling runs in float32.
        work = images if images.dtype in (torch.float32, torch.float64) else images.float()
        work, labels = apply_spatial(work, labels, spatial, pad_value=self.pad_value)
        work = augment_intensity(
            work, self.config, self.spacing_mm, in_plane_only=self._in_plane_only, draws=draws
        )
        return work.to(images.dtype), labels

    def _check(self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator | None) -> None:
        if images.ndim != self.dims + 2 or not images.is_floating_point():
            raise UsageError(
                f"images is {tuple(images.shape)} {images.dtype}; "
                f"give a floating point tensor (B, C, {'Z, ' * (self.dims - 2)}Y, X)"
            )
        if labels.shape != images.shape[:1] + images.shape[2:] or labels.is_floating_point():
            raise UsageError(
                f"labels is {tuple(labels.shape)} {labels.dtype}; give an integer tensor of shape "
                f"{tuple(images.shape[:1] + images.shape[2:])}, as images has"
            )
        if generator is not None and generator.device.type != "cpu":
            raise UsageError(
                f"generator is on {generator.device}; parameters are drawn on the CPU, give torch.Generator()"
            )
