"""Hard-negative mining: of the background only what looks most like foreground counts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lungkit.errors import UsageError
from lungkit.losses._options import check_labels
from lungkit.ops._labels import equal_to


class HardNegativesLoss(nn.Module):
    r"""A loss of the foreground and of the hardest voxels of the background.

    With n the voxels of a batch, the :math:`\lceil \text{share} \cdot n \rceil` background voxels of the largest
    cross-entropy count, and all voxels with foreground; the others are masked. A background that is mostly easy then
    no longer drowns the few voxels that become false pieces.

    Args:
        loss: called as ``loss(logits, labels, mask)``, best a cross-entropy (e.g. ``DiceCELoss(lambda_dice=0)``).
        share: of a batch's voxels, above 0 and up to 1.
        sigmoid: channels are binary problems, and background is where the label vector is 0; else they are classes
            under a softmax, of which class 0 is the background.

    Shapes:
        logits: (B, C, \*S).
        labels: class indices (B, \*S) or (B, 1, \*S), or vectors (B, C, \*S); what ``loss`` ignores is never chosen.
        mask: (B, 1, \*S) or (B, \*S), voxels that count; None counts all.

    Raises:
        UsageError: a share out of its range.

    Source: Wu et al., "Bridging Category-level and Instance-level Semantic Image Segmentation", 2016 (the hardest
    voxels count); nnU-Net's ``TopKLoss`` keeps 10 %, foreground or not. That the foreground always counts is as in
    detection (Liu et al., "SSD", 2016).

    Example:
        >>> import torch
        >>> from lungkit.losses import DiceCELoss, HardNegativesLoss
        >>> criterion = HardNegativesLoss(DiceCELoss(softmax=True, lambda_dice=0.0), share=0.25)
        >>> logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [-9.0, 2.0, -9.0, 2.0]]])
        >>> round(criterion(logits, torch.tensor([[0, 0, 0, 1]])).item(), 4)
        1.1269
    """

    def __init__(self, loss: nn.Module, share: float, *, sigmoid: bool = False) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise UsageError(f"share must lie above 0 and be 1 at most, got {share}")
        self.loss = loss
        self.share = float(share)
        self.sigmoid = sigmoid

    def forward(self, logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of the voxels that count."""
        return self.loss(logits, labels, self.hard_voxels(logits, labels, mask))

    @torch.no_grad()
    def hard_voxels(self, logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        r"""The voxels that count, bool (B, 1, \*S). Their number is known, so nothing waits for a device."""
        check_labels(logits, labels, to_onehot_y=False)
        shape = (logits.shape[0], 1, *logits.shape[2:])
        vectors = labels.shape == logits.shape
        if self.sigmoid:
            surprise = F.softplus(logits.float()).sum(1, keepdim=True)
            background = (labels == 0).all(1, keepdim=True) if vectors else equal_to(labels, 0)
        else:
            surprise = -F.log_softmax(logits.float(), 1)[:, :1]
            background = labels[:, :1] == 1 if vectors else equal_to(labels, 0)
        background = background.reshape(shape)
        kept = torch.ones(shape, dtype=torch.bool, device=logits.device)
        if mask is not None:
            kept = mask.reshape(shape) != 0
        surprise = surprise.masked_fill(~(background & kept), -math.inf)
        number = math.ceil(self.share * surprise.numel())
        if number in (0, surprise.numel()):
            return kept
        threshold = surprise.flatten().topk(number, sorted=False).values.amin()
        return kept & (~background | (surprise >= threshold))
