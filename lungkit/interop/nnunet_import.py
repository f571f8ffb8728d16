"""From a trained model of nnU-Net to a run that :class:`lungkit.Predictor` predicts with."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lungkit._atomic import atomic_folder, write_json_atomic
from lungkit._reading import read_json
from lungkit.checkpoint import BEST, save_checkpoint
from lungkit.data.declared_labels import parse_labels
from lungkit.data.preprocessing import Preprocessing
from lungkit.errors import CheckpointError, UnsupportedModelError, UsageError
from lungkit.inference.patches import Tiling
from lungkit.inference.trained_model import FOLDS
from lungkit.interop.nnunet_plans import (
    channel_names,
    network_options,
    preprocessing_of,
    resolve_configuration,
)
from lungkit.nn import UNet, build_model
from lungkit.nn.nnunet import load_nnunet_state_dict

TILING = Tiling(whole_slices=False, weighting="voxel-gaussian", whole_steps=False, padding="zero")
"""How nnU-Net lays its patches."""


@dataclass(frozen=True)
class NnunetImport:
    """What was imported: the run, its folds, the configuration and the trainer that made it."""

    run: Path
    folds: tuple[str, ...]
    configuration: str
    trainer: str


def import_nnunet(
    folder: str | os.PathLike[str],
    run: str | os.PathLike[str],
    *,
    folds: Sequence[str] | None = None,
    checkpoint: str = "final",
) -> NnunetImport:
    """Write a run folder from a trained model of nnU-Net 2, TRAINER__PLANS__CONFIGURATION of its results.

    Read are ``plans.json``, ``dataset.json`` and ``fold_*/checkpoint_*.pth``; of the last only tensors and plain values
    are taken, and nothing in them is executed. The run predicts as nnU-Net does: its axes, crop, normalisation,
    resampling, patches, mirror images, mean of the folds' logits. Imported are PlainConvUNet and ResidualEncoderUNet,
    2D and 3D.

    Args:
        folder: trained model.
        run: new folder; a run of one fold, or of several the folder of all of them.
        folds: names such as "0" or "all"; None takes every fold that has the checkpoint.
        checkpoint: "final" or "best".

    Raises:
        UnsupportedModelError: cascades, other architectures, normalisations, readers or resampling: named.
        CheckpointError: a file is missing or damaged, or weights do not fit the plans.
        UsageError: ``run`` exists, or there is no such fold.

    Example:
        Predict with all folds of a model::

            import_nnunet("nnUNetTrainer__nnUNetPlans__3d_fullres", "runs/imported")
            prediction = lungkit.Predictor.from_run("runs/imported")("scan.nii.gz")
    """
    folder, run = Path(folder), Path(run)
    if run.exists():
        raise UsageError(f"{run} exists; name a new folder")
    plans, dataset = _json(folder / "plans.json"), _json(folder / "dataset.json")
    paths = _checkpoints(folder, folds, checkpoint)
    with atomic_folder(run) as temporary:
        for path in paths:
            target = temporary if len(paths) == 1 else temporary / path.parent.name
            (target / "checkpoints").mkdir(parents=True)
            configuration, trainer = _import_fold(path, target / "checkpoints" / BEST, plans, dataset)
        if len(paths) > 1:
            names = [path.parent.name for path in paths]
            write_json_atomic(temporary / FOLDS, {"folds": names, "checkpoint": BEST})
    return NnunetImport(run, tuple(path.parent.name for path in paths), configuration, trainer)


def _import_fold(
    path: Path, target: Path, plans: Mapping[str, Any], dataset: Mapping[str, Any]
) -> tuple[str, str]:
    content = read_nnunet_checkpoint(path)
    try:
        name = str(content["init_args"]["configuration"])
        trainer = str(content.get("trainer_name", "nnUNetTrainer"))
        configuration = resolve_configuration(plans, name)
        labels, _, regions = parse_labels(dict(dataset), path.parent.parent / "dataset.json")
        labels = dict(sorted(labels.items(), key=lambda entry: entry[1]))
        channels = channel_names(dataset)
        outputs = len(regions) or len(labels)
        preprocessing = preprocessing_of(plans, configuration, channels=len(channels), classes=len(labels))
        network = build_model(**network_options(configuration, channels=len(channels), outputs=outputs))
        assert isinstance(network, UNet)
        weights = content["network_weights"]
        load_nnunet_state_dict(network, _in_order_of(labels, regions, weights) if regions else weights)
        axes = content.get("inference_allowed_mirroring_axes") or ()
        description = _describe(network, preprocessing, labels, regions, channels)
        description |= {
            "epoch": int(content.get("current_epoch", 0)),
            "patch_size": [int(length) for length in configuration["patch_size"]],
            "mirror_axes": [int(axis) for axis in axes],
            "mirrored": bool(axes),
            "source": {
                "program": "nnU-Net",
                "dataset": plans.get("dataset_name"),
                "plans": plans.get("plans_name"),
                "configuration": name,
                "trainer": trainer,
                "fold": path.parent.name,
                "checkpoint": path.name,
            },
        }
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: cannot be imported: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: checkpoint, plans.json and dataset.json do not describe a model of nnU-Net 2 ({error!r})"
        ) from error
    save_checkpoint(target, weights=network.state_dict(), description=description, trainer={})
    return name, trainer


def _describe(
    network: UNet,
    preprocessing: Preprocessing,
    labels: Mapping[str, int],
    regions: Mapping[str, Sequence[int]],
    channels: Sequence[str],
) -> dict[str, Any]:
    return {
        "model": network.config,
        "preprocessing": preprocessing.to_dict(),
        "labels": {name: index for index, name in enumerate(labels)},
        "label_values": dict(labels),
        "regions": [[name, list(values)] for name, values in regions.items()],
        "channels": list(channels),
        "context_slices": 0,
        "tiling": asdict(TILING),
        "averaging": "logits",
        "precision": "fp32",
    }


def _in_order_of(
    labels: Mapping[str, int], regions: Mapping[str, Sequence[int]], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The logits of regions in the order of the labels' values; nnU-Net has them in the order of writing."""
    order = [list(regions).index(name) for name in list(labels)[1:]]
    return {name: value[order] if ".seg_layers." in name else value for name, value in weights.items()}


