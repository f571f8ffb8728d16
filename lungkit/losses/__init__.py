"""Segmentation losses: Dice + cross-entropy and its family, made from the statistics of one fused op."""

from __future__ import annotations

from lungkit.losses.deep_supervision import DeepSupervisionLoss
from lungkit.losses.dice_ce import DiceCELoss
from lungkit.losses.focal import DiceFocalLoss
from lungkit.losses.focal_tversky import FocalTverskyLoss
from lungkit.losses.hard_negatives import HardNegativesLoss
from lungkit.losses.lesions import LesionDiceLoss
from lungkit.losses.overlap import DiceLoss, GeneralizedDiceLoss, JaccardLoss, TverskyLoss
from lungkit.losses.soft import CodedLabelsLoss, SoftDiceCELoss

__all__ = [
    "CodedLabelsLoss",
    "DeepSupervisionLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "FocalTverskyLoss",
    "GeneralizedDiceLoss",
    "HardNegativesLoss",
    "JaccardLoss",
    "LesionDiceLoss",
    "SoftDiceCELoss",
    "TverskyLoss",
]
