"""Fine-tuning: a run that begins with the weights of a trained model, whatever classes and channels that one had."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lungkit.data import Dataset, Fingerprint, Preprocessing
from lungkit.errors import UsageError, shorten
from lungkit.inference import TrainedModel
from lungkit.inference.registry import model_folder
from lungkit.inference.trained_model import FOLDS
from lungkit.nn import build_model
from lungkit.training.config import InitConfig, ModelConfig, TrainConfig

LEARNING_RATE_FACTOR = 0.1
"""Of the default learning rate where weights are trained already; nnU-Net's authors fine-tune with a tenth too."""

_FREE = ("dropout", "deep_supervision", "gate")  # options of a network that its weights do not depend on
_FROM_DATA = ("in_channels", "out_channels")


def load_initial(config: InitConfig) -> TrainedModel | None:
    """The model that a run begins with: a run folder, a checkpoint's folder or file, or a model by its name.

    Raises:
        UsageError: no such file, folder or model, or a folder of several folds.
        CheckpointError: it is none, or damaged.
    """
    if config.model is None:
        return None
    folder = model_folder(os.path.expanduser(config.model))  # noqa: PTH111 - leaves ~ alone where there is no home
    if (folder / FOLDS).is_file():
        raise UsageError(f"init.model: {folder} holds the runs of several folds; name one of them")
    return TrainedModel.load(folder)


def with_initial(config: TrainConfig, initial: TrainedModel, *, named: Collection[str] = ()) -> TrainConfig:
    """``config`` with what the weights of ``initial`` decide: dimensions, slices on either side, and spacing in 3D.

    Args:
        config: of the run.
        initial: the model that it begins with.
        named: options that were asked for by name, though with their default value.

    Raises:
        UsageError: an option asks for another network than that of ``initial``.
    """
    own = {"data.dims": initial.dims, "data.context_slices": initial.context_slices}
    asked = {"data.dims": config.data.dims, "data.context_slices": config.data.context_slices}
    for name, value in own.items():
        if asked[name] not in (None, value):
            raise UsageError(
                f"{name} is {asked[name]}, but {initial.path} was trained with {value}; leave it out"
            )
    if config.data.patch_size is not None and len(config.data.patch_size) != initial.dims:
        raise UsageError(
            f"data.patch_size {tuple(config.data.patch_size)} has {len(config.data.patch_size)} axes, but "
            f"{initial.path} is of {initial.dims}D; give {initial.dims}"
        )
    _check_network_options(config.model, initial, named)
    spacing = initial.preprocessing.target_spacing_mm
    data = replace(config.data, dims=initial.dims, context_slices=initial.context_slices)  # type: ignore[arg-type]
    if data.spacing_mm == "auto" and spacing is not None:
        depth, *plane = spacing
        if depth is not None:  # a 2D model of nnU-Net leaves it to each scan
            data = replace(data, spacing_mm=(depth, plane[0], plane[1]))
    return replace(config, data=data)


def initial_network(
    model: ModelConfig, initial: TrainedModel, *, channels: int, outputs: int
) -> dict[str, Any]:
    """Options of the network of ``initial`` for data of other channels and classes, as a plan holds them."""
    options: dict[str, Any] = {**initial.network.config}  # type: ignore[dict-item]
    options.pop("seed", None)
    for name in _FREE:
        if name in options and getattr(model, name) != getattr(ModelConfig, name):
            options[name] = getattr(model, name)
    return {**options, "in_channels": channels, "out_channels": outputs}


def initial_preprocessing(
    planned: Preprocessing, initial: TrainedModel, fingerprint: Fingerprint
) -> Preprocessing:
    """``planned`` with the normalisation that ``initial`` was trained with, of every channel in the same units."""
    sources = _channel_sources([channel.name for channel in fingerprint.channels], initial)
    before = initial.preprocessing.channels
    channels = [
        own if source is None or before[source].units != own.units else before[source]
        for own, source in zip(planned.channels, sources, strict=True)
    ]
    return replace(planned, channels=tuple(channels))


@dataclass(frozen=True)
class Copied:
    """What :func:`copy_weights` did: numbers copied, of how many, and in words what is new and what was left."""

    numbers: int
    of: int
    new: tuple[str, ...]
    left: tuple[str, ...]
    new_names: frozenset[str]
    """Entries of the network's state that hold new numbers."""

    def __str__(self) -> str:
        text = f"{self.numbers:,} of {self.of:,} numbers copied"
        text += "; new: " + (", ".join(self.new) if self.new else "nothing")
        return text + (f"; left out: {', '.join(self.left)}" if self.left else "")


