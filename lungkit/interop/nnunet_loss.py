"""nnU-Net's Dice + cross-entropy by the fused op, with nnU-Net's numbers."""

from __future__ import annotations

from torch import Tensor, nn

from lungkit.losses import DiceCELoss


class FusedDiceCE(nn.Module):
    r"""nnU-Net's ``DC_and_CE_loss``: cross-entropy minus the mean Dice coefficient of the foreground classes.

    Args:
        batch: Dice over the whole batch, else of each image.
        ignore_index: label whose voxels do not count.
        synchronise: Dice over the batches of all processes.

    Shapes:
        input: logits (B, C, \*S).
        target: class indices (B, 1, \*S), of any dtype.
        returns: a scalar, at least -1.

    Source: Isensee et al., "nnU-Net", 2021.

    Example:
        >>> import torch
        >>> from lungkit.interop.nnunet_loss import FusedDiceCE
        >>> labels = torch.zeros(2, 1, 8, 8)
        >>> labels[:, :, 2:5] = 1
        >>> round(FusedDiceCE()(torch.zeros(2, 2, 8, 8), labels).item(), 4)
        0.2646
    """

    def __init__(
        self, *, batch: bool = True, ignore_index: int | None = None, synchronise: bool = False
    ) -> None:
        super().__init__()
        self.loss = DiceCELoss.nnunet(batch=batch, ignore_index=ignore_index, synchronise=synchronise)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of logits ``input`` against ``target``."""
        loss: Tensor = self.loss(input, target)
        return loss - 1
