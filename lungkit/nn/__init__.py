"""Networks and their parts: U-Net and Attention U-Net in 2D and 3D, attention gates, building blocks."""

from __future__ import annotations

from lungkit.nn.attention_gate import AttentionGate, MonaiAttentionGate
from lungkit.nn.attention_unet import AttentionUNet
from lungkit.nn.monai import MonaiAttentionUNet
from lungkit.nn.registry import MODELS, build_model
from lungkit.nn.unet import UNet

__all__ = [
    "MODELS",
    "AttentionGate",
    "AttentionUNet",
    "MonaiAttentionGate",
    "MonaiAttentionUNet",
    "UNet",
    "build_model",
]
