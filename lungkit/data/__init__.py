"""CT in, patches out: reading, layouts, splits, preprocessing, cache, patch sampling, augmentation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_MODULES = {
    "augment": ("AugmentConfig", "Augmenter"),
    "cache": ("CachedCase", "CaseCache"),
    "dataset": ("Case", "Dataset", "read_case"),
    "dicom": (
        "DicomScan",
        "SeriesInfo",
        "find_series",
        "read_dicom_label",
        "read_dicom_seg",
        "read_rtstruct",
        "read_series",
        "write_dicom_seg",
        "write_rtstruct",
    ),
    "fingerprint": ("Fingerprint", "fingerprint_dataset"),
    "geometry": ("Geometry",),
    "layouts": ("open_dataset",),
    "patches": ("Patch", "PatchSampler"),
    "phantom": ("Phantom", "make_phantom", "write_phantom_dataset"),
    "preprocessing": (
        "ChannelNormalisation",
        "PreprocessedImage",
        "Preprocessing",
        "plan_preprocessing",
        "preprocess_image",
    ),
    "preview": ("save_augmentation_preview",),
    "splits": ("Split", "make_or_load_splits", "write_splits"),
    "volume": ("DEFAULT_MAX_VOXELS", "NanPolicy", "Volume", "read_volume", "write_nifti"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

if TYPE_CHECKING:
    from lungkit.data.augment import AugmentConfig, Augmenter
    from lungkit.data.cache import CachedCase, CaseCache
    from lungkit.data.dataset import Case, Dataset, read_case
    from lungkit.data.dicom import (
        DicomScan,
        SeriesInfo,
        find_series,
        read_dicom_label,
        read_dicom_seg,
        read_rtstruct,
        read_series,
        write_dicom_seg,
        write_rtstruct,
    )
    from lungkit.data.fingerprint import Fingerprint, fingerprint_dataset
    from lungkit.data.geometry import Geometry
    from lungkit.data.layouts import open_dataset
    from lungkit.data.patches import Patch, PatchSampler
    from lungkit.data.phantom import Phantom, make_phantom, write_phantom_dataset
    from lungkit.data.preprocessing import (
        ChannelNormalisation,
        PreprocessedImage,
        Preprocessing,
        plan_preprocessing,
        preprocess_image,
    )
    from lungkit.data.preview import save_augmentation_preview
    from lungkit.data.splits import Split, make_or_load_splits, write_splits
    from lungkit.data.volume import DEFAULT_MAX_VOXELS, NanPolicy, Volume, read_volume, write_nifti

__all__ = [
    "DEFAULT_MAX_VOXELS",
    "AugmentConfig",
    "Augmenter",
    "CachedCase",
    "Case",
    "CaseCache",
    "ChannelNormalisation",
    "Dataset",
    "DicomScan",
    "Fingerprint",
    "Geometry",
    "NanPolicy",
    "Patch",
    "PatchSampler",
    "Phantom",
    "PreprocessedImage",
    "Preprocessing",
    "SeriesInfo",
    "Split",
    "Volume",
    "find_series",
    "fingerprint_dataset",
    "make_or_load_splits",
    "make_phantom",
    "open_dataset",
    "plan_preprocessing",
    "preprocess_image",
    "read_case",
    "read_dicom_label",
    "read_dicom_seg",
    "read_rtstruct",
    "read_series",
    "read_volume",
    "save_augmentation_preview",
    "write_dicom_seg",
    "write_nifti",
    "write_phantom_dataset",
    "write_rtstruct",
    "write_splits",
]


def __getattr__(name: str) -> Any:
    # Names load on first use: matplotlib is not imported to read a scan.
    if name in _HOME:
        return getattr(importlib.import_module(f"lungkit.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lungkit.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
