"""A network out of a checkpoint, with everything that it takes to use it."""

from __future__ import annotations

import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from lungkit._reading import read_json
from lungkit.checkpoint import BEST, LAST, Checkpoint, load_checkpoint
from lungkit.data.dataset import MAX_LABEL_VALUE
from lungkit.data.fingerprint import ChannelFingerprint
from lungkit.data.geometry import Geometry, plan_geometry
from lungkit.data.preprocessing import Preprocessing
from lungkit.data.volume import Volume
from lungkit.errors import CheckpointError, DataError
from lungkit.inference.patches import TILING, Tiling
from lungkit.inference.postprocessing import Postprocessing
from lungkit.inference.precision import Precision
from lungkit.nn import AttentionUNet, MonaiAttentionUNet, build_model


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """What a checkpoint holds: nothing else is needed to predict.

    ``labels`` maps each class name to its value in masks, in the order of the class indices, the background first.
    ``regions`` are those of :attr:`lungkit.data.Dataset.regions`, None where classes exclude each other.
    ``patch_size`` is (Y, X) for a 2D network, which sees ``context_slices`` slices on either side as channels, and
    (Z, Y, X) for a 3D one. ``spacing_range_mm`` holds the "min", "median" and "max" spacing (z, y, x) of the training
    scans, ``intensities`` what each of their channels was like; None where the checkpoint does not say.
    ``precision`` is the number format that the network was trained and validated in, None where the checkpoint does
    not say. ``digest`` is the SHA-256 of the checkpoint's manifest, which vouches for the weights.

    Models of other programs are used as these use them: ``tiling`` lays the patches, ``mirror_axes`` are those along
    which mirror images may be taken (0 is the first of ``patch_size``), ``mirrored`` says whether they are unless
    somebody decides, and ``averaging`` whether an ensemble is the mean of "probabilities" or of "logits", which then
    are what is resampled too.
    """

    path: Path
    network: nn.Module
    preprocessing: Preprocessing
    labels: dict[str, int]
    channels: tuple[str, ...]
    patch_size: tuple[int, ...]
    context_slices: int
    spacing_range_mm: dict[str, tuple[float, ...]] | None
    intensities: tuple[ChannelFingerprint, ...] | None
    postprocessing: Postprocessing
    precision: Precision | None
    digest: str
    description: dict[str, Any]
    regions: dict[str, tuple[int, ...]] | None = None
    tiling: Tiling = TILING
    mirror_axes: tuple[int, ...] = (0, 1, 2)
    mirrored: bool = False
    averaging: Literal["probabilities", "logits"] = "probabilities"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainedModel:
        """Load a run folder (its best checkpoint) or one checkpoint folder; nothing in it is executed.

        Raises:
            CheckpointError: not a checkpoint, damaged, or of a network that this version does not know; names the
                folder or file.
        """
        loaded = load_checkpoint(checkpoint_folder(path), with_trainer=False)
        description = loaded.description
        try:
            return cls(
                path=loaded.folder,
                network=load_network(loaded).eval(),
                preprocessing=Preprocessing.from_dict(description["preprocessing"]),
                labels=_labels(description),
                channels=tuple(str(name) for name in description["channels"]),
                patch_size=_patch_size(description),
                context_slices=_context_slices(description),
                spacing_range_mm=_spacing_range(description),
                intensities=_intensities(description),
                postprocessing=Postprocessing.from_dict(description.get("postprocessing", {})),
                precision=_precision(description),
                digest=str(description["sha256"]["manifest.json"]),
                description=description,
                regions=_regions(description),
                tiling=Tiling(**description.get("tiling", {})),
                mirror_axes=_mirror_axes(description),
                mirrored=bool(description.get("mirrored", False)),
                averaging=_averaging(description),
            )
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(
                f"{loaded.folder}: manifest.json does not describe a model of this version of lungkit ({error!r})"
            ) from error

    @property
    def dims(self) -> int:
        """2 or 3."""
        return len(self.patch_size)

    def geometry_of(self, volume: Volume) -> Geometry:
        """The grid on which the network sees ``volume``.

        Training that resampled did so to one spacing, and so does this. Training on the scans' own pixels taught the
        network the sizes between the smallest and the largest of them: a scan outside of these, by more than 1 %, is
        resampled to their median; along Z only for a 3D network.
        """
        axes = self.preprocessing.axes
        if self.preprocessing.target_spacing_mm is not None or self.spacing_range_mm is None:
            return self.preprocessing.geometry_of(volume)
        own = plan_geometry(volume, axes=axes).spacing_mm
        spacing = list(own)
        for axis in range(3 - self.dims, 3):
            least, most = self.spacing_range_mm["min"][axis], self.spacing_range_mm["max"][axis]
            if not 0.99 * least <= own[axis] <= 1.01 * most:
                spacing[axis] = self.spacing_range_mm["median"][axis]
        return plan_geometry(volume, target_spacing_mm=(spacing[0], spacing[1], spacing[2]), axes=axes)

    def own_grid_of(self, volume: Volume) -> Geometry:
        """The grid of ``volume``, its axes as the network sees them."""
        return plan_geometry(volume, axes=self.preprocessing.axes)

    @property
    def region_sequence(self) -> tuple[int, ...] | None:
        """Classes that regions are written as, in the order of writing; None without regions."""
        names = list(self.labels)
        return None if self.regions is None else tuple(names.index(name) for name in self.regions)

    @property
    def has_attention(self) -> bool:
        """Whether the network has attention gates."""
        return isinstance(self.network, (AttentionUNet, MonaiAttentionUNet))

    @property
    def name(self) -> str:
        """Name of the run, or of the checkpoint's folder where it lies in no run."""
        parent = self.path.resolve().parent
        return parent.parent.name if parent.name == "checkpoints" else self.path.resolve().name

    def to_dict(self) -> dict[str, Any]:
        """Which model this is, for reports: no path, since reports travel."""
        return {
            "name": self.name,
            "network": self.description["model"].get("name"),
            "checkpoint": self.path.name,
            "epoch": self.description.get("epoch"),
            "sha256": self.digest,
            "trained_with_lungkit": self.description.get("lungkit"),
        }


