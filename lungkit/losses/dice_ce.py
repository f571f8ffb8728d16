"""Soft Dice + cross-entropy, with MONAI's argument names, defaults and numbers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lungkit.errors import UsageError
from lungkit.losses._options import (
    activation_name,
    check_choice,
    check_labels,
    check_not_negative,
    check_one_channel,
    weight_tensor,
)
from lungkit.losses._ranks import sum_over_ranks
from lungkit.ops.dice_ce import DiceCEOptions, fused_loss, fused_statistics, loss_of_statistics


class DiceCELoss(nn.Module):
    r"""Weighted sum of soft Dice loss and cross-entropy, computed by one fused op.

    With predictions p and one-hot labels y, sums over voxels, and :math:`s_n, s_d` the smoothing constants:

    .. math::
        \mathrm{Dice}_{b,c} = 1 - \frac{2\sum p\,y + s_n}{\sum p + \sum y + s_d}, \qquad
        \mathrm{loss} = \lambda_\text{dice}\operatorname{mean}_{b,c}\mathrm{Dice}_{b,c} + \lambda_\text{ce}\mathrm{CE}

    Names, defaults and values are those of ``monai.losses.DiceCELoss``, with ``ignore_index`` in addition, and with
    these differences: class indices need no ``to_onehot_y``; the loss is float32 for half logits; a loss over no voxel
    at all is 0, not NaN; one channel needs ``sigmoid=True``.

    Args:
        include_background: count class 0 in the Dice term; without effect beside one channel. The cross-entropy always
            counts it.
        to_onehot_y: labels are class indices. Implied by their shape; True refuses label vectors.
        sigmoid: p is the sigmoid of each channel. The cross-entropy stays softmax (binary for one channel).
        softmax: p is the softmax over channels. Neither: Dice reads the logits as they are.
        squared_pred: sum squares in the denominator.
        jaccard: soft Jaccard instead of Dice: denominator :math:`2(\sum p + \sum y - \sum p\,y) + s_d`.
        reduction: "mean" or "sum", over images and classes in Dice, over voxels in the cross-entropy.
        smooth_nr, smooth_dr: :math:`s_n` and :math:`s_d`.
        batch: sum over the batch before the division ("batch Dice").
        weight: one a class. Multiplies the Dice terms (not divided by its sum; without effect where only one class is
            counted) and weighs the cross-entropy. The mean cross-entropy of class indices divides by the sum of the
            voxels' weights, that of label vectors by their number, as in ``torch.nn.CrossEntropyLoss``: the same labels
            give different numbers in the two forms. Beside one channel it is the weight of positive voxels.
        lambda_dice, lambda_ce: weights of the two terms; 0 leaves one out.
        label_smoothing: of the cross-entropy of more than one channel, in [0, 1].
        ignore_index: class index whose voxels count nowhere; beside label vectors, see
            :func:`lungkit.ops.dice_ce.dice_ce_statistics`.
        synchronise: the loss of the images of all ranks of ``torch.distributed``: value and, under
            DistributedDataParallel, gradient are those of one process with the whole batch, however unevenly images
            and counting voxels are spread. Every rank must take part in each call.

    Shapes:
        input: logits (B, C, \*S), one to three spatial axes; float64, float32, bfloat16 or float16.
        target: class indices (B, 1, \*S) or (B, \*S), best uint8, also floating; or one-hot or soft vectors
            (B, C, \*S). Beside one channel floating numbers are soft labels.
        returns: a scalar.

    Raises:
        UsageError: options, shapes or dtypes that do not fit; the message names what came and what was expected.
        LabelError: a class index outside 0..C-1 or further than 1e-3 from a whole number, on the CPU. On CUDA the
            loss is NaN then: raising would cost a synchronisation.

    Source: Milletari et al., "V-Net", 2016; Isensee et al., "nnU-Net", 2021.

    Example:
        >>> import torch
        >>> from lungkit.losses import DiceCELoss
        >>> criterion = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
        >>> labels = torch.zeros(2, 1, 8, 8, 8, dtype=torch.uint8)
        >>> labels[:, :, 2:5] = 1
        >>> round(criterion(torch.zeros(2, 2, 8, 8, 8), labels).item(), 4)
        1.2646
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
        weight: Tensor | Sequence[float] | None = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        synchronise: bool = False,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum"))
        check_not_negative(lambda_dice=lambda_dice, lambda_ce=lambda_ce)
        if not 0 <= label_smoothing <= 1:
            raise UsageError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
        self.options = DiceCEOptions(
            activation=activation_name(sigmoid=sigmoid, softmax=softmax),
            squared=squared_pred,
            ignore_index=ignore_index,
            include_background=include_background,
            jaccard=jaccard,
            batch=batch,
            mean=reduction == "mean",
            smooth_nr=float(smooth_nr),
            smooth_dr=float(smooth_dr),
            lambda_dice=float(lambda_dice),
            lambda_ce=float(lambda_ce),
            label_smoothing=float(label_smoothing),
        )
        self.weight: Tensor | None
        self.register_buffer("weight", weight_tensor(weight))
        self.to_onehot_y = to_onehot_y
        self.synchronise = synchronise

    @classmethod
    def nnunet(
        cls, *, batch: bool = True, ignore_index: int | None = None, synchronise: bool = False
    ) -> DiceCELoss:
        """nnU-Net's Dice + cross-entropy: softmax, no background in Dice, Dice over the whole batch.

        The value is nnU-Net's plus 1, since nnU-Net writes the Dice term as minus the coefficient.
        """
        return cls(
            include_background=False,
            to_onehot_y=True,
            softmax=True,
            batch=batch,
            ignore_index=ignore_index,
            synchronise=synchronise,
        )

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Loss of logits ``input`` against ``target``; ``mask`` (B, *S) or (B, 1, *S) marks the voxels that count."""
        check_one_channel(input, self.options.activation)
        check_labels(input, target, to_onehot_y=self.to_onehot_y)
        if not self.synchronise:
            return fused_loss(input, target, self.options, mask=mask, weight=self.weight)
        statistics = fused_statistics(input, target, self.options.for_logits(input), mask=mask)
        return loss_of_statistics(
            statistics, input, target, self.options, weight=self.weight, over_ranks=sum_over_ranks
        )
