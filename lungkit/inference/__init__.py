"""Inference: from a scan to a mask on its own grid; overlapping patches, probabilities, attention maps."""

from __future__ import annotations

from lungkit.inference.lungs import lung_mask
from lungkit.inference.patches import gaussian_weights, patch_starts
from lungkit.inference.postprocessing import Postprocessing, classes_from_probabilities, postprocess
from lungkit.inference.predictor import Prediction, Predictor
from lungkit.inference.sliding_window import predict_label, sliding_window, stream_logits
from lungkit.inference.trained_model import TrainedModel

__all__ = [
    "Postprocessing",
    "Prediction",
    "Predictor",
    "TrainedModel",
    "classes_from_probabilities",
    "gaussian_weights",
    "lung_mask",
    "patch_starts",
    "postprocess",
    "predict_label",
    "sliding_window",
    "stream_logits",
]
