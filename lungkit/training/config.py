"""What a training run can be told, as plain dataclasses: the same names in YAML, on the command line and in Python."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lungkit.data import DEFAULT_MAX_VOXELS, AugmentConfig
from lungkit.data.preprocessing import WINDOW_PRESETS_HU
from lungkit.errors import UsageError

MODEL_NAMES = ("unet", "attention-unet")
GATE_OPTIONS = ("gate_finest", "gate_heads", "gate_combine", "gate_output_norm", "gate_signal")
"""Fields of :class:`ModelConfig` that networks without gates do not take."""


@dataclass
class DataConfig:
    """Where the scans are and how patches are drawn from them; None is decided by the dataset's fingerprint.

    Args:
        root: dataset folder (nnU-Net raw, Medical Decathlon, or images/ and masks/); None trains on the phantom.
        layout: "auto", "nnunet", "decathlon" or "folders".
        fold: which fold validates.
        folds: folds to make where the dataset brings no splits_final.json.
        patient_pattern: regular expression with one group that names the patient in a case id.
        labels: "consensus" trains on the masks of labelsTr; "readers" on the share of readers who marked a voxel, where
            the dataset has votes or masks of several (soft labels).
        readers: how many readers there were, for votes of a dataset whose dataset.json does not tell.
        dims: 2 for axial slices, 3 for volumes.
        patch_size: (Y, X) or (Z, Y, X) in voxels.
        context_slices: slices on either side that a 2D network sees as further channels; None is 3, or
            as many as the median case has besides one.
        window: "auto", "lung", "mediastinum", "full", "percentiles", or low and high.
        spacing_mm: "auto", "native", or (z, y, x) to resample to.
        foreground_fraction: share of patches that are sure to hold foreground.
        background_fraction: share of the other patches that hold no foreground where the case allows it, so that a
            network learns what merely looks like it.
        cache: folder of preprocessed cases; None is lungkit's folder in the user's cache directory.
        max_voxels: refuse larger scans.
        nan: voxels that are NaN or infinite: "refuse" the scan, or replace them by its "minimum".
        phantom_cases: cases of the built-in phantom.
        phantom_labels: what its masks hold: the "tumour", the "organs" lung and heart too, or the organs as "regions",
            the tumours being a part of the lung.
    """

    root: str | None = None
    layout: str = "auto"
    fold: int = 0
    folds: int = 5
    patient_pattern: str | None = None
    labels: Literal["consensus", "readers"] = "consensus"
    readers: int | None = None
    dims: Literal[2, 3] | None = None
    patch_size: tuple[int, ...] | None = None
    context_slices: int | None = None
    window: str | tuple[float, float] = "auto"
    spacing_mm: str | tuple[float, float, float] = "auto"
    foreground_fraction: float = 0.33
    background_fraction: float = 0.0
    cache: str | None = None
    max_voxels: int = DEFAULT_MAX_VOXELS
    nan: Literal["refuse", "minimum"] = "refuse"
    phantom_cases: int = 250
    phantom_labels: Literal["tumour", "organs", "regions"] = "tumour"


@dataclass
class ModelConfig:
    """The network, see :class:`lungkit.nn.UNet` and :class:`lungkit.nn.AttentionUNet`.

    Args:
        name: "unet" or "attention-unet".
        features: channels per level; None is decided by the fingerprint.
        strides: one a level after the first, each for all axes or one an axis; None follows the voxel spacing.
        kernel_size: for all levels.
        norm: "instance", "batch", "group" or "none".
        residual: residual blocks.
        deep_supervision: train on the logits of every decoder level; None does, with init.model where that one did.
        dropout: probability of dropping a channel.
        input_pyramid: every encoder level sees the image too, pooled to its grid (Abraham and Khan, 2019).
        decoder_scse: recalibrate decoder features by channel and voxel (Roy et al., 2018).
        gate_finest: gate the finest skip connection too.
        gate_heads: attention maps per gate.
        gate_combine: how several heads become one, "mean" or "concat".
        gate_output_norm: "batch" or "instance" adds the output projection of the paper's grid gate; None does not.
        gate_signal: what drives a gate: "local" the coarser decoder level, "global" its mean over the whole patch, or
            "both".
        gate: "auto" uses the fused attention gate, "reference" plain PyTorch.
    """

    name: str = "attention-unet"
    features: tuple[int, ...] | None = None
    strides: tuple[int | tuple[int, ...], ...] | None = None
    kernel_size: int = 3
    norm: Literal["instance", "batch", "group", "none"] = "instance"
    residual: bool = False
    deep_supervision: bool | None = None
    dropout: float = 0.0
    input_pyramid: bool = True
    decoder_scse: bool = False
    gate_finest: bool = True
    gate_heads: int = 1
    gate_combine: Literal["mean", "concat"] = "mean"
    gate_output_norm: Literal["batch", "instance"] | None = None
    gate_signal: Literal["local", "global", "both"] = "local"
    gate: Literal["auto", "reference"] = "auto"


@dataclass
class LossConfig:
    """dice_weight * overlap + ce_weight * cross-entropy + lesion_weight * Dice of each lesion; 0 leaves a term out.

    Args:
        dice_weight: weight of the overlap term.
        ce_weight: weight of the cross-entropy.
        batch_dice: sum over the batch before the division, not each image by itself.
        include_background: count the background class in the overlap term.
        overlap: "dice", or "focal_tversky" (Abraham and Khan, 2019; theirs has no cross-entropy), which with
            model.deep_supervision has the exponent on the side outputs only, and counts every output alike.
        tversky_beta: of focal_tversky: weight of missed voxels, false ones having what remains to 1.
        tversky_gamma: of focal_tversky: the term of a class is its Tversky loss to the power of 1 / gamma.
        hard_negatives: share of a batch's voxels, the hardest of the background, that the cross-entropy counts beside
            the foreground; 1 counts all.
        lesion_weight: of the mean Dice loss over the true lesions, each by itself (blob loss, Kofler et al., 2023, who
            give it half the weight of the other terms).
    """

    dice_weight: float = 1.0
    ce_weight: float = 1.0
    batch_dice: bool = False
    include_background: bool = False
    overlap: Literal["dice", "focal_tversky"] = "dice"
    tversky_beta: float = 0.7
    tversky_gamma: float = 4 / 3
    hard_negatives: float = 1.0
    lesion_weight: float = 0.0


@dataclass
class InitConfig:
    """What the weights are at the start.

    Args:
        model: begin with the weights of this model: a run folder, a checkpoint, or a name of ``lungkit-models list``;
            its network, dimensions, slices on either side, spacing and normalisation are taken over. None draws them.
        freeze: "encoder" trains the decoder alone; "none" everything.
    """

    model: str | None = None
    freeze: Literal["none", "encoder"] = "none"


@dataclass
class OptimiserConfig:
    """Optimiser and its schedule.

    Args:
        name: "adamw", or "sgd" with Nesterov momentum.
        learning_rate: at its peak; None is 2e-3 for AdamW and 1e-2 for SGD, a tenth of it with init.model.
        weight_decay: of weights; biases and norms have none.
        momentum: of SGD.
        schedule: "polynomial" (1 - t)^0.9, "cosine", or "constant".
        warmup_steps: over which the learning rate rises linearly.
        clip_norm: largest norm of the gradient; None does not clip.
        ema_decay: of the running average of the weights, which is what is validated and kept; 0 turns it off.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float | None = None
    weight_decay: float = 1e-2
    momentum: float = 0.99
    schedule: Literal["polynomial", "cosine", "constant"] = "polynomial"
    warmup_steps: int = 50
    clip_norm: float | None = 12.0
    ema_decay: float = 0.99


