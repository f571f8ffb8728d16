r"""Soft Dice + cross-entropy: statistics of logits against labels in one pass, and the loss made from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lungkit.errors import UsageError
from lungkit.ops._dice_ce_twin import Statistics, has_class_indices, loss_from_statistics, statistics_twin

__all__ = ["Statistics", "dice_ce_loss", "dice_ce_statistics", "reference", "reference_statistics"]

_ACTIVATIONS = ("softmax", "sigmoid", "none")
_CROSS_ENTROPIES = ("softmax", "binary", "none")
_LOGIT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INDEX_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)


def dice_ce_statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    activation: str = "softmax",
    cross_entropy: str = "softmax",
    squared: bool = False,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Sums from which every loss of the Dice family follows, from one read of logits and labels.

    With activated predictions p and label vectors y, per image and class, over the voxels that count:

    .. math::
        I = \sum p\,y,\quad P = \sum p \;(\text{or } p^2),\quad Y = \sum y \;(\text{or } y^2),\quad
        L = -\sum y \log p,\quad R = -\sum \log p,\quad N = \sum 1

    ``cross_entropy="binary"`` reads each channel as one sigmoid: then
    :math:`L = -\sum y \log \sigma(z)` and :math:`R = -\sum (1 - y) \log(1 - \sigma(z))`.

    Args:
        logits: z, (B, C, \*S) with one to three spatial axes; float64, float32, bfloat16 or float16.
        labels: class indices (B, \*S) or (B, 1, \*S) of dtype uint8, int16, int32, int64 or bool; or one vector a
            voxel, one-hot or soft, (B, C, \*S) of these or the floating dtypes. For C = 1 an index is 0 or 1.
        mask: voxels that count, (B, \*S) or (B, 1, \*S), bool or uint8; None counts all.
        activation: "softmax" over C, "sigmoid" for each channel, or "none" where logits are p already.
        cross_entropy: "softmax", "binary" or "none" (L and R are then 0).
        squared: sum :math:`p^2` and :math:`y^2` in P and Y.
        ignore_index: class index whose voxels do not count. Beside label vectors: the channel that marks them, or,
            outside 0..C-1, voxels whose vector is zero do not count.

    Returns:
        (6, B, C) with I, P, Y, L, R, N in the order of :class:`Statistics`; float64 for float64 logits, else float32.
        Only logits receive a gradient.

    Raises:
        UsageError: shapes, dtypes or options that do not fit; the message names both sides.
        RuntimeError: on the CPU, a class index outside 0..C-1. On CUDA, where raising would cost a synchronisation,
            all sums of that image are NaN instead, and with them the loss.

    Example:
        >>> import torch
        >>> from lungkit.ops.dice_ce import Statistics, dice_ce_statistics
        >>> logits, labels = torch.zeros(1, 2, 4, 4), torch.ones(1, 4, 4, dtype=torch.uint8)
        >>> sums = Statistics(*dice_ce_statistics(logits, labels))
        >>> sums.intersection.tolist(), sums.prediction.tolist(), sums.label.tolist()
        ([[0.0, 8.0]], [[8.0, 8.0]], [[0.0, 16.0]])
    """
    mask, ignore_index = _as_mask(logits, labels, mask, ignore_index)
    _check_arguments(logits, labels, mask, activation, cross_entropy)
    return statistics_twin(logits, labels, mask, activation, cross_entropy, squared, ignore_index)