FOLDS = "folds.json"
"""File that makes a folder that of all folds of a dataset, each a run."""


def model_folders(path: str | os.PathLike[str]) -> list[Path]:
    """What ``path`` stands for: itself, or of a folder of all folds the checkpoint of each that was measured.

    Raises:
        CheckpointError: ``folds.json`` is damaged, or a fold is not trained.
    """
    record = Path(path) / FOLDS
    if not record.is_file():
        return [Path(path)]
    try:
        content = read_json(record)
        found = [
            Path(path) / Path(name).name / "checkpoints" / content["checkpoint"] for name in content["folds"]
        ]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{record}: does not name the folds of a model ({error!r})") from error
    for folder in found:
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder.parent.parent}: this fold is not trained; finish it with the command that began the folds"
            )
    return found


def checkpoint_folder(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that ``path`` means: itself, or the best (else the last) one of a run.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if path.is_file() and path.name in ("manifest.json", "model.safetensors"):
        return path.parent
    if path.is_file():
        raise CheckpointError(
            f"{path}: a file, not a checkpoint of lungkit; name a run folder, or a folder that holds manifest.json and "
            "model.safetensors. Pickled weights (.pt, .pth, .ckpt) are not opened, since they can run code"
        )
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; name a run folder of lungkit-train or a checkpoint")
    if (path / "manifest.json").is_file():
        return path
    for folder in (path / "checkpoints", path):
        for name in (BEST, LAST):
            if (folder / name).is_dir():
                return folder / name
    raise CheckpointError(
        f"{path}: neither a run folder (checkpoints/ is missing) nor a checkpoint (manifest.json is missing)"
    )


_REPEATED = ("convolutions", "decoder_convolutions", "residual_encoder")


def load_network(checkpoint: Checkpoint) -> nn.Module:
    """The network of a checkpoint with its weights.

    Raises:
        CheckpointError: the weights are those of another network, or not finite.
        UsageError: this version does not know the network.
    """
    options = checkpoint.description["model"]
    for name in _REPEATED:
        repeats = options.get(name)
        counts = [n for n in (repeats if isinstance(repeats, list) else [repeats]) if isinstance(n, int)]
        # Each convolution and each level has weights of its own: a network of more would be built for nothing.
        if max([0, len(counts), *counts]) > len(checkpoint.weights):
            raise CheckpointError(
                f"{checkpoint.folder}: manifest.json describes a network of {name} {reprlib.repr(repeats)}, "
                f"model.safetensors holds {len(checkpoint.weights)} weights"
            )
    try:
        # Without memory first: a manifest may describe a network that no machine holds.
        with torch.device("meta"):
            build_model(**options).load_state_dict(checkpoint.weights, assign=True)
        network = build_model(**options)
        network.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint.folder}: model.safetensors holds the weights of another network than manifest.json describes "
            f"({error})"
        ) from error
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(
                f"{checkpoint.folder}: weight {name} is NaN or infinite; use another checkpoint"
            )
    return network


