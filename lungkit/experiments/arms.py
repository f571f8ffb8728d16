"""The arms of an experiment: what is compared with what."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lungkit.errors import UsageError
from lungkit.training.config import TrainConfig
from lungkit.training.config_io import named_options, parse_arguments

BASELINE, CANDIDATE = "U-Net + CE", "Attention U-Net + Dice + CE"

PLAIN: Mapping[str, Any] = {"model.input_pyramid": False, "model.deep_supervision": False}
"""The paper's networks have neither."""

_STEPS_PER_EPOCH = 100
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
    plain = [f"--{name}={str(value).lower()}" for name, value in PLAIN.items()]
    return [
        Arm(BASELINE, parse_arguments([*plain, *options, "--model.name", "unet", "--loss.dice_weight", "0"])),
        Arm(CANDIDATE, parse_arguments([*plain, *options, "--model.name", "attention-unet"])),
    ]


def parse_arm(words: Sequence[str], options: Sequence[str] = ()) -> Arm:
    """An arm from "NAME=FILE.yaml", or from a name and options "KEY=VALUE" in which it differs.

    ``options`` of ``lungkit-train`` go on top of a file, and below the arm's own options.

    Raises:
        UsageError: words of another form, an option of the arm that the arms share, or a file that is no configuration.

    Example:
        >>> parse_arm(["small", "model=unet", "model.features=[8, 16]"], ["--epochs", "3"]).config.model.features
        (8, 16)
    """
    first, *changes = words
    name, _, path = first.partition("=")
    if changes and "=" not in first and all("=" in change for change in changes):
        own = [f"--{change}" for change in changes]
        both = named_options(own) & named_options(options)
        if both:
            raise UsageError(f"--{min(both)} is what arm {first!r} changes; leave it out for all arms")
        return Arm(first, parse_arguments([*options, *own]))
    if changes or not name or not path:
        raise UsageError(f"arm {' '.join(words)!r} must be NAME=FILE.yaml, or NAME KEY=VALUE ...")
    return Arm(name, parse_arguments(["--config", path, *options]))


def with_budget(arms: Sequence[Arm], budget: str) -> list[Arm]:
    """The arms under one budget, "minutes=M" or "steps=N", in place of what they say themselves.

    Minutes are those of ``max_minutes``: every arm takes as many steps as it can, and its schedule ends with its time.
    Steps are N for every arm, in epochs of its ``steps_per_epoch`` (100 where it says nothing).

    Raises:
        UsageError: another form, or steps that are no whole number of epochs.

    Example:
        >>> [arm.config.max_minutes for arm in with_budget(paper_arms(), "minutes=20")]
        [20.0, 20.0]
        >>> with_budget(paper_arms(), "steps=1500")[0].config.epochs
        15
    """
    kind, _, text = budget.partition("=")
    try:
        amount = float(text)
    except ValueError:
        amount = math.nan
    if kind not in ("minutes", "steps") or not 0 < amount < math.inf or (kind == "steps" and amount % 1):
        raise UsageError(f"budget is {budget!r}; give minutes=M or steps=N, e.g. minutes=20")
    if kind == "minutes":
        return [replace(arm, config=replace(arm.config, max_minutes=amount, epochs=None)) for arm in arms]
    planned = []
    for arm in arms:
        steps = arm.config.steps_per_epoch or min(int(amount), _STEPS_PER_EPOCH)
        if amount % steps:
            raise UsageError(
                f"budget is {budget!r}, which is no whole number of epochs of {steps} steps ({arm.name}); "
                "give a multiple, or --steps_per_epoch"
            )
        config = replace(arm.config, max_minutes=None, epochs=int(amount) // steps, steps_per_epoch=steps)
        planned.append(replace(arm, config=config))
    return planned


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
    for option in ("epochs", "max_minutes", "steps_per_epoch", "batch_size", "patience"):
        values = [getattr(arm.config, option) for arm in arms]
        if len(set(values)) > 1:
            shown = ", ".join(f"{value} ({arm.name})" for value, arm in zip(values, arms, strict=True))
            different.append(f"{option}: {shown}")
    return different