def dice_ce_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    include_background: bool = True,
    activation: str = "softmax",
    squared_pred: bool = False,
    jaccard: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    weight: Tensor | Sequence[float] | None = None,
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Soft Dice + cross-entropy loss, finished inside one op.

    .. math::
        \lambda_\text{dice}\,\operatorname{mean}_{b,c}\Bigl(1 - \frac{2I + s_n}{P + Y + s_d}\Bigr)
        + \lambda_\text{ce}\,\mathrm{CE}

    with I, P, Y of :func:`dice_ce_statistics`. The arguments mean what they mean for
    :class:`lungkit.losses.DiceCELoss`; logits, labels, mask and activation are those of :func:`dice_ce_statistics`.
    One channel takes binary cross-entropy and needs ``activation="sigmoid"``.

    Returns:
        A scalar, float64 for float64 logits, else float32.

    Raises:
        UsageError: arguments that do not fit; the message names what came and what was expected.
        RuntimeError: on the CPU, a class index outside 0..C-1; on CUDA the loss is NaN instead.

    Source: Milletari et al., "V-Net", 2016 (soft Dice); Isensee et al., "nnU-Net", 2021 (the sum of both).

    Example:
        >>> import torch
        >>> from lungkit.ops.dice_ce import dice_ce_loss
        >>> logits = torch.zeros(1, 2, 8, 8, requires_grad=True)
        >>> loss = dice_ce_loss(logits, torch.zeros(1, 8, 8, dtype=torch.uint8))
        >>> loss.backward()
        >>> round(loss.item(), 4), logits.grad.shape
        (1.3598, torch.Size([1, 2, 8, 8]))
    """
    return reference(
        logits,
        labels,
        mask=mask,
        include_background=include_background,
        activation=activation,
        squared_pred=squared_pred,
        jaccard=jaccard,
        reduction=reduction,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        batch=batch,
        weight=weight,
        lambda_dice=lambda_dice,
        lambda_ce=lambda_ce,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )


def reference_statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    activation: str = "softmax",
    cross_entropy: str = "softmax",
    squared: bool = False,
    ignore_index: int | None = None,
) -> Tensor:
    """Twin of :func:`dice_ce_statistics` in plain PyTorch: same arguments, same result, any device."""
    mask, ignore_index = _as_mask(logits, labels, mask, ignore_index)
    _check_arguments(logits, labels, mask, activation, cross_entropy)
    return statistics_twin(logits, labels, mask, activation, cross_entropy, squared, ignore_index)


def reference(
    logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    include_background: bool = True,
    activation: str = "softmax",
    squared_pred: bool = False,
    jaccard: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    weight: Tensor | Sequence[float] | None = None,
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> Tensor:
    """Twin of :func:`dice_ce_loss` in plain PyTorch: same arguments, same result, any device."""
    binary = logits.shape[1] == 1
    statistics = reference_statistics(
        logits,
        labels,
        mask=mask,
        activation=activation,
        cross_entropy="binary" if binary else "softmax",
        squared=squared_pred,
        ignore_index=ignore_index,
    )
    return loss_from_statistics(
        statistics,
        weight=_class_weight(weight, logits),
        class_indices=has_class_indices(logits, labels),
        binary=binary,
        include_background=include_background,
        jaccard=jaccard,
        reduction=reduction,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        batch=batch,
        lambda_dice=lambda_dice,
        lambda_ce=lambda_ce,
        label_smoothing=label_smoothing,
    )


def _as_mask(
    logits: Tensor, labels: Tensor, mask: Tensor | None, ignore_index: int | None
) -> tuple[Tensor | None, int | None]:
    """Turn an ``ignore_index`` beside label vectors into a mask; beside class indices it stays what it is."""
    if ignore_index is None or has_class_indices(logits, labels):
        return mask, ignore_index
    if labels.shape[1] == 1:
        kept = labels != ignore_index
    elif 0 <= ignore_index < labels.shape[1]:
        kept = labels[:, ignore_index : ignore_index + 1] == 0
    else:
        kept = (labels != 0).any(1, keepdim=True)
    return (kept if mask is None else kept & (mask != 0).reshape(kept.shape)), None


def _class_weight(weight: Tensor | Sequence[float] | None, logits: Tensor) -> Tensor | None:
    if weight is None:
        return None
    weight = torch.as_tensor(weight, dtype=torch.float32 if logits.dtype != torch.float64 else torch.float64)
    classes = logits.shape[1]
    if weight.dim() != 1 or weight.shape[0] != classes:
        raise UsageError(
            f"weight must hold one number for each of the {classes} classes, got {tuple(weight.shape)}"
        )
    return weight.to(logits.device)


def _check_arguments(
    logits: Tensor, labels: Tensor, mask: Tensor | None, activation: str, cross_entropy: str
) -> None:
    if activation not in _ACTIVATIONS:
        raise UsageError(f"activation must be one of {_ACTIVATIONS}, got {activation!r}")
    if cross_entropy not in _CROSS_ENTROPIES:
        raise UsageError(f"cross_entropy must be one of {_CROSS_ENTROPIES}, got {cross_entropy!r}")
    if logits.dtype not in _LOGIT_DTYPES:
        raise UsageError(f"logits must be float64, float32, bfloat16 or float16, got {logits.dtype}")
    if not 3 <= logits.dim() <= 5:
        raise UsageError(
            f"logits must be (B, C, *S) with one to three spatial axes, got shape {tuple(logits.shape)}"
        )
    classes, grid = logits.shape[1], (logits.shape[0], *logits.shape[2:])
    if classes == 1 and (activation == "softmax" or cross_entropy == "softmax"):
        raise UsageError(
            "softmax over one channel is 1 everywhere; for logits of one channel pass "
            f"activation='sigmoid' (sigmoid=True), got {activation!r} and logits {tuple(logits.shape)}"
        )
    _check_voxels("labels", labels, logits, grid, channels=(1, classes))
    if mask is not None:
        _check_voxels("mask", mask, logits, grid, channels=(1,))
        if mask.dtype not in (torch.bool, torch.uint8):
            raise UsageError(f"mask must be bool or uint8, got {mask.dtype}")
    allowed = _INDEX_DTYPES
    if not has_class_indices(logits, labels):
        allowed = _INDEX_DTYPES + _LOGIT_DTYPES
    if labels.dtype not in allowed:
        raise UsageError(
            f"labels of shape {tuple(labels.shape)} beside logits of shape {tuple(logits.shape)} must be one of "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in allowed)}, got {labels.dtype}"
        )


def _check_voxels(
    name: str, tensor: Tensor, logits: Tensor, grid: tuple[int, ...], channels: tuple[int, ...]
) -> None:
    shape = tuple(tensor.shape)
    fits = shape == grid or any(shape == (grid[0], c, *grid[1:]) for c in channels)
    if not fits:
        forms = " or ".join(str((grid[0], c, *grid[1:])) for c in dict.fromkeys(channels))
        raise UsageError(
            f"{name} of shape {shape} do not fit logits of shape {tuple(logits.shape)}; expected {grid} or {forms}"
        )
    if tensor.device != logits.device:
        raise UsageError(
            f"logits and {name} must be on the same device, got {logits.device} and {tensor.device}"
        )
    if tensor.requires_grad:
        raise UsageError(f"{name} must not require a gradient: only logits receive one")
