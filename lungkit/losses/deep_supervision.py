"""A loss over the outputs of every resolution of a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lungkit.errors import UsageError


class DeepSupervisionLoss(nn.Module):
    r"""Weighted sum of one loss over a network's outputs, from the finest grid to the coarsest.

    .. math:: \sum_i w_i\,\mathrm{loss}(z_i, \mathrm{down}_i(y))

    Labels are brought to each output's grid by taking the nearest voxel, so that they stay classes.

    Args:
        loss: called as ``loss(logits, labels)``.
        weights: one a level, finest first; None is 1, 1/2, 1/4 ... divided by their sum, so that the loss stays on the
            scale of a single output.
        finest: the loss of the finest output where it is another one.

    Shapes:
        outputs: one (B, C, \*S_i) a level, or a single tensor (e.g. in evaluation), which is ``loss`` alone.
        labels: (B, \*S), (B, 1, \*S) or (B, C, \*S) on the finest grid.

    Raises:
        UsageError: no output, or as many weights as there are not outputs.

    Source: nnU-Net (Isensee et al., 2021), which halves the weight with each coarser level.

    Example:
        >>> import torch
        >>> from lungkit.losses import DeepSupervisionLoss, DiceCELoss
        >>> criterion = DeepSupervisionLoss(DiceCELoss(softmax=True, to_onehot_y=True))
        >>> outputs = (torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4))
        >>> criterion(outputs, torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).shape
        torch.Size([])
    """

    def __init__(
        self,
        loss: nn.Module,
        weights: Sequence[float] | None = None,
        *,
        finest: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.finest = loss if finest is None else finest
        self.weights = None if weights is None else tuple(float(weight) for weight in weights)

    def forward(self, outputs: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
        """Loss of ``outputs``, finest first, against ``labels`` on the finest grid."""
        if isinstance(outputs, Tensor):
            return self.finest(outputs, labels)
        if not outputs:
            raise UsageError("outputs is empty; expected at least one tensor of logits")
        weights = self.weights
        if weights is None:
            halving = [0.5**level for level in range(len(outputs))]
            weights = tuple(weight / sum(halving) for weight in halving)
        if len(weights) != len(outputs):
            raise UsageError(
                f"got {len(outputs)} outputs for {len(weights)} weights; give one weight a level"
            )
        losses = [self.finest, *[self.loss] * (len(outputs) - 1)]
        levels = [
            weight * loss(logits, nearest_labels(labels, tuple(logits.shape[2:])))
            for loss, logits, weight in zip(losses, outputs, weights, strict=True)
            if weight != 0
        ]
        return torch.stack(levels).sum() if levels else outputs[0].sum() * 0.0


def nearest_labels(labels: Tensor, grid: tuple[int, ...]) -> Tensor:
    r"""Labels (..., \*S) on the coarser ``grid``: of each coarse voxel, the fine voxel at its centre.

    For any dtype. Where S is a multiple of the grid the result is a view.
    """
    for axis, coarse in enumerate(grid, start=labels.dim() - len(grid)):
        fine = labels.shape[axis]
        if fine == coarse:
            continue
        if fine % coarse == 0:
            step = fine // coarse
            labels = labels[(slice(None),) * axis + (slice(step // 2, None, step),)]
        else:
            centres = (torch.arange(coarse, device=labels.device) + 0.5) * (fine / coarse)
            labels = labels.index_select(axis, centres.long())
    return labels
