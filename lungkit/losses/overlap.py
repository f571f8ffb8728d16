"""Losses of soft overlap alone: Dice, Jaccard, Tversky, generalised Dice, with MONAI's names, defaults and numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lungkit.errors import UsageError
from lungkit.losses._options import (
    activation_name,
    check_choice,
    check_labels,
    check_not_negative,
    weight_tensor,
)
from lungkit.ops.dice_ce import DiceCEOptions, Statistics, fused_statistics
from lungkit.ops.dice_ce_arithmetic import dice_terms, ratio_or_one, reduce_terms

_REDUCTIONS = ("mean", "sum", "none")


class _OverlapLoss(nn.Module):
    """Options that all overlap losses have, and the sums I, P, Y (B, C) that they are made of."""

    def __init__(
        self,
        *,
        include_background: bool,
        to_onehot_y: bool,
        sigmoid: bool,
        softmax: bool,
        reduction: str,
        smooth_nr: float,
        smooth_dr: float,
        batch: bool,
        ignore_index: int | None,
        squared_pred: bool = False,
        jaccard: bool = False,
        minimum: bool = False,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, _REDUCTIONS)
        check_not_negative(smooth_nr=smooth_nr, smooth_dr=smooth_dr)
        self.options = DiceCEOptions(
            activation=activation_name(sigmoid=sigmoid, softmax=softmax),
            cross_entropy="none",
            squared=squared_pred,
            ignore_index=ignore_index,
            minimum=minimum,
            include_background=include_background,
            jaccard=jaccard,
            batch=batch,
            smooth_nr=float(smooth_nr),
            smooth_dr=float(smooth_dr),
        )
        self.to_onehot_y = to_onehot_y
        self.reduction = reduction

    def _sums(self, input: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """I, P and Y: (B, C), or (1, C) of the whole batch; without class 0 where the background does not count."""
        check_labels(input, target, to_onehot_y=self.to_onehot_y)
        statistics = fused_statistics(input, target, self.options, mask=mask)
        if self.options.batch:
            statistics = statistics.sum(1, keepdim=True)
        if not self.options.include_background and statistics.shape[2] > 1:
            statistics = statistics[:, :, 1:]
        sums = Statistics(*statistics)
        return sums.intersection, sums.prediction, sums.label

    def _reduce(self, terms: Tensor, spatial_axes: int) -> Tensor:
        """Mean or sum; "none" keeps an axis of length 1 for each spatial axis, so that terms broadcast over voxels."""
        if self.reduction != "none":
            return reduce_terms(terms, self.reduction)
        kept = terms[0] if self.options.batch else terms
        return kept.reshape(*kept.shape, *(1,) * spatial_axes)


class DiceLoss(_OverlapLoss):
    r"""Soft Dice loss.

    .. math:: 1 - \frac{2\sum p\,y + s_n}{\sum p + \sum y + s_d}

    for each image and class (over the whole batch with ``batch``), then reduced. Names, defaults and values are those
    of ``monai.losses.DiceLoss``; class indices need no ``to_onehot_y``, and a term whose denominator is 0 counts as 0.

    Args:
        include_background, to_onehot_y, sigmoid, softmax, squared_pred, jaccard, smooth_nr, smooth_dr, batch,
            ignore_index: as in :class:`lungkit.losses.DiceCELoss`.
        reduction: "mean", "sum" or "none".
        weight: one for each class that counts, or one for all; multiplies the terms.

    Shapes:
        input: logits (B, C, \*S); probabilities with neither ``sigmoid`` nor ``softmax``.
        target: class indices (B, 1, \*S) or (B, \*S), or vectors (B, C, \*S).
        returns: a scalar; (B, C, 1, ...), or (C, 1, ...) with ``batch``, for "none".

    Raises:
        UsageError: options, shapes or dtypes that do not fit.

    Source: Milletari et al., "V-Net", 2016.

    Example:
        >>> import torch
        >>> from lungkit.losses import DiceLoss
        >>> labels = torch.tensor([[[0, 1, 1, 0]]])
        >>> round(DiceLoss(softmax=True)(torch.zeros(1, 2, 4), labels).item(), 4)
        0.5
    """

    def __init__(
        self,
        *,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Tensor | Sequence[float] | float | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            squared_pred=squared_pred,
            jaccard=jaccard,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            ignore_index=ignore_index,
        )
        self.weight: Tensor | None
        self.register_buffer("weight", weight_tensor(weight))

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Loss of ``input`` against ``target``; ``mask`` (B, *S) or (B, 1, *S) marks the voxels that count."""
        overlap, pred, label = self._sums(input, target, mask)
        terms = dice_terms(overlap, pred + label, self.options)
        if self.weight is not None and terms.shape[1] > 1:
            if self.weight.dim() == 1 and self.weight.shape[0] != terms.shape[1]:
                raise UsageError(
                    f"weight must hold one number for each of the {terms.shape[1]} classes that count, "
                    f"got {self.weight.shape[0]}"
                )
            terms = terms * self.weight.to(terms)
        return self._reduce(terms, input.dim() - 2)


