"""Focal Tversky loss: Tversky's overlap with an exponent that looks at the classes still badly segmented."""

from __future__ import annotations

from torch import Tensor

from lungkit.errors import UsageError
from lungkit.losses._options import check_not_negative
from lungkit.losses._ranks import sums_over_ranks
from lungkit.losses.overlap import TverskyLoss
from lungkit.ops.dice_ce_arithmetic import reduce_terms

_LEAST = 1e-6
"""Of a term below the exponent: a root has an infinite slope at 0, where an absent class that is not predicted is."""


class FocalTverskyLoss(TverskyLoss):
    r"""Focal Tversky loss, the Tversky loss of each class to the power of 1 over gamma.

    .. math:: \operatorname{mean}_{b,c} (1 - T_{b,c})^{1/\gamma}, \qquad
        T = \frac{I + s_n}{I + \alpha (P - I) + \beta (Y - I) + s_d}

    with the sums of :class:`lungkit.losses.TverskyLoss`. With gamma above 1 the gradient is relatively larger where the
    overlap is already good, so that small structures are brought to the end; with beta above alpha missed voxels cost
    more than false ones. Terms below 1e-6 have no gradient.

    Args:
        alpha, beta: weights of false positives and false negatives (of which the paper calls the latter alpha).
        gamma: 1 is the Tversky loss.
        reduction: "mean" or "sum".
        synchronise: the loss of the images of all ranks, as in :class:`lungkit.losses.DiceCELoss`.
        others: as in :class:`lungkit.losses.TverskyLoss`.

    Shapes:
        as in :class:`lungkit.losses.DiceLoss`; returns a scalar.

    Raises:
        UsageError: options, shapes or dtypes that do not fit.

    Source: Abraham and Khan, "A Novel Focal Tversky Loss Function with Improved Attention U-Net for Lesion
    Segmentation", ISBI 2019, whose values are the defaults. There side outputs of deep supervision have gamma = 4/3 and
    the final output gamma = 1: see ``finest`` of :class:`lungkit.losses.DeepSupervisionLoss`.

    Example:
        >>> import torch
        >>> from lungkit.losses import FocalTverskyLoss
        >>> labels = torch.tensor([[[0, 1, 1, 0]]])
        >>> round(FocalTverskyLoss(softmax=True)(torch.zeros(1, 2, 4), labels).item(), 4)
        0.5946
    """

    def __init__(
        self,
        *,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 4 / 3,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        ignore_index: int | None = None,
        minimum: bool = False,
        synchronise: bool = False,
    ) -> None:
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            alpha=alpha,
            beta=beta,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            ignore_index=ignore_index,
            minimum=minimum,
        )
        check_not_negative(gamma=gamma)
        if gamma == 0 or reduction == "none":
            raise UsageError(
                f"gamma must be above 0 and reduction 'mean' or 'sum', got {gamma} and {reduction!r}"
            )
        self.gamma = float(gamma)
        self.synchronise = synchronise

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Loss of ``input`` against ``target``; ``mask`` (B, *S) or (B, 1, *S) marks the voxels that count."""
        overlap, pred, label = self._sums(input, target, mask)
        if self.synchronise and self.options.batch:
            overlap, pred, label = sums_over_ranks(overlap, pred, label)
        terms = self._terms(overlap, pred, label)
        if self.gamma != 1:
            terms = terms.clamp_min(_LEAST) ** (1 / self.gamma)
        if not self.synchronise or self.options.batch:
            return reduce_terms(terms, self.reduction)
        total, number = sums_over_ranks(terms.sum(), terms.new_full((), terms.numel()))
        return total if self.reduction == "sum" else total / number.clamp_min(1.0)
