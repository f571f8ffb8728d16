"""Dice of each lesion by itself, so that a small one weighs as much as a large one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lungkit.errors import UsageError
from lungkit.losses._options import check_not_negative
from lungkit.losses._ranks import sums_over_ranks

MOST_LESIONS = 255
"""Numbers that lesions of one image can have."""


class LesionDiceLoss(nn.Module):
    r"""Mean over the true lesions of soft Dice, each measured as though the other lesions were not there.

    With p the softmax of the logits and lesion n a connected component of class c:

    .. math::
        \frac{1}{N} \sum_n \Bigl(1 - \frac{2 \sum_{v \in n} p_{v,c} + s_n}
        {\sum_{v \in n} p_{v,c} + \sum_{v:\,y_v \neq c} p_{v,c} + |n| + s_d}\Bigr)

    The sums over lesions are one ``scatter_add``, whatever their number. Predictions outside every lesion of the class
    count against each of the image's. Images without lesions count through the other terms of a loss.

    Args:
        smooth_nr, smooth_dr: :math:`s_n` and :math:`s_d`.
        synchronise: the mean over the lesions of all ranks, as in :class:`lungkit.losses.DiceCELoss`.

    Shapes:
        logits: (B, C, \*S), C at least 2; half types are computed in float32.
        labels: class indices (B, \*S); what is no class 0..C-1 does not count.
        lesions: (B, \*S), integers: 0 where there is none, else its number in the image, 1 to 255.
        returns: a scalar, 0 where there is no lesion.

    Raises:
        UsageError: shapes that do not fit.

    Source: Kofler et al., "blob loss: instance imbalance aware loss functions for semantic segmentation", IPMI 2023
    (which adds half as much of it as of the loss of the whole image).

    Example:
        >>> import torch
        >>> from lungkit.losses import LesionDiceLoss
        >>> labels = torch.tensor([[0, 1, 1, 1, 0, 1]])
        >>> lesions = torch.tensor([[0, 1, 1, 1, 0, 2]])
        >>> missed = torch.tensor([[[0.0] * 6, [-20.0, 20, 20, 20, -20, -20]]])
        >>> round(LesionDiceLoss()(missed, labels, lesions).item(), 4)
        0.5
    """

    def __init__(
        self, *, smooth_nr: float = 1e-5, smooth_dr: float = 1e-5, synchronise: bool = False
    ) -> None:
        super().__init__()
        check_not_negative(smooth_nr=smooth_nr, smooth_dr=smooth_dr)
        self.smooth_nr, self.smooth_dr = float(smooth_nr), float(smooth_dr)
        self.synchronise = synchronise

    def forward(self, logits: Tensor, labels: Tensor, lesions: Tensor) -> Tensor:
        """Loss of ``logits`` for the numbered ``lesions`` of ``labels``."""
        grid = (logits.shape[0], *logits.shape[2:])
        if logits.dim() < 3 or logits.shape[1] < 2 or labels.shape != grid or lesions.shape != grid:
            raise UsageError(
                f"logits must be (B, C, *S) with two classes or more, labels and lesions (B, *S); got "
                f"{tuple(logits.shape)}, {tuple(labels.shape)} and {tuple(lesions.shape)}"
            )
        images, classes = logits.shape[:2]
        logits = logits.flatten(2)
        probability = logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
        labels, lesions = labels.flatten(1).long(), lesions.flatten(1).long()
        counts = (labels >= 0) & (labels < classes)
        labels, lesions = labels * counts, lesions * counts
        own = probability.gather(1, labels.unsqueeze(1)).squeeze(1) * counts
        # One axis: PyTorch's sums of this kind are reproducible on CUDA with one axis only.
        numbers = MOST_LESIONS + 1
        places = (lesions + numbers * torch.arange(images, device=lesions.device).unsqueeze(1)).flatten()
        overlap = own.new_zeros(images * numbers).scatter_add(0, places, own.flatten()).view(images, numbers)
        size = overlap.new_zeros(images * numbers).scatter_add(0, places, counts.flatten().to(own))
        kind = labels.new_zeros(images * numbers).scatter(0, places, labels.flatten())
        own_by_class = torch.stack([(own * (labels == index)).sum(1) for index in range(classes)], 1)
        outside = (probability * counts.unsqueeze(1)).sum(2) - own_by_class
        size, kind = size.view(images, numbers), kind.view(images, numbers)
        total = overlap + outside.gather(1, kind) + size
        terms = 1.0 - (2.0 * overlap + self.smooth_nr) / (total + self.smooth_dr)
        is_lesion = size > 0
        is_lesion[:, 0] = False
        value, number = torch.where(is_lesion, terms, 0.0).sum(), is_lesion.sum().to(terms)
        if self.synchronise:
            value, number = sums_over_ranks(value, number)
        return value / number.clamp_min(1.0)