def _patch_size(description: dict[str, Any]) -> tuple[int, ...]:
    size = tuple(int(length) for length in description["patch_size"])
    if len(size) not in (2, 3) or min(size) < 1:
        raise DataError(f"patch_size {size} must be (Y, X) or (Z, Y, X), each at least 1")
    return size


def _context_slices(description: dict[str, Any]) -> int:
    slices = int(description["context_slices"])
    if slices < 0 or (slices and len(description["patch_size"]) == 3):
        raise DataError(f"context_slices {slices} must be 0 or more, and 0 in 3D")
    return slices


def _intensities(description: dict[str, Any]) -> tuple[ChannelFingerprint, ...] | None:
    found = description.get("intensities")
    if found is None:
        return None
    channels = tuple(ChannelFingerprint.from_dict(channel) for channel in found)
    if len(channels) != len(description["channels"]):
        raise DataError(f"intensities of {len(channels)} channels, expected {len(description['channels'])}")
    return channels


def _spacing_range(description: dict[str, Any]) -> dict[str, tuple[float, ...]] | None:
    found = description.get("training_spacing_mm")
    if found is None:
        return None
    ranges = {name: tuple(float(size) for size in found[name]) for name in ("min", "median", "max")}
    if any(len(sizes) != 3 or min(sizes) <= 0 for sizes in ranges.values()):
        raise DataError(f"training_spacing_mm {found} must be three lengths above zero each")
    return ranges


def _precision(description: dict[str, Any]) -> Precision | None:
    found = description.get("precision")
    if found not in (None, *get_args(Precision)):
        raise DataError(f"precision {found!r} is none of {', '.join(get_args(Precision))}")
    return found


def _regions(description: dict[str, Any]) -> dict[str, tuple[int, ...]] | None:
    found = description.get("regions")
    if not found:
        return None
    regions = {str(name): tuple(int(value) for value in values) for name, values in found}
    names = [*_labels(description)]
    if sorted(regions) != sorted(names[1:]) or description["model"]["out_channels"] != len(regions):
        raise DataError(f"regions {found} do not fit the labels {names}")
    return regions


def _mirror_axes(description: dict[str, Any]) -> tuple[int, ...]:
    dims = len(description["patch_size"])
    axes = tuple(int(axis) for axis in description.get("mirror_axes", range(dims)))
    if any(not 0 <= axis < dims for axis in axes):
        raise DataError(f"mirror_axes {axes} must be axes of the {dims} of a patch")
    return axes


def _averaging(description: dict[str, Any]) -> Literal["probabilities", "logits"]:
    found = description.get("averaging", "probabilities")
    if found not in ("probabilities", "logits"):
        raise DataError(f"averaging {found!r} is neither 'probabilities' nor 'logits'")
    return "logits" if found == "logits" else "probabilities"


def _labels(description: dict[str, Any]) -> dict[str, int]:
    values = {str(name): int(value) for name, value in description["label_values"].items()}
    ordered = dict(sorted(values.items(), key=lambda entry: entry[1]))
    if not ordered or max(ordered.values()) > MAX_LABEL_VALUE or min(ordered.values()) < 0:
        raise DataError(f"mask values {ordered} do not fit uint16, the widest type of predicted masks")
    return ordered
