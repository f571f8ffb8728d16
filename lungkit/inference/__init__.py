"""Inference: from a scan to a mask on its own grid; overlapping patches, probabilities, attention maps."""

from __future__ import annotations

from lungkit.inference.at_points import PointedNodule, PointedPrediction, segment_at
from lungkit.inference.lungs import lung_mask
from lungkit.inference.patches import gaussian_weights, patch_starts
from lungkit.inference.postprocessing import Postprocessing, classes_from_probabilities, postprocess
from lungkit.inference.predictor import Prediction, Predictor
from lungkit.inference.registry import KnownModel, known_models, model_folder
from lungkit.inference.sliding_window import predict_label, sliding_window, stream_logits
from lungkit.inference.trained_model import TrainedModel
from lungkit.inference.world_points import Box

__all__ = [
    "Box",
    "KnownModel",
    "PointedNodule",
    "PointedPrediction",
    "Postprocessing",
    "Prediction",
    "Predictor",
    "TrainedModel",
    "classes_from_probabilities",
    "gaussian_weights",
    "known_models",
    "lung_mask",
    "model_folder",
    "patch_starts",
    "postprocess",
    "predict_label",
    "segment_at",
    "sliding_window",
    "stream_logits",
]