@dataclass
class EngineConfig:
    """Devices and number formats (Lightning Fabric).

    Args:
        accelerator: "auto", "cpu", "cuda", "mps" ..., or one device of several by its number, as "cuda:1".
        devices: processes per node.
        nodes: machines.
        strategy: of several processes: "ddp" (distributed data parallel) gives each the whole network, "fsdp" (fully
            sharded, FSDP2) a part of every weight, gradient and moment, for networks that do not fit one device.
        precision: "fp32", "bf16" or "fp16" (mixed); "auto" is bf16 where the device computes with it (GPUs from Ampere
            on, CPUs with AVX-512 BF16 or AMX), fp16 on older GPUs, else fp32.
        compile: torch.compile the network.
        channels_last: memory format of the network; None is channels-last, the faster one wherever it was measured.
        deterministic: only algorithms that give the same bits on every run.
        cuda_graph: record the training step (forward, loss, backward, clipping) as a CUDA graph and replay it: the same
            weights, without the time that the host takes to launch it. None does so on CUDA where it can be done: one
            process, bf16 or fp32, not compiled; true says so where it cannot; false never does.
    """

    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    channels_last: bool | None = None
    deterministic: bool = False
    cuda_graph: bool | None = None


@dataclass
class TrainConfig:
    """Everything about a run.

    Args:
        data, model, init, loss, optimiser, augment, engine: the parts.
        epochs: None is decided by the dataset, with ``max_minutes`` as many as there is time for.
        max_minutes: minutes from the first step to the last validation, after which the run ends; the schedule is then
            planned from the measured time of a step, so that the learning rate reaches its end when the time does.
            Validations and checkpoints count; reading and preprocessing scans before, and measuring the final
            model after, come on top. A resumed run has what is left. None sets no limit.
        steps_per_epoch: optimiser steps; None is decided by the dataset.
        batch_size: patches per process and step; None is decided by the dataset.
        validate_every: epochs between validations; the last epoch is always validated. None is 1, with ``max_minutes``
            as many as keep validations to about a tenth of the time, by what the first one takes.
        patience: validations without a better Dice after which training stops; None never stops early.
        choose_postprocessing: after the last epoch try the options of lungkit.inference.Postprocessing, one after the
            other, on the validation cases, keep what raises their mean Dice by over 0.002, and store it with the best
            weights; what that gives cases without a say in the choice is told too.
        choose_postprocessing_by: "dice", or "lesion_f1" against false pieces: keep what raises the mean lesion F1 by
            over 0.002 and costs no more Dice than that.
        save_validation: keep the masks that the run's best weights predict for the validation cases, in validation/ of
            the run's folder.
        report: at the end write report.html, for a browser, with curves, validation and the worst, median and best case
            in a viewer.
        seed: of weights, patches, augmentation and dropout.
        runs: folder of the runs.
        name: of the run folder; None is the dataset's name and the model's.
        logger: also log scalars, pictures, configuration and model to "tensorboard", "mlflow" or "wandb"; None to the
            run's folder alone.

    Raises:
        UsageError: a value out of its range.

    Example:
        >>> config = TrainConfig(model=ModelConfig(name="unet"), epochs=3)
        >>> config.model.name, config.loss.dice_weight
        ('unet', 1.0)
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    epochs: int | None = None
    max_minutes: float | None = None
    steps_per_epoch: int | None = None
    batch_size: int | None = None
    validate_every: int | None = None
    patience: int | None = None
    choose_postprocessing: bool = False
    choose_postprocessing_by: Literal["dice", "lesion_f1"] = "dice"
    save_validation: bool = False
    report: bool = True
    seed: int = 0
    runs: str = "runs"
    name: str | None = None
    logger: Literal["tensorboard", "mlflow", "wandb"] | None = None

    def validate(self) -> None:
        """Check what the types do not say.

        Raises:
            UsageError: names the option, its value and the range.
        """
        if self.model.name not in MODEL_NAMES:
            nearest = difflib.get_close_matches(self.model.name, MODEL_NAMES, n=1)
            raise UsageError(
                f"model.name is {self.model.name!r}; there are {', '.join(MODEL_NAMES)}"
                + (f" (did you mean {nearest[0]!r}?)" if nearest else "")
            )
        _at_least("data.fold", self.data.fold, 0)
        _at_least("data.folds", self.data.folds, 2)
        if self.data.context_slices is not None:
            _at_least("data.context_slices", self.data.context_slices, 0)
        _at_least("data.max_voxels", self.data.max_voxels, 1)
        _at_least("data.phantom_cases", self.data.phantom_cases, 10)
        if self.data.readers is not None:
            _at_least("data.readers", self.data.readers, 2)
        _share("data.foreground_fraction", self.data.foreground_fraction)
        _share("data.background_fraction", self.data.background_fraction)
        _share("model.dropout", self.model.dropout)
        _check_gates(self.model)
        if self.init.freeze != "none" and self.init.model is None:
            raise UsageError(
                f"init.freeze is {self.init.freeze!r}, but nothing was trained before; give --init MODEL too"
            )
        _share("optimiser.ema_decay", self.optimiser.ema_decay)
        _check_loss(self.loss, self.data)
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self.optimiser, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"optimiser.{name} is {value}; give a number above 0")
        for name in ("weight_decay", "momentum", "warmup_steps"):
            _at_least(f"optimiser.{name}", getattr(self.optimiser, name), 0)
        for name in ("epochs", "steps_per_epoch", "batch_size", "validate_every", "patience"):
            value = getattr(self, name)
            if value is not None:
                _at_least(name, value, 1)
        if self.max_minutes is not None and not 0 < self.max_minutes < math.inf:
            raise UsageError(f"max_minutes is {self.max_minutes}; give a number above 0")
        for name in ("devices", "nodes"):
            _at_least(f"engine.{name}", getattr(self.engine, name), 1)
        _check_sharding(self.engine)
        accelerator, colon, number = self.engine.accelerator.partition(":")
        if colon and (
            accelerator not in ("cuda", "gpu", "mps") or not number.isascii() or not number.isdigit()
        ):
            raise UsageError(
                f"engine.accelerator is {self.engine.accelerator!r}; give cpu, cuda, or cuda:1 and so on"
            )
        if colon and self.engine.devices > 1:
            raise UsageError(
                f"engine.accelerator {self.engine.accelerator!r} names one device, but engine.devices is "
                f"{self.engine.devices}; leave one of them out"
            )
        _at_least("seed", self.seed, 0)
        _check_patch(self.data.dims, self.data.patch_size)
        _check_word(
            "data.window", self.data.window, ("auto", "percentiles", *WINDOW_PRESETS_HU), "low and high"
        )
        _check_word("data.spacing_mm", self.data.spacing_mm, ("auto", "native"), "z, y and x in mm")
        if self.name is not None and (self.name in ("", ".", "..") or {"/", "\\", "\0"} & set(self.name)):
            raise UsageError(f"name is {self.name!r}; give the name of a folder, without a path")


def _check_sharding(engine: EngineConfig) -> None:
    if engine.strategy != "fsdp":
        return
    if engine.precision == "fp16":
        raise UsageError("engine.strategy is 'fsdp', which scales no fp16 losses; use bf16 or fp32")
    if engine.compile:
        raise UsageError("engine.strategy is 'fsdp', which is not compiled here; leave out engine.compile")


def _check_gates(model: ModelConfig) -> None:
    _at_least("model.gate_heads", model.gate_heads, 1)
    if model.name == "attention-unet":
        if model.gate_heads == 1 and model.gate_combine != "mean":
            raise UsageError(
                f"model.gate_combine is {model.gate_combine!r}, but one head has nothing to combine; "
                "raise model.gate_heads or leave it out"
            )
        return
    for option in GATE_OPTIONS:
        value = getattr(model, option)
        if value != getattr(ModelConfig, option):
            raise UsageError(
                f"model.{option} is {value!r}, but a {model.name} has no gates; leave it out or choose attention-unet"
            )


def _check_loss(loss: LossConfig, data: DataConfig) -> None:
    for name in ("dice_weight", "ce_weight", "lesion_weight"):
        _at_least(f"loss.{name}", getattr(loss, name), 0)
    if loss.dice_weight == 0 and loss.ce_weight == 0:
        raise UsageError("loss.dice_weight and loss.ce_weight are both 0; give one of them a weight")
    if not 0 < loss.hard_negatives <= 1:
        raise UsageError(
            f"loss.hard_negatives is {loss.hard_negatives}; give a share above 0, 1 counting all voxels"
        )
    if loss.hard_negatives < 1 and loss.ce_weight == 0:
        raise UsageError(
            f"loss.hard_negatives is {loss.hard_negatives}, but loss.ce_weight 0 leaves the cross-entropy out"
        )
    if not 0 <= loss.tversky_beta <= 1:
        raise UsageError(f"loss.tversky_beta is {loss.tversky_beta}; give a share from 0 to 1")
    if not 0 < loss.tversky_gamma < math.inf:
        raise UsageError(f"loss.tversky_gamma is {loss.tversky_gamma}; give a number above 0")
    if loss.overlap != "dice" and loss.dice_weight == 0:
        raise UsageError(
            f"loss.overlap is {loss.overlap!r}, but loss.dice_weight 0 leaves the overlap term out"
        )
    if data.labels == "readers" and loss.lesion_weight:
        raise UsageError(
            f"loss.lesion_weight is {loss.lesion_weight}, which needs one class a voxel; leave it out, or train on "
            "data.labels consensus"
        )


def _at_least(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise UsageError(f"{name} is {value}; give at least {least}")


def _share(name: str, value: float) -> None:
    if not 0 <= value < 1 and not (name.startswith("data.") and value == 1):
        raise UsageError(f"{name} is {value}; give a share from 0 to 1")


def _check_word(name: str, value: object, words: Sequence[str], numbers: str) -> None:
    if isinstance(value, str) and value not in words:
        raise UsageError(f"{name} is {value!r}; give {', '.join(words)}, or {numbers}")


def _check_patch(dims: int | None, patch_size: Sequence[int] | None) -> None:
    if patch_size is None:
        return
    if len(patch_size) not in (2, 3) or min(patch_size) < 1:
        raise UsageError(f"data.patch_size is {tuple(patch_size)}; give (Y, X) or (Z, Y, X), each at least 1")
    if dims is not None and len(patch_size) != dims:
        raise UsageError(
            f"data.patch_size {tuple(patch_size)} has {len(patch_size)} axes, data.dims is {dims}; make them agree"
        )
