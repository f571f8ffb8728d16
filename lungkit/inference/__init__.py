"""Inference: overlapping patches stitched to a whole image, label maps, attention maps."""

from __future__ import annotations

from lungkit.inference.predict import attention_map, predict_case, predict_label
from lungkit.inference.sliding_window import gaussian_weights, sliding_window, stream_logits, window_starts

__all__ = [
    "attention_map",
    "gaussian_weights",
    "predict_case",
    "predict_label",
    "sliding_window",
    "stream_logits",
    "window_starts",
]
