"""Segmentation losses: Dice + cross-entropy and its family, made from the statistics of one fused op."""

from __future__ import annotations

from lungkit.losses.deep_supervision import DeepSupervisionLoss
from lungkit.losses.dice_ce import DiceCELoss
from lungkit.losses.focal import DiceFocalLoss
from lungkit.losses.overlap import DiceLoss, GeneralizedDiceLoss, JaccardLoss, TverskyLoss
from lungkit.losses.soft import CodedLabelsLoss, SoftDiceCELoss

__all__ = [
    "CodedLabelsLoss",
    "DeepSupervisionLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "GeneralizedDiceLoss",
    "JaccardLoss",
    "SoftDiceCELoss",
    "TverskyLoss",
]
