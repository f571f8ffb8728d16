"""Augmentation of training batches on whatever device they are on."""

from __future__ import annotations

from lungkit.data.augment.augmenter import Augmenter
from lungkit.data.augment.config import AugmentConfig

__all__ = ["AugmentConfig", "Augmenter"]
