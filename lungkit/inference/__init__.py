"""Inference: from a scan to a mask on its own grid; overlapping windows, label maps, attention maps."""

from __future__ import annotations

from lungkit.inference.classes import classes_from_probabilities
from lungkit.inference.lungs import lung_mask
from lungkit.inference.postprocessing import Postprocessing, postprocess
from lungkit.inference.predict import attention_map, predict_case, predict_label
from lungkit.inference.predictor import Prediction, Predictor
from lungkit.inference.sliding_window import gaussian_weights, sliding_window, stream_logits, window_starts
from lungkit.inference.trained_model import TrainedModel

__all__ = [
    "Postprocessing",
    "Prediction",
    "Predictor",
    "TrainedModel",
    "attention_map",
    "classes_from_probabilities",
    "gaussian_weights",
    "lung_mask",
    "postprocess",
    "predict_case",
    "predict_label",
    "sliding_window",
    "stream_logits",
    "window_starts",
]