def read_nnunet_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint of nnU-Net holds: tensors, plain values and numpy's scalars; anything else is refused.

    Raises:
        CheckpointError: it is missing, damaged, or holds more.
    """
    path = Path(path)
    try:
        with torch.serialization.safe_globals(_allowed()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own message tells how to switch the protection off
        found = str(error).partition("GLOBAL ")[2].partition(" ")[0]
        raise CheckpointError(
            f"{path}: holds more than tensors and plain values{f' ({found})' if found else ''}, and was not loaded"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # torch raises many kinds for bytes that are no archive of its own
        raise CheckpointError(f"{path}: is missing or damaged ({type(error).__name__})") from error
    if not isinstance(content, dict) or "network_weights" not in content or "init_args" not in content:
        raise CheckpointError(
            f"{path}: not a checkpoint of nnU-Net 2, network_weights or init_args is missing"
        )
    return content


def _allowed() -> list[Any]:
    """What numpy needs for its scalars, which nnU-Net logs, under the names of numpy 1 and 2."""
    import _codecs

    scalar = np.float64(0).__reduce__()[0]
    kinds = [
        type(np.dtype(kind)) for kind in (np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_)
    ]
    return [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *kinds,
        (_codecs.encode, "_codecs.encode"),
    ]


def _checkpoints(folder: Path, folds: Sequence[str] | None, checkpoint: str) -> list[Path]:
    if checkpoint not in ("final", "best"):
        raise UsageError(f"checkpoint must be 'final' or 'best', got {checkpoint!r}")
    name = f"checkpoint_{checkpoint}.pth"
    found = sorted(path / name for path in folder.glob("fold_*") if (path / name).is_file())
    if folds is not None:
        wanted = [folder / f"fold_{fold}" / name for fold in folds]
        missing = [str(path) for path in wanted if path not in found]
        if missing:
            raise UsageError(f"folds: there is no {', '.join(missing)}")
        return wanted
    if not found:
        raise CheckpointError(
            f"{folder}: no fold_*/{name}; name TRAINER__PLANS__CONFIGURATION of nnU-Net's results"
        )
    # fold_all was trained on every case, and nnU-Net does not mix it with the others.
    return [path for path in found if path.parent.name != "fold_all"] or found


def _json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}; name TRAINER__PLANS__CONFIGURATION of nnU-Net's results"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object")
    return content
