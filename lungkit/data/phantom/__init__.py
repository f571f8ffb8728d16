"""A synthetic chest CT with tumours: data for tests, demonstrations and first runs, made from a seed."""

from __future__ import annotations

from lungkit.data.phantom.dataset import PHANTOM_LABELS, write_phantom_dataset
from lungkit.data.phantom.generate import TUMOUR_FRACTION, Phantom, make_phantom
from lungkit.data.phantom.tumours import Tumour, TumourKind

__all__ = [
    "PHANTOM_LABELS",
    "TUMOUR_FRACTION",
    "Phantom",
    "Tumour",
    "TumourKind",
    "make_phantom",
    "write_phantom_dataset",
]
