"""Dice + cross-entropy in plain PyTorch: the twins of the native ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lungkit.errors import LabelError
from lungkit.ops._dice_ce_tensors import accumulate_dtype, empty_gradient, has_class_indices
from lungkit.ops._labels import equal_to
from lungkit.ops.dice_ce_arithmetic import DiceCEOptions, loss_from_statistics

# A floating class index may be so far from a whole number: what resampling or a rescaled file leaves behind.
INDEX_TOLERANCE = 1e-3


def statistics_twin(logits: Tensor, labels: Tensor, mask: Tensor | None, options: DiceCEOptions) -> Tensor:
    """Sums (6, B, C), the rows of :class:`Statistics`, as PyTorch differentiates them."""
    z = logits.flatten(2).to(accumulate_dtype(logits.dtype))
    y, valid = _voxel_labels(z, logits, labels, mask, options.ignore_index)
    z = _counted(z, valid)
    log_p = F.log_softmax(z, dim=1) if options.cross_entropy == "softmax" else None
    p = _counted(_activate(z, log_p, options.activation), valid)
    positive = rest = z.new_zeros(z.shape[:2])
    gamma = options.gamma
    if log_p is not None:
        positive = _sum(_focal(-log_p, gamma), y)
        rest = -_counted(log_p, valid).sum(2)
    elif options.cross_entropy == "binary":
        positive = _sum(_focal(F.softplus(-z), gamma), y)
        rest = _sum(_focal(F.softplus(z), gamma), (1 if valid is None else valid) - y)
    minimum = options.minimum and not has_class_indices(logits, labels)
    voxels = z.new_full((len(z), 1), z.shape[2]) if valid is None else valid.sum(2)
    return torch.stack(
        [
            torch.where(p <= y, p, y).sum(2) if minimum else _sum(p, y),
            _sum(p, p) if options.squared else p.sum(2),
            _sum(y, y) if options.squared else y.sum(2),
            positive,
            rest,
            voxels.expand_as(positive),
        ]
    )


def statistics_in_chunks(
    logits: Tensor, labels: Tensor, mask: Tensor | None, options: DiceCEOptions
) -> Tensor:
    """``lungkit::dice_ce_statistics``: of a few voxels at a time, so that a CPU's cache holds what is in between."""
    with torch.no_grad():
        parts = [statistics_twin(*part, options) for part in _chunks(logits, labels, mask)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def backward_twin(
    slopes: Tensor,
    scale: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    options: DiceCEOptions,
) -> Tensor:
    """``lungkit::dice_ce_backward``: gradient of the logits from ``slopes``, that of their statistics."""
    slopes = slopes if scale is None else slopes * scale
    gradient = empty_gradient(logits)
    flat = gradient.flatten(2)
    first = 0
    for z, y, counted in _chunks(logits, labels, mask):
        last = first + z.shape[2]
        flat[..., first:last] = _gradient(slopes, z, y, counted, options)
        first = last
    return gradient


def _gradient(
    slopes: Tensor, logits: Tensor, labels: Tensor, mask: Tensor | None, options: DiceCEOptions
) -> Tensor:
    """Of one chunk. With the sums I, P, L, R and their slopes: dp = I' y + P' (or I' where p <= y, or 2 P' p), brought
    through the activation, and p sum(L' y + R') - (L' y + R') of the softmax's cross-entropy, or that of sigmoids."""
    if options.gamma:
        pull_back = torch.func.vjp(lambda of: statistics_twin(of, labels, mask, options), logits)[1]
        return pull_back(slopes)[0]
    z = logits.to(accumulate_dtype(logits.dtype))
    y, valid = _voxel_labels(z, logits, labels, mask, options.ignore_index)
    z = _counted(z, valid)
    overlap, total, _, positive, rest, _ = slopes.unsqueeze(3)
    softmax = options.activation == "softmax" or options.cross_entropy == "softmax"
    likely = z.softmax(1) if softmax else None
    p = (
        likely
        if options.activation == "softmax" and likely is not None
        else _activate(z, None, options.activation)
    )
    minimum = options.minimum and not has_class_indices(logits, labels)
    gradient = torch.addcmul(
        2 * total * p if options.squared else total, overlap, (p <= y).to(p) if minimum else y
    )
    if options.activation == "softmax":
        gradient = p * (gradient - (p * gradient).sum(1, keepdim=True))
    elif options.activation == "sigmoid":
        gradient = gradient * p * (1 - p)
    if options.cross_entropy == "softmax" and likely is not None:
        surprise = torch.addcmul(rest, positive, y)
        gradient = torch.addcmul(gradient, likely, surprise.sum(1, keepdim=True)).sub_(surprise)
    elif options.cross_entropy == "binary":
        likely = z.sigmoid()
        gradient = gradient + rest * (1 - y) * likely - positive * y * (1 - likely)
    return _counted(gradient, valid)


_CHUNK, _CHUNK_ON_DEVICES = 2**16, 2**24
"""Logits of one chunk: on a CPU 256 KiB a tensor, which its cache holds; elsewhere what keeps a device busy."""


def _chunks(
    logits: Tensor, labels: Tensor, mask: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The voxels in runs, as (B, C, V), (B, V) or (B, C, V), and (B, V); at least one."""
    z = logits.flatten(2)
    labels = labels.flatten(2) if labels.dim() == logits.dim() else labels.flatten(1)
    mask = None if mask is None else mask.flatten(1)
    chunk = _CHUNK if z.device.type == "cpu" else _CHUNK_ON_DEVICES
    step = max(1, chunk // max(1, z.shape[0] * z.shape[1]))
    for first in range(0, max(1, z.shape[2]), step):
        part = slice(first, first + step)
        yield z[..., part], labels[..., part], None if mask is None else mask[..., part]


def _counted(values: Tensor, valid: Tensor | None) -> Tensor:
    """0 in voxels that are left out, whatever stood there: NaN times 0 would be NaN."""
    return values if valid is None else torch.where(valid != 0, values, 0.0)


def _sum(first: Tensor, second: Tensor) -> Tensor:
    # A product of vectors would be autocast's to take in a half type.
    return (first * second).sum(2)


def loss_twin(
    logits: Tensor, labels: Tensor, mask: Tensor | None, weight: Tensor | None, options: DiceCEOptions
) -> tuple[Tensor, Tensor]:
    """``lungkit::dice_ce_loss``: the loss, and its gradient with respect to the statistics."""
    indices = has_class_indices(logits, labels)
    slopes, value = torch.func.grad_and_value(
        lambda of: loss_from_statistics(of, options, weight=weight, class_indices=indices)
    )(statistics_in_chunks(logits, labels, mask, options))
    return value, slopes


def _activate(z: Tensor, log_p: Tensor | None, activation: str) -> Tensor:
    if activation == "softmax":
        return z.softmax(1) if log_p is None else log_p.exp()
    return z.sigmoid() if activation == "sigmoid" else z


def _focal(surprise: Tensor, gamma: float) -> Tensor:
    """``(1 - p)^gamma * surprise`` with surprise = -log p."""
    return surprise if gamma == 0 else (-torch.expm1(-surprise)) ** gamma * surprise


def _voxel_labels(
    z: Tensor, logits: Tensor, labels: Tensor, mask: Tensor | None, ignore_index: int | None
) -> tuple[Tensor, Tensor | None]:
    """Label vectors (B, C, V) that are zero in left-out voxels, and ``valid`` (B, 1, V): 1 where a voxel counts.

    ``valid`` is None where every voxel does.
    """
    batch, classes, voxels = z.shape
    valid = None if mask is None else (mask.reshape(batch, 1, voxels) != 0).to(z.dtype)
    if not has_class_indices(logits, labels):
        return _counted(labels.reshape(batch, classes, voxels).to(z), valid), valid
    values = labels.reshape(batch, 1, voxels)
    indices = _whole(values) if values.is_floating_point() else values
    if not indices.is_floating_point() and (indices.dtype == torch.bool or classes > 127):
        indices = indices.long()  # a narrow type does not hold the number of every class
    if ignore_index is not None:
        kept = (~equal_to(indices, ignore_index)).to(z.dtype)
        valid = kept if valid is None else valid * kept
    _check_indices(values, indices, valid, classes, ignore_index)
    first = 1 if classes == 1 else 0  # one channel is the probability of class 1
    # Comparing two types converts every voxel to the wider one, so the classes take the type of the indices.
    numbers = torch.arange(first, first + classes, device=z.device).to(indices.dtype)
    y = (indices == numbers.view(1, -1, 1)).to(z.dtype)
    return y if valid is None else y * valid, valid


def _whole(values: Tensor) -> Tensor:
    """Each floating class index rounded; NaN where it is further than the tolerance from a whole number."""
    values = values.to(accumulate_dtype(values.dtype))
    rounded = values.round()
    return torch.where((values - rounded).abs() <= INDEX_TOLERANCE, rounded, torch.nan)


def _check_indices(
    values: Tensor, indices: Tensor, valid: Tensor | None, classes: int, ignore_index: int | None
) -> None:
    if valid is None and indices.numel():
        least, most = indices.aminmax()
        if least >= 0 and most < max(classes, 2):
            return
    outside = ~((indices >= 0) & (indices < max(classes, 2)))
    outside = outside if valid is None else outside & (valid != 0)
    if not outside.any():
        return
    image = int(outside.flatten(1).any(1).nonzero()[0])
    value = values[outside][0].item()
    shown = f"{value:g}" if isinstance(value, float) else str(int(value))
    ignored = "no ignore_index is set" if ignore_index is None else f"ignore_index is {ignore_index}"
    advice = ""
    if value == 255 and classes <= 2:
        advice = "; of a mask of 0 and 255 pass (mask > 0), or ignore_index=255 where 255 marks voxels to leave out"
    elif bool(indices[outside][0].isnan()):
        advice = "; class indices are whole numbers, and soft labels need one channel a class, (B, C, *S)"
    raise LabelError(
        f"dice_ce: labels hold the value {shown} in image {image}; classes are 0..{max(classes, 2) - 1} and "
        f"{ignored}{advice}"
    )
