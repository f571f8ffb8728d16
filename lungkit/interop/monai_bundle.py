"""A trained model as a MONAI bundle: a folder that ``monai.bundle`` runs, with lungkit doing the prediction.

What leads from a scan to its mask is :class:`lungkit.Predictor`, the same as in ``lungkit-predict``: the masks are the
same bit for bit. The bundle therefore needs lungkit installed beside MONAI, as its metadata say.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch

import lungkit
from lungkit._atomic import atomic_folder
from lungkit.checkpoint import save_checkpoint
from lungkit.errors import UsageError
from lungkit.inference import Predictor, TrainedModel
from lungkit.pipeline import find_scans

_LOG = logging.getLogger("lungkit")

_SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
# Entries of a checkpoint that a new one writes of itself.
_OWN = ("format", "lungkit", "torch", "sha256")
_MODULE = "lungkit.interop.monai_bundle"


def export_bundle(models: Sequence[TrainedModel], folder: str | os.PathLike[str]) -> Path:
    """Write ``folder``: ``configs/metadata.json``, ``configs/inference.json``, ``models/`` and ``docs/README.md``.

    Args:
        models: one, or the folds of one.
        folder: new.

    Raises:
        UsageError: ``folder`` exists.
        ResourceError: the disk is full.

    Example:
        Write a bundle and run it with MONAI::

            export_bundle([TrainedModel.load("runs/phantom-attention-unet")], "bundle")
            # python -m monai.bundle run --bundle_root bundle --config_file bundle/configs/inference.json
            #     --meta_file bundle/configs/metadata.json --dataset_dir scans --output_dir masks
    """
    folder = Path(folder)
    if folder.exists():
        raise UsageError(f"{folder} exists; name a new folder")
    with atomic_folder(folder) as temporary:
        for name in ("configs", "models", "docs"):
            (temporary / name).mkdir()
        for index, model in enumerate(models):
            description = {key: value for key, value in model.description.items() if key not in _OWN}
            save_checkpoint(
                temporary / "models" / f"model_{index}",
                weights=model.network.state_dict(),
                description=description,
                trainer={},
            )
        for name, content in (
            ("metadata.json", describe_bundle(models)),
            ("inference.json", _configuration(models[0])),
        ):
            (temporary / "configs" / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (temporary / "docs" / "README.md").write_text(_readme(models), encoding="utf-8")
    return folder


def bundle_predictor(bundle_root: str | os.PathLike[str], **options: Any) -> Predictor:
    """The predictor with all models of a bundle; ``options`` are those of :class:`lungkit.Predictor`."""
    return Predictor.from_run(*sorted((Path(bundle_root) / "models").glob("model_*")), **options)


def predict_folder(
    predictor: Predictor, dataset_dir: str | os.PathLike[str], output_dir: str | os.PathLike[str]
) -> list[Path]:
    """Masks ``NAME.nii.gz`` of the scans in a folder (NIfTI or DICOM, see :func:`lungkit.pipeline.find_scans`).

    Raises:
        DataError: there is no scan, or one cannot be used.
    """
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for scan in find_scans(Path(dataset_dir), channels=len(predictor.models[0].channels)).scans:
        prediction = predictor(scan.load(max_voxels=predictor.max_voxels).volumes)
        for warning in prediction.warnings:
            _LOG.warning("%s: %s", scan.name, warning)
        written.append(output / f"{scan.name}.nii.gz")
        prediction.save(written[-1])
    return written


def describe_bundle(models: Sequence[TrainedModel]) -> dict[str, Any]:
    """``metadata.json`` of a bundle, after MONAI's schema."""
    model = models[0]
    options = model.description["model"]
    patch = [int(length) for length in model.patch_size]
    in_hu = model.preprocessing.channels[0].units == "HU"
    image = {
        "type": "image",
        "format": "hounsfield" if in_hu else "magnitude",
        "modality": "CT" if in_hu else "n/a",
        "num_channels": int(options["in_channels"]),
        "spatial_shape": patch,
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": True,
        "channel_def": _channel_definition(model),
    }
    logits = {
        "type": "image",
        "format": "segmentation",
        "num_channels": int(options["out_channels"]),
        "spatial_shape": patch,
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": True,
        "channel_def": {str(index): name for index, name in enumerate(model.labels)},
    }
    return {
        "schema": _SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported by lungkit {lungkit.__version__}"},
        "monai_version": _version("monai") or "1.5.0",
        "pytorch_version": torch.__version__,
        "numpy_version": numpy.__version__,
        "required_packages_version": {"lungkit": lungkit.__version__},
        "name": model.name,
        "task": "segmentation of " + ", ".join(list(model.labels)[1:]),
        "description": f"{options['name']} of lungkit, {len(models)} of them; patches normalised by lungkit",
        "authors": "",
        "copyright": "",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": logits}},
        "lungkit": {"models": [one.to_dict() for one in models], "labels": model.labels},
    }


def _channel_definition(model: TrainedModel) -> dict[str, str]:
    offsets = range(-model.context_slices, model.context_slices + 1)
    names = [
        f"{name} of slice z{offset:+d}" if offset else name for offset in offsets for name in model.channels
    ]
    return {str(index): name for index, name in enumerate(names)}


def _configuration(model: TrainedModel) -> dict[str, Any]:
    """``inference.json``: components that ``monai.bundle run`` builds; every entry can be given on its command line."""
    return {
        "imports": ["$import lungkit"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/input'",
        "output_dir": "$@bundle_root + '/eval'",
        "device": None,
        "mirror": None,
        "overlap": 0.5,
        "network_def": {
            "_target_": "lungkit.nn.build_model",
            **model.description["model"],
        },
        "predictor": {
            "_target_": f"{_MODULE}.bundle_predictor",
            "bundle_root": "@bundle_root",
            "device": "@device",
            "mirror": "@mirror",
            "overlap": "@overlap",
        },
        "run": {
            "_target_": f"{_MODULE}.predict_folder",
            "predictor": "@predictor",
            "dataset_dir": "@dataset_dir",
            "output_dir": "@output_dir",
        },
    }


def _readme(models: Sequence[TrainedModel]) -> str:
    labels = ", ".join(f"{name} ({value})" for name, value in models[0].labels.items())
    return f"""# {models[0].name}

A model of lungkit {lungkit.__version__} as a MONAI bundle; masks hold {labels}. It needs MONAI and lungkit:

    python -m monai.bundle run --bundle_root . --config_file configs/inference.json \\
        --meta_file configs/metadata.json --dataset_dir SCANS --output_dir MASKS

SCANS holds NIfTI files (NAME_0000.nii.gz, ... for several channels) or DICOM series. `--mirror True` averages over
mirror images, `--device cpu` chooses the device, `--overlap` that of neighbouring patches. `monai.bundle` as a command
needs the package fire.
"""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
