"""The arms of an experiment: what is compared with what."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lungkit.errors import UsageError
from lungkit.training.config import TrainConfig
from lungkit.training.config_io import parse_arguments

BASELINE, CANDIDATE = "U-Net + CE", "Attention U-Net + Dice + CE"

_DIFFERENCES = ("model", "model.name", "loss.dice_weight", "loss.ce_weight")

PAPER_FIGURES = {
    "dice": (0.908, 0.952),
    "iou": (0.877, 0.918),
    "ppv": (0.886, 0.952),
    "sensitivity": (0.947, 0.983),
}
"""What the paper reports on its own data: plain U-Net, and U-Net with attention gates and weighted Dice + CE."""


@dataclass(frozen=True)
class Arm:
    """One configuration under its name in tables and figures."""

    name: str
    config: TrainConfig

    @property
    def slug(self) -> str:
        """The name as a part of a file name.

        Example:
            >>> Arm("U-Net + CE", TrainConfig()).slug
            'u-net-ce'
        """
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def run_name(self, fold: int, seed: int) -> str:
        """Name of the folder of one run of this arm."""
        return f"{self.slug}-fold{fold}-seed{seed}"

    def run_config(self, runs: Path, fold: int, seed: int) -> TrainConfig:
        """The configuration of one run of this arm."""
        config = copy.deepcopy(self.config)
        config.data.fold, config.seed = fold, seed
        config.runs, config.name = str(runs), self.run_name(fold, seed)
        return config


def paper_arms(options: Sequence[str] = ()) -> list[Arm]:
    """The paper's experiment: a U-Net trained with cross-entropy, and an Attention U-Net with Dice + CE.

    Args:
        options: options of ``lungkit-train`` that both arms share.

    Raises:
        UsageError: an option that is unknown, or that the arms are to differ in.

    Example:
        >>> baseline, candidate = paper_arms(["--epochs", "3"])
        >>> baseline.config.model.name, baseline.config.loss.dice_weight, candidate.config.epochs
        ('unet', 0.0, 3)
    """
    for option in options:
        if option.partition("=")[0].lstrip("-") in _DIFFERENCES:
            raise UsageError(
                f"{option} is what the arms differ in; name your own arms with --arm NAME=FILE.yaml"
            )
    return [
        Arm(BASELINE, parse_arguments([*options, "--model.name", "unet", "--loss.dice_weight", "0"])),
        Arm(CANDIDATE, parse_arguments([*options, "--model.name", "attention-unet"])),
    ]


def parse_arm(text: str, options: Sequence[str] = ()) -> Arm:
    """An arm from "NAME=FILE.yaml", with ``options`` of ``lungkit-train`` on top of the file.

    Raises:
        UsageError: a text of another form, or a file that is no configuration.
    """
    name, _, path = text.partition("=")
    if not name or not path:
        raise UsageError(f"arm {text!r} must be NAME=FILE.yaml")
    return Arm(name, parse_arguments(["--config", path, *options]))


def check_arms(arms: Sequence[Arm]) -> None:
    """Refuse arms that cannot be told apart or do not share data.

    Raises:
        UsageError: fewer than two arms, two of one name, or different data.
    """
    if len(arms) < 2:
        raise UsageError(f"a comparison needs at least two arms, got {len(arms)}")
    if len({arm.slug for arm in arms}) < len(arms):
        raise UsageError(f"arms must have different names, got {', '.join(arm.name for arm in arms)}")
    for arm in arms[1:]:
        for option in ("root", "layout", "folds", "patient_pattern", "phantom_cases", "phantom_labels"):
            first, other = getattr(arms[0].config.data, option), getattr(arm.config.data, option)
            if first != other:
                raise UsageError(
                    f"arms must share their data, but data.{option} is {first} in {arms[0].name!r} "
                    f"and {other} in {arm.name!r}"
                )


def budget_differences(arms: Sequence[Arm]) -> list[str]:
    """Options of the budget in which arms differ, as sentences; a fair comparison has none.

    Example:
        >>> first, second = paper_arms()
        >>> second.config.epochs = 7
        >>> budget_differences([first, second])
        ['epochs: None (U-Net + CE), 7 (Attention U-Net + Dice + CE)']
    """
    different = []
    for option in ("epochs", "steps_per_epoch", "batch_size", "patience"):
        values = [getattr(arm.config, option) for arm in arms]
        if len(set(values)) > 1:
            shown = ", ".join(f"{value} ({arm.name})" for value, arm in zip(values, arms, strict=True))
            different.append(f"{option}: {shown}")
    return different