@torch.no_grad()
def copy_weights(network: nn.Module, initial: TrainedModel, dataset: Dataset) -> Copied:
    """Copy into ``network`` what the weights of ``initial`` have for it.

    Input weights go by the names of channels, by their order where no name is known; those of the logits by the names
    of classes (or regions), and a single foreground class is taken for another whatever they are called. What has no
    counterpart keeps its random weights.

    Raises:
        UsageError: the networks differ in more than their channels and classes.
    """
    options: dict[str, Any] = {**network.config}  # type: ignore[dict-item]
    inputs, outputs = _differing(options, "in_channels"), _differing(options, "out_channels")
    columns = _channel_sources(dataset.channel_names, initial)
    slices = range(options["in_channels"] // len(columns))
    rows = _output_rows(dataset, initial)
    given, new_names, copied = initial.network.state_dict(), set(), 0
    state = network.state_dict()
    for name, target in state.items():
        source = given.get(name)
        if source is None:
            new_names.add(name)
            continue
        if name in inputs:
            # Slices on either side come one after the other, each with all channels.
            pairs = [
                (index * len(columns) + own, index * len(initial.channels) + other)
                for index in slices
                for own, other in enumerate(columns)
                if other is not None
            ]
            copied += _copy(target, source, pairs, axis=1)
        elif name in outputs:
            copied += _copy(target, source, [(o, r) for o, r in enumerate(rows) if r is not None], axis=0)
        elif source.shape == target.shape:
            target.copy_(source)
            copied += target.numel()
        else:
            raise UsageError(
                f"init.model: {name} is {tuple(source.shape)} in {initial.path}, {tuple(target.shape)} here; the "
                "networks may differ in their channels and classes only"
            )
    new_channels = [
        name for name, source in zip(dataset.channel_names, columns, strict=True) if source is None
    ]
    new_classes = [name for name, row in zip(_outputs(dataset), rows, strict=True) if row is None]
    if new_channels:
        new_names |= inputs
    if new_classes:
        new_names |= outputs
    whole = {name.rpartition(".")[0] for name in state if name not in given}
    new = [f"input weights of channel {name}" for name in new_channels]
    new += [f"output weights of {name}" for name in new_classes] + sorted(whole)
    return Copied(
        numbers=copied,
        of=sum(value.numel() for value in state.values()),
        new=tuple(new),
        left=tuple(sorted({name.rpartition(".")[0] for name in given if name not in state})),
        new_names=frozenset(new_names),
    )


def freeze_encoder(network: nn.Module) -> list[nn.Module]:
    """Stop the training of the encoder; its modules, which stay in evaluation mode, so that their norms stay too.

    Raises:
        UsageError: the network has no part of that name.
    """
    frozen = [getattr(network, name, None) for name in ("encoder", "pyramid")]
    modules = [module for module in frozen if isinstance(module, nn.Module)]
    if frozen[0] not in modules:
        raise UsageError(f"init.freeze is 'encoder', but a {type(network).__name__} has no encoder to freeze")
    for module in modules:
        module.requires_grad_(False)
    return modules


def check_frozen_is_trained(copied: Copied) -> None:
    """Refuse to freeze weights that nothing has trained.

    Raises:
        UsageError: the encoder holds weights of new channels.
    """
    random = [name for name in sorted(copied.new_names) if name.startswith(("encoder.", "pyramid."))]
    if random:
        raise UsageError(
            f"init.freeze is 'encoder', but {shorten(random)} would keep random weights ({', '.join(copied.new)} new); "
            "leave it out"
        )


def absolute_or_name(model: str | None) -> str | None:
    """``init.model`` as any working directory understands it."""
    if model is None or not Path(model).expanduser().exists():
        return model
    return str(Path(model).expanduser().resolve())


def _check_network_options(model: ModelConfig, initial: TrainedModel, named: Collection[str]) -> None:
    """Options are those of ``initial`` where they are left at their default; others must say the same as it."""
    options: dict[str, Any] = {**initial.network.config}  # type: ignore[dict-item]
    for name, default in vars(ModelConfig()).items():
        value = getattr(model, name)
        there = options.get(name)
        if value is None or (value == default and f"model.{name}" not in named):
            continue
        if name in _FREE and name in options:
            continue
        if name == "name" or name not in options:
            same = value == there
        else:
            with torch.device("meta"):
                same = build_model(**{**options, name: value}).config == build_model(**options).config
        if not same:
            raise UsageError(
                f"model.{name} is {value!r}, but the network of {initial.path} has {there!r}; leave it out, as its "
                "weights fit no other"
            )


def _differing(options: dict[str, Any], count: str) -> set[str]:
    """Entries of a network's state whose shape depends on the option ``count``."""
    with torch.device("meta"):
        networks = [build_model(**{**options, count: options[count] + more}) for more in (0, 1)]
    one, other = (network.state_dict() for network in networks)
    return {name for name in one if one[name].shape != other[name].shape}


def _copy(target: Tensor, source: Tensor, pairs: Sequence[tuple[int, int]], *, axis: int) -> int:
    for to, of in pairs:
        target.select(axis, to).copy_(source.select(axis, of))
    return len(pairs) * (target.numel() // target.shape[axis])


def _outputs(dataset: Dataset) -> list[str]:
    return [*(dataset.regions or dataset.class_names)]


def _output_rows(dataset: Dataset, initial: TrainedModel) -> list[int | None]:
    """For every output of a new network that of the trained one, None where it has none."""
    own, others = _outputs(dataset), [*(initial.regions or initial.labels)]
    if bool(dataset.regions) != bool(initial.regions):
        return [None] * len(own)  # a sigmoid and a softmax ask for different logits
    if dataset.regions:
        return _class_sources(own, others)
    # The background comes first whatever it is called.
    return [0, *(None if row is None else row + 1 for row in _class_sources(own[1:], others[1:]))]


def _channel_sources(own: Sequence[str], initial: TrainedModel) -> list[int | None]:
    """For every channel that of the trained model, None where it has none; by position where no name is known."""
    found = _places(own, initial.channels)
    if any(place is not None for place in found):
        return found
    return [index if index < len(initial.channels) else None for index in range(len(own))]


def _class_sources(own: Sequence[str], others: Sequence[str]) -> list[int | None]:
    return [0] if len(own) == len(others) == 1 else _places(own, others)


def _places(own: Sequence[str], others: Sequence[str]) -> list[int | None]:
    return [[*others].index(name) if name in others else None for name in own]
