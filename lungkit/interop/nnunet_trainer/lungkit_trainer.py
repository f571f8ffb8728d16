"""nnU-Net's trainer with the fused Dice + cross-entropy; found by nnU-Net, which imports it by its bare name."""

from __future__ import annotations

from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from lungkit.interop.nnunet_loss import FusedDiceCE


class nnUNetTrainerLungkit(nnUNetTrainer):
    """nnU-Net's default trainer, but that Dice and cross-entropy come from one pass over logits and labels.

    The numbers are those of its ``DC_and_CE_loss``. Regions keep nnU-Net's own loss.

    Example:
        Train with it::

            export nnUNet_extTrainer=$(python -c "import lungkit.interop.nnunet_trainer as t; print(t.__path__[0])")
            nnUNetv2_train 1 3d_fullres 0 -tr nnUNetTrainerLungkit
    """

    def _build_loss(self) -> nn.Module:
        loss: nn.Module = super()._build_loss()
        if self.label_manager.has_regions:
            return loss
        batch = bool(self.configuration_manager.batch_dice)
        fused = FusedDiceCE(
            batch=batch, ignore_index=self.label_manager.ignore_label, synchronise=self.is_ddp and batch
        )
        if not isinstance(loss, DeepSupervisionWrapper):
            return fused
        loss.loss = fused
        return loss
