"""From logits or probabilities to the class of every voxel."""

from lungkit.inference.postprocessing import classes_from_logits, classes_from_probabilities, largest

__all__ = ["classes_from_logits", "classes_from_probabilities", "largest"]
