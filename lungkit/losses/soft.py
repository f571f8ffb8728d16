"""Losses for labels that are shares: what several readers say, or classes that lie inside each other."""

from __future__ import annotations

from torch import Tensor, nn

from lungkit.errors import UsageError
from lungkit.losses._options import check_choice, check_not_negative
from lungkit.losses._ranks import sum_over_ranks
from lungkit.ops._labels import equal_to
from lungkit.ops.dice_ce import DiceCEOptions, fused_loss, fused_statistics, loss_of_statistics


class SoftDiceCELoss(nn.Module):
    r"""Dice semimetric loss + cross-entropy, for soft labels, by one fused op: y is a share of readers, not a class.

    With p the softmax of the logits, sums over voxels and smoothing constants :math:`s_n, s_d`:

    .. math::
        \mathrm{Dice}_{b,c} = 1 - \frac{2\sum \min(p, y) + s_n}{\sum p + \sum y + s_d}, \qquad
        \mathrm{loss} = \lambda_\text{dice}\operatorname{mean}_{b,c}\mathrm{Dice}_{b,c} + \lambda_\text{ce}\mathrm{CE},
        \qquad \mathrm{CE} = -\operatorname{mean}\sum_c y_c \log p_c

    The usual intersection :math:`\sum p\,y` is not least at p = y: it drives every probability to 0 or 1. The minimum
    is, and for y in {0, 1} it is the product: for hard labels value and gradient are those of
    :class:`lungkit.losses.DiceCELoss` with softmax and one-hot labels.

    Args:
        include_background: count class 0 in the Dice term.
        reduction: "mean" or "sum" over images and classes in Dice, over voxels in the cross-entropy.
        smooth_nr, smooth_dr: :math:`s_n` and :math:`s_d`.
        batch: sum over the batch before the division.
        lambda_dice, lambda_ce: weights of the two terms; 0 leaves one out.
        synchronise: the loss of the images of all ranks, as in :class:`lungkit.losses.DiceCELoss`.

    Shapes:
        input: logits (B, C, \*S), C at least 2; half types are computed in float32.
        target: shares (B, C, \*S) that sum to 1 over the classes.
        mask: (B, 1, \*S) or (B, \*S), True where a voxel counts; None counts all.
        returns: a scalar; 0 over no voxel at all.

    Raises:
        UsageError: options or shapes that do not fit.

    Source: Wang et al., "Dice Semimetric Losses: Optimizing the Dice Score with Soft Labels", MICCAI 2023 (DML1).

    Example:
        >>> import torch
        >>> from lungkit.losses import SoftDiceCELoss
        >>> shares = torch.tensor([[[0.75, 0.25], [0.25, 0.75]]])
        >>> round(SoftDiceCELoss(lambda_ce=0.0)(shares.log(), shares).item(), 4)
        0.0
    """

    def __init__(
        self,
        *,
        include_background: bool = True,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        synchronise: bool = False,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum"))
        check_not_negative(
            smooth_nr=smooth_nr, smooth_dr=smooth_dr, lambda_dice=lambda_dice, lambda_ce=lambda_ce
        )
        self.options = DiceCEOptions(
            minimum=True,
            include_background=include_background,
            batch=batch,
            mean=reduction == "mean",
            smooth_nr=float(smooth_nr),
            smooth_dr=float(smooth_dr),
            lambda_dice=float(lambda_dice),
            lambda_ce=float(lambda_ce),
        )
        self.synchronise = synchronise

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Loss of logits ``input`` against the shares ``target``; ``mask`` marks the voxels that count."""
        if input.dim() < 3 or input.shape[1] < 2:
            raise UsageError(
                f"logits must be (B, C, *S) with two classes or more, got shape {tuple(input.shape)}"
            )
        if target.shape != input.shape or not target.is_floating_point():
            raise UsageError(
                f"soft labels must be floating and have the shape of the logits {tuple(input.shape)}, got "
                f"{target.dtype} {tuple(target.shape)}"
            )
        if not self.synchronise:
            return fused_loss(input, target, self.options, mask=mask)
        statistics = fused_statistics(input, target, self.options, mask=mask)
        return loss_of_statistics(statistics, input, target, self.options, over_ranks=sum_over_ranks)


class CodedLabelsLoss(nn.Module):
    r"""A loss of label vectors for labels that are codes: vectors are looked up where they are needed.

    One byte a voxel travels through patches, augmentation and copies to the device; the vectors exist in the loss only.

    Args:
        loss: called as ``loss(logits, vectors, mask)`` with vectors (B, C, \*S) and a mask (B, 1, \*S).
        vectors: (codes, C), the label vector of every code.
        ignore_index: code of voxels that do not count.

    Shapes:
        logits (B, C, \*S), codes (B, \*S) or (B, 1, \*S), uint8.

    Example:
        >>> import torch
        >>> from lungkit.losses import CodedLabelsLoss, SoftDiceCELoss
        >>> votes_of_two = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
        >>> criterion = CodedLabelsLoss(SoftDiceCELoss(), votes_of_two)
        >>> criterion(torch.zeros(1, 2, 4, 4), torch.full((1, 4, 4), 1, dtype=torch.uint8)).shape
        torch.Size([])
    """

    def __init__(self, loss: nn.Module, vectors: Tensor, *, ignore_index: int = 255) -> None:
        super().__init__()
        self.loss = loss
        self.vectors: Tensor
        self.register_buffer("vectors", vectors.float())
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, codes: Tensor) -> Tensor:
        """Loss of ``logits`` against the vectors of ``codes``."""
        if codes.dim() == logits.dim() and codes.shape[1] == 1:
            codes = codes[:, 0]
        if codes.shape != (logits.shape[0], *logits.shape[2:]):
            raise UsageError(
                f"codes of shape {tuple(codes.shape)} do not fit logits of shape {tuple(logits.shape)}"
            )
        mask = ~equal_to(codes, self.ignore_index)
        vectors = self.vectors.to(logits.device)[codes.long() * mask].movedim(-1, 1)
        return self.loss(logits, vectors, mask.unsqueeze(1))
