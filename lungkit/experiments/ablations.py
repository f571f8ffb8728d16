"""Experiments of many arms as data: an arm is a name and the options in which it differs. A new arm is one line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lungkit.errors import UsageError
from lungkit.experiments.arms import PLAIN, Arm
from lungkit.training.config_io import named_options, parse_arguments
from lungkit.training.safe_yaml import load_yaml

_OF_THE_EXPERIMENT = ("data.fold", "seed", "runs", "name")

ABLATIONS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    # The paper's two changes, told apart, and what lungkit has by default beside them.
    "paper": {
        "U-Net + CE": {"model.name": "unet", "loss.dice_weight": 0, **PLAIN},
        "U-Net + Dice + CE": {"model.name": "unet", **PLAIN},
        "Attention U-Net + CE": {"model.name": "attention-unet", "loss.dice_weight": 0, **PLAIN},
        "Attention U-Net + Dice + CE": {"model.name": "attention-unet", **PLAIN},
        "default": {"model.name": "attention-unet"},
    },
    # One change at a time to the default, then changes that belong together.
    "recipe": {
        "default": {},
        "no deep supervision": {"model.deep_supervision": False},
        "no input pyramid": {"model.input_pyramid": False},
        "neither pyramid nor deep supervision": PLAIN,
        "residual blocks": {"model.residual": True},
        "scSE decoder": {"model.decoder_scse": True},
        "gates driven by the patch": {"model.gate_signal": "global"},
        "gates driven by both": {"model.gate_signal": "both"},
        "four heads": {"model.gate_heads": 4, "model.gate_combine": "concat"},
        "gate output norm": {"model.gate_output_norm": "instance"},
        "finest skip not gated": {"model.gate_finest": False},
        "group norm": {"model.norm": "group"},
        "no slices on either side": {"data.context_slices": 0},
        "one slice on either side": {"data.context_slices": 1},
        "two slices on either side": {"data.context_slices": 2},
        "twice the features": {"model.features": [32, 64, 128, 256]},
        "five levels": {"model.features": [16, 32, 64, 128, 256]},
        "Dice alone": {"loss.ce_weight": 0},
        "Dice over the batch": {"loss.batch_dice": True},
        "focal Tversky": {"loss.overlap": "focal_tversky", "loss.ce_weight": 0},
        "focal Tversky + CE": {"loss.overlap": "focal_tversky"},
        "hardest tenth of the background": {"loss.hard_negatives": 0.1},
        "Dice of each lesion": {"loss.lesion_weight": 0.5},
        "two thirds of patches with foreground": {"data.foreground_fraction": 0.67},
        "half the learning rate": {"optimiser.learning_rate": 1e-3},
        "twice the learning rate": {"optimiser.learning_rate": 4e-3},
        "cosine schedule": {"optimiser.schedule": "cosine"},
        "longer average of the weights": {"optimiser.ema_decay": 0.999},
        "no augmentation": {"augment.enabled": False},
    },
}
"""Built-in experiments: arm -> what it changes. The first arm is what the others are compared with."""


def ablation_arms(ablation: str, options: Sequence[str] = ()) -> list[Arm]:
    """The arms of a built-in ablation or of a YAML file of arms.

    The file names the arms below ``arms``, each with the options that it changes, dotted or in groups; ``options`` hold
    for all of them::

        options: {epochs: 30}
        arms:
          default: {}
          residual: {model.residual: true}
          small patches: {data: {patch_size: [64, 64]}}

    Args:
        ablation: a name in :data:`ABLATIONS`, or the path of a file.
        options: options of ``lungkit-train`` that hold for all arms.

    Raises:
        UsageError: neither is there, the file has another form, or an option is unknown or belongs to another place.

    Example:
        >>> [arm.config.model.name for arm in ablation_arms("paper", ["--epochs", "3"])]
        ['unet', 'unet', 'attention-unet', 'attention-unet', 'attention-unet']
    """
    if ablation in ABLATIONS:
        return arms_from_overrides(ABLATIONS[ablation], options)
    if not Path(ablation).is_file():
        raise UsageError(
            f"ablation {ablation!r} is neither a file nor one of {', '.join(ABLATIONS)}; give one of these"
        )
    return _read_arms(ablation, options)


def arms_from_overrides(
    arms: Mapping[str, Mapping[str, Any]],
    options: Sequence[str] = (),
    common: Mapping[str, Any] | None = None,
) -> list[Arm]:
    """Arms from the options in which each differs, over ``common`` and ``options``, which they share.

    Raises:
        UsageError: an option that the arms share and differ in, or that the experiment sets itself.
    """
    changed = {name for overrides in arms.values() for name in named_options([], overrides)}
    for name in _OF_THE_EXPERIMENT:
        if name in changed:
            raise UsageError(f"{name} is no option of an arm; say --folds, --seeds or --output")
    for name in named_options(options):
        if name in changed:
            raise UsageError(
                f"--{name} is what the arms differ in; leave it out, or name your own arms with --arm"
            )
    return [
        Arm(name, parse_arguments(options, overrides={**(common or {}), **overrides}))
        for name, overrides in arms.items()
    ]


def _read_arms(path: str | os.PathLike[str], options: Sequence[str]) -> list[Arm]:
    try:
        content = load_yaml(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    arms = content.get("arms") if isinstance(content, dict) else None
    if not isinstance(arms, dict) or not arms or set(content) - {"arms", "options"}:
        raise UsageError(f"{path}: expected arms, each with its options, and at most options beside them")
    common = content.get("options") or {}
    overrides = {str(name): changes or {} for name, changes in arms.items()}
    for name, changes in {"options": common, **overrides}.items():
        if not isinstance(changes, dict):
            raise UsageError(f"{path}: {name} is {changes!r:.80}; give options and their values, or {{}}")
    try:
        return arms_from_overrides(overrides, options, common)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
