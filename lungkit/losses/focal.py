"""Soft Dice + focal loss, with MONAI's argument names, defaults and numbers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lungkit.errors import UsageError
from lungkit.losses._options import (
    activation_name,
    check_choice,
    check_labels,
    check_not_negative,
    weight_tensor,
)
from lungkit.losses._ranks import sums_over_ranks
from lungkit.ops.dice_ce import DiceCEOptions, Statistics, fused_statistics
from lungkit.ops.dice_ce_arithmetic import dice_terms, reduce_terms


class DiceFocalLoss(nn.Module):
    r"""Weighted sum of soft Dice and focal loss, from one pass over logits and labels.

    With :math:`q = \sigma(z)` of each channel, whatever the activation of the Dice term, the focal loss of a voxel and
    class is

    .. math:: -\alpha\,y\,(1 - q)^\gamma \log q - (1 - \alpha)\,(1 - y)\,q^\gamma \log(1 - q)

    (both factors 1 without ``alpha``). Names, defaults and values are those of ``monai.losses.DiceFocalLoss``.

    Args:
        include_background: count class 0, in both terms.
        to_onehot_y, sigmoid, softmax, squared_pred, jaccard, smooth_nr, smooth_dr, batch, ignore_index,
            synchronise: as in :class:`lungkit.losses.DiceCELoss`; the activation is that of the Dice term.
        reduction: "mean", or "sum" over images and classes of the mean over voxels.
        gamma: focal exponent; 0 is binary cross-entropy.
        weight: one for each class that counts, or one for all; multiplies both terms.
        lambda_dice, lambda_focal: weights of the two terms.
        alpha: weight of the positive voxels, in [0, 1].

    Shapes:
        as in :class:`lungkit.losses.DiceCELoss`.

    Raises:
        UsageError: options, shapes or dtypes that do not fit.

    Source: Lin et al., "Focal Loss for Dense Object Detection", 2017; Zhu et al., "AnatomyNet", 2018.

    Example:
        >>> import torch
        >>> from lungkit.losses import DiceFocalLoss
        >>> labels = torch.tensor([[[0, 1, 1, 0]]])
        >>> round(DiceFocalLoss(softmax=True)(torch.zeros(1, 2, 4), labels).item(), 4)
        0.6733
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
        gamma: float = 2.0,
        weight: Tensor | Sequence[float] | float | None = None,
        lambda_dice: float = 1.0,
        lambda_focal: float = 1.0,
        alpha: float | None = None,
        ignore_index: int | None = None,
        synchronise: bool = False,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum"))
        check_not_negative(gamma=gamma, lambda_dice=lambda_dice, lambda_focal=lambda_focal)
        if alpha is not None and not 0 <= alpha <= 1:
            raise UsageError(f"alpha must lie in [0, 1], got {alpha}")
        self.options = DiceCEOptions(
            activation=activation_name(sigmoid=sigmoid, softmax=softmax),
            cross_entropy="binary",
            squared=squared_pred,
            gamma=float(gamma),
            ignore_index=ignore_index,
            include_background=include_background,
            jaccard=jaccard,
            batch=batch,
            mean=reduction == "mean",
            smooth_nr=float(smooth_nr),
            smooth_dr=float(smooth_dr),
            lambda_dice=float(lambda_dice),
        )
        self.weight: Tensor | None
        self.register_buffer("weight", weight_tensor(weight))
        self.to_onehot_y = to_onehot_y
        self.reduction = reduction
        self.lambda_focal = float(lambda_focal)
        self.alpha = alpha
        self.synchronise = synchronise

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Loss of logits ``input`` against ``target``; ``mask`` (B, *S) or (B, 1, *S) marks the voxels that count."""
        check_labels(input, target, to_onehot_y=self.to_onehot_y)
        statistics = fused_statistics(input, target, self.options, mask=mask)
        if not self.options.include_background and statistics.shape[2] > 1:
            statistics = statistics[:, :, 1:]
        sums = Statistics(*statistics)
        weight = self._weight_of(sums.voxels)
        overlap, total = sums.intersection, sums.prediction + sums.label
        if self.options.batch:
            overlap, total = overlap.sum(0, keepdim=True), total.sum(0, keepdim=True)
        focal, voxels = self._focal(sums, weight), sums.voxels.sum()
        if not self.synchronise:
            dice = reduce_terms(self._dice_terms(overlap, total, weight), self.reduction)
        elif self.options.batch:
            overlap, total, focal, voxels = sums_over_ranks(overlap, total, focal, voxels)
            dice = reduce_terms(self._dice_terms(overlap, total, weight), self.reduction)
        else:
            terms = self._dice_terms(overlap, total, weight)
            dice, number, focal, voxels = sums_over_ranks(
                terms.sum(), terms.new_full((), terms.numel()), focal, voxels
            )
            dice = dice if self.reduction == "sum" else dice / number.clamp_min(1.0)
        if self.reduction == "mean":
            focal = focal / voxels.clamp_min(1.0)
        return self.options.lambda_dice * dice + self.lambda_focal * focal

    def _dice_terms(self, overlap: Tensor, total: Tensor, weight: Tensor | None) -> Tensor:
        terms = dice_terms(overlap, total, self.options)
        return terms if weight is None or terms.shape[1] == 1 else terms * weight

    def _focal(self, sums: Statistics, weight: Tensor | None) -> Tensor:
        """Sum of the focal loss over voxels; for the reduction "sum", of its means over the voxels of an image."""
        terms = sums.cross_entropy + sums.rest
        if self.alpha is not None:
            terms = self.alpha * sums.cross_entropy + (1.0 - self.alpha) * sums.rest
        if weight is not None:
            terms = terms * weight
        return (terms if self.reduction == "mean" else terms / sums.voxels.clamp_min(1.0)).sum()

    def _weight_of(self, sums: Tensor) -> Tensor | None:
        if self.weight is None:
            return None
        classes = sums.shape[1]
        if self.weight.dim() == 1 and self.weight.shape[0] != classes:
            raise UsageError(
                f"weight must hold one number for each of the {classes} classes that count, got "
                f"{self.weight.shape[0]}"
            )
        return self.weight.to(sums)