class JaccardLoss(DiceLoss):
    r"""Soft Jaccard (IoU) loss, :class:`DiceLoss` with ``jaccard=True``.

    .. math:: 1 - \frac{2\sum p\,y + s_n}{2(\sum p + \sum y - \sum p\,y) + s_d}

    Args:
        options: those of :class:`DiceLoss` but for ``jaccard``.

    Source: Rahman and Wang, "Optimizing Intersection-Over-Union in Deep Neural Networks", 2016.

    Example:
        >>> import torch
        >>> from lungkit.losses import JaccardLoss
        >>> labels = torch.tensor([[[0, 1, 1, 0]]])
        >>> round(JaccardLoss(softmax=True)(torch.zeros(1, 2, 4), labels).item(), 4)
        0.6667
    """

    def __init__(self, **options: bool | str | float | int | Tensor | Sequence[float] | None) -> None:
        super().__init__(**options, jaccard=True)  # type: ignore[arg-type]


class TverskyLoss(_OverlapLoss):
    r"""Tversky loss: Dice with separate weights for false positives and false negatives.

    .. math:: 1 - \frac{I + s_n}{I + \alpha (P - I) + \beta (Y - I) + s_d}

    with :math:`I = \sum p\,y`, :math:`P = \sum p`, :math:`Y = \sum y`. Names, defaults and values are those of
    ``monai.losses.TverskyLoss``.

    Args:
        alpha, beta: weights of false positives and false negatives.
        minimum: I is the sum of min(p, y), for soft labels: the compatible Tversky loss of Wang et al., "Dice
            Semimetric Losses", 2023. The same for hard labels.
        others: as in :class:`DiceLoss`.

    Shapes:
        as in :class:`DiceLoss`; "none" returns (B, C), or (C,) with ``batch``.

    Source: Salehi et al., "Tversky loss function for image segmentation using 3D fully convolutional deep
    networks", 2017.

    Example:
        >>> import torch
        >>> from lungkit.losses import TverskyLoss
        >>> labels = torch.tensor([[[0, 1, 1, 0]]])
        >>> round(TverskyLoss(softmax=True, alpha=0.3, beta=0.7)(torch.zeros(1, 2, 4), labels).item(), 4)
        0.5
    """

    def __init__(
        self,
        *,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        alpha: float = 0.5,
        beta: float = 0.5,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        ignore_index: int | None = None,
        minimum: bool = False,
    ) -> None:
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            ignore_index=ignore_index,
            minimum=minimum,
        )
        check_not_negative(alpha=alpha, beta=beta)
        self.alpha = float(alpha)
        self.beta = float(beta)

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Loss of ``input`` against ``target``; ``mask`` (B, *S) or (B, 1, *S) marks the voxels that count."""
        terms = self._terms(*self._sums(input, target, mask))
        if self.reduction == "none":
            return terms[0] if self.options.batch else terms
        return reduce_terms(terms, self.reduction)

    def _terms(self, overlap: Tensor, pred: Tensor, label: Tensor) -> Tensor:
        divisor = (
            overlap + self.alpha * (pred - overlap) + self.beta * (label - overlap) + self.options.smooth_dr
        )
        return 1.0 - ratio_or_one(overlap + self.options.smooth_nr, divisor)


class GeneralizedDiceLoss(_OverlapLoss):
    r"""Generalised Dice loss: classes weighted by the inverse of their volume before the division.

    .. math:: 1 - \frac{2\sum_c w_c I_c + s_n}{\sum_c w_c (P_c + Y_c) + s_d}, \qquad w_c = 1 / Y_c^2

    A class that is absent takes the largest weight among those present. Names, defaults and values are those of
    ``monai.losses.GeneralizedDiceLoss``.

    Args:
        w_type: "square" (:math:`1/Y^2`), "simple" (:math:`1/Y`) or "uniform" (1).
        others: as in :class:`DiceLoss`.

    Shapes:
        as in :class:`DiceLoss`; "none" returns (B, 1, 1, ...), or (1, 1, ...) with ``batch``.

    Source: Sudre et al., "Generalised Dice overlap as a deep learning loss function for highly unbalanced
    segmentations", 2017.

    Example:
        >>> import torch
        >>> from lungkit.losses import GeneralizedDiceLoss
        >>> labels = torch.tensor([[[0, 1, 1, 0]]])
        >>> round(GeneralizedDiceLoss(softmax=True)(torch.zeros(1, 2, 4), labels).item(), 4)
        0.5
    """

    def __init__(
        self,
        *,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        w_type: str = "square",
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            ignore_index=ignore_index,
        )
        check_choice("w_type", w_type, ("square", "simple", "uniform"))
        self.w_type = w_type

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Loss of ``input`` against ``target``; ``mask`` (B, *S) or (B, 1, *S) marks the voxels that count."""
        overlap, pred, label = self._sums(input, target, mask)
        weight = self._volume_weight(label)
        numerator = 2.0 * (weight * overlap).sum(1, keepdim=True) + self.options.smooth_nr
        divisor = (weight * (pred + label)).sum(1, keepdim=True) + self.options.smooth_dr
        return self._reduce(1.0 - ratio_or_one(numerator, divisor), input.dim() - 2)

    def _volume_weight(self, label: Tensor) -> Tensor:
        if self.w_type == "uniform":
            return torch.ones_like(label)
        weight = label.reciprocal() if self.w_type == "simple" else (label * label).reciprocal()
        absent = torch.isinf(weight)
        weight = torch.where(absent, 0.0, weight)
        return torch.where(absent, weight.amax(1, keepdim=True), weight)
