"""From a configuration and a dataset to what a run needs: split, preprocessing, patch size, sizes of everything."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lungkit.data import (
    CachedCase,
    CaseCache,
    Dataset,
    Fingerprint,
    NanPolicy,
    Preprocessing,
    Split,
    fingerprint_dataset,
    make_or_load_splits,
    open_dataset,
    plan_preprocessing,
    write_phantom_dataset,
)
from lungkit.data.cache_folder import default_cache_folder
from lungkit.data.readers import ReaderCodes, reader_codes
from lungkit.errors import CheckpointError, DataError, UsageError, shorten
from lungkit.inference import TrainedModel
from lungkit.nn import build_model
from lungkit.training.config import GATE_OPTIONS, MODEL_NAMES, ModelConfig, TrainConfig
from lungkit.training.initialisation import (
    LEARNING_RATE_FACTOR,
    absolute_or_name,
    initial_network,
    initial_preprocessing,
    with_initial,
)

_PHANTOM_SHAPE = (1, 128, 128)
_PHANTOM_SEED = 0
_FOLDS_SEED = 0
_MAX_PATCH = {2: (256, 256), 3: (64, 128, 128)}
_CONTEXT_SLICES = 3
_FLAT_STACK = 16  # a median of fewer slices leaves a 3D network little to pool over

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What the fingerprint decided where the configuration left it open."""

    dims: int
    patch_size: tuple[int, ...]
    context_slices: int
    """Slices on either side that a 2D network sees as channels."""
    model: dict[str, Any]
    """Arguments of :func:`lungkit.nn.build_model`."""
    epochs: int | None
    """None: as many as there is time for."""
    steps_per_epoch: int
    batch_size: int
    learning_rate: float
    max_minutes: float | None = None

    @property
    def total_steps(self) -> int | None:
        """Optimiser steps of the whole run; None where time alone ends it."""
        return None if self.epochs is None else self.epochs * self.steps_per_epoch

    @property
    def budget(self) -> str:
        """How long the run trains, for people."""
        epochs = f"epochs of {self.steps_per_epoch} steps"
        if self.max_minutes is None:
            return f"{self.epochs} {epochs}"
        most = "" if self.epochs is None else f"at most {self.epochs} "
        return f"{self.max_minutes:g} minutes, {most}{epochs}"

    def summary(self) -> str:
        """Some lines for people."""
        return (
            f"{self.dims}D{f' with {self.context_slices} slices on either side' if self.context_slices else ''}, "
            f"patch {' x '.join(map(str, self.patch_size))}, batch {self.batch_size}, "
            f"{self.budget}, learning rate {self.learning_rate:g}\n"
            f"{self.model['name']}, features {self.model['features']}, strides {self.model['strides']}"
        )


@dataclass(frozen=True)
class Prepared:
    """A dataset ready to train on."""

    dataset: Dataset
    split: Split
    """The fold that is trained."""
    splits: tuple[Split, ...]
    """All folds; of a run that is continued only its own."""
    fingerprint: Fingerprint
    preprocessing: Preprocessing
    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        """What the run folder's dataset.json holds."""
        return {
            "name": self.dataset.name,
            "layout": self.dataset.layout,
            "labels": {name: index for index, name in enumerate(self.dataset.class_names)},
            "channels": list(self.dataset.channel_names),
            "split": asdict(self.split),
            "fingerprint": self.fingerprint.to_dict(),
            "preprocessing": self.preprocessing.to_dict(),
            "plan": asdict(self.plan),
        }


def cache_folder(config: TrainConfig) -> Path:
    """Folder of preprocessed cases: ``data.cache``, or :func:`~lungkit.data.cache_folder.default_cache_folder`.

    Raises:
        UsageError: it cannot be made.
    """
    if config.data.cache is None:
        return default_cache_folder()
    folder = Path(os.path.expanduser(config.data.cache))  # noqa: PTH111 - leaves ~ alone where there is no home
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"data.cache: {folder} cannot be made ({error.strerror}); name another folder"
        ) from error
    return folder


def prepare(
    config: TrainConfig,
    *,
    known: dict[str, Any] | None = None,
    initial: TrainedModel | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Open the dataset, split it, measure its training cases and plan the run.

    Args:
        config: the configuration.
        known: ``dataset.json`` of a run to continue: split, fingerprint, preprocessing and plan are taken from it, but
            for the epochs, which may have become more.
        initial: the model that the run begins with, of :func:`~lungkit.training.initialisation.load_initial`.
        progress: called with what is being done, cases done, cases in all.

    Raises:
        UsageError: an option does not fit the dataset.
        DataError: a file cannot be used, or the dataset is not the one the run was started on.
        CheckpointError: ``known`` is damaged.
    """
    if known is not None:
        return _restore(_open(config), known, config.epochs)
    if initial is not None:
        config = with_initial(config, initial)
    labelled, splits = open_folds(config)
    split = splits[config.data.fold]

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("reading scans", done, total)

    fingerprint = fingerprint_dataset(
        labelled,
        split.train,
        max_voxels=config.data.max_voxels,
        nan_policy=NanPolicy(config.data.nan),
        progress=report,
    )
    if not any(fraction > 0 for fraction in fingerprint.foreground_fractions):
        raise DataError(
            f"{labelled.root}: no training case of fold {config.data.fold} has foreground; "
            "choose another fold with --data.fold or check the masks"
        )
    plan = make_plan(config, fingerprint, labelled, initial=initial)
    preprocessing = plan_preprocessing(
        fingerprint, window=config.data.window, spacing_mm=_spacing_option(config, plan.dims)
    )
    if initial is not None and config.data.window == "auto":
        preprocessing = initial_preprocessing(preprocessing, initial, fingerprint)
    check_resampled_sizes(fingerprint, preprocessing, max_voxels=config.data.max_voxels)
    return Prepared(labelled, split, tuple(splits), fingerprint, preprocessing, plan)


def check_resampled_sizes(fingerprint: Fingerprint, preprocessing: Preprocessing, *, max_voxels: int) -> None:
    """Refuse training scans that are too large after resampling, before the first of them is preprocessed.

    Raises:
        DataError: names the case, its spacing and the number of voxels.
    """
    target = preprocessing.target_spacing_mm
    if target is None:
        return
    cases = zip(fingerprint.case_ids, fingerprint.shapes, fingerprint.spacings_mm, strict=True)
    for case_id, shape, spacing in cases:
        voxels = math.prod(
            1 if size == 1 else size if wanted is None else max(1.0, size * own / wanted)
            for size, own, wanted in zip(shape, spacing, target, strict=True)
        )
        # Whole numbers of voxels differ a little from this; the cache counts them.
        if voxels > 1.01 * max_voxels:
            own, wanted = (" x ".join(f"{length:g}" for length in lengths) for lengths in (spacing, target))
            raise DataError(
                f"case {case_id}: {' x '.join(map(str, shape))} voxels of {own} mm (z, y, x) resampled to {wanted} mm "
                f"are {voxels:.3g} voxels, more than max_voxels = {max_voxels}; correct the spacing in the header, "
                "choose a coarser --data.spacing_mm or raise --max_voxels"
            )


def open_folds(config: TrainConfig) -> tuple[Dataset, list[Split]]:
    """The labelled cases of the dataset, and its folds.

    Folds that are made do not depend on the run's seed: runs of several seeds hold out the same cases, so that what
    differs between them is training alone.

    Raises:
        UsageError: ``data.fold`` is none of the folds, or they cannot be made as asked.
        DataError: the dataset cannot be used, or has no labels.
    """
    dataset = _open(config)
    labelled = replace(dataset, cases=tuple(case for case in dataset.cases if case.label is not None))
    if not labelled.cases:
        raise DataError(f"{dataset.root}: no case has a label; training needs labelled cases")
    codes_of_labels(config, labelled)  # said before any work
    if labelled.regions and config.choose_postprocessing:
        raise UsageError(
            f"choose_postprocessing tries thresholds of classes that exclude each other, but {labelled.root} declares "
            "regions; leave it out"
        )
    if labelled.regions and config.loss.lesion_weight:
        raise UsageError(
            f"loss.lesion_weight is {config.loss.lesion_weight}, but {labelled.root} declares regions; lesions that "
            "count by themselves need classes"
        )
    splits = make_or_load_splits(
        labelled, folds=config.data.folds, seed=_FOLDS_SEED, patient_pattern=config.data.patient_pattern
    )
    if config.data.fold >= len(splits):
        raise UsageError(f"data.fold is {config.data.fold}; the dataset has folds 0 to {len(splits) - 1}")
    return labelled, splits


def codes_of_labels(config: TrainConfig, dataset: Dataset) -> ReaderCodes | None:
    """How labels are coded that are what several readers say; None where they are the consensus.

    Raises:
        UsageError: the dataset has no labels of several readers, or nobody says how many there were.
    """
    if config.data.labels == "consensus":
        return None
    return reader_codes(dataset, readers=config.data.readers)


def prepare_cases(
    prepared: Prepared, config: TrainConfig, *, progress: Progress | None = None
) -> tuple[list[CachedCase], list[CachedCase]]:
    """Preprocess the training and validation cases into the cache, or open them from it.

    Raises:
        DataError: a scan cannot be used, or the run is 3D and is to be measured on a single slice.
    """
    cases = fill_cache(prepared, config, progress=progress)
    train, val = cases[: len(prepared.split.train)], cases[len(prepared.split.train) :]
    flat = [case.case_id for case in val if case.shape[0] == 1]
    if prepared.plan.dims == 3 and flat:
        raise DataError(
            f"{prepared.dataset.root}: fold {config.data.fold} is to be measured on {len(flat)} single slice"
            f"{'s' if len(flat) > 1 else ''} ({shorten(flat)}), but the run is 3D, whose models take volumes; train in "
            "2D (--data.dims 2) or leave these cases out"
        )
    return train, val


def fill_cache(
    prepared: Prepared,
    config: TrainConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
) -> list[CachedCase]:
    """Preprocess every ``world_size``-th case from number ``rank`` on, training cases first: a process's share."""
    cache = CaseCache(
        cache_folder(config) / "cases",
        prepared.dataset,
        prepared.preprocessing,
        max_voxels=config.data.max_voxels,
        nan_policy=NanPolicy(config.data.nan),
        codes=codes_of_labels(config, prepared.dataset),
    )

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("preprocessing", done, total)

    names = [*prepared.split.train, *prepared.split.val]
    return cache.prepare_all(names[rank::world_size], progress=report)


def make_plan(
    config: TrainConfig, fingerprint: Fingerprint, dataset: Dataset, *, initial: TrainedModel | None = None
) -> Plan:
    """Decide what the configuration leaves open; the network is that of ``initial`` where there is one.

    2D where the median case is a slice or a stack of fewer than 16 slices, else 3D. The patch is the median size of
    a case up to 256 x 256 or 64 x 128 x 128; three quarters of a smaller slice, so that crops are shifted
    and the middle of a patch says little about the foreground.
    """
    shapes, spacings = np.asarray(fingerprint.shapes), np.asarray(fingerprint.spacings_mm)
    dims = config.data.dims or (
        len(config.data.patch_size)
        if config.data.patch_size
        else 2
        if np.median(shapes[:, 0]) < _FLAT_STACK
        else 3
    )
    # What the network will see: a spacing that was asked for, else about the median one.
    asked = _spacing_option(config, dims)
    if not isinstance(asked, str) and min(asked) <= 0:
        raise UsageError(f"data.spacing_mm is {tuple(asked)}; give three lengths above 0")
    spacing = np.median(spacings, axis=0) if isinstance(asked, str) else np.asarray(asked, dtype=float)
    factors = np.where((shapes > 1) & (asked != "native"), spacings / spacing, 1.0)
    shape = np.maximum(1, np.round(np.median(shapes * factors, axis=0)))
    patch = config.data.patch_size or _default_patch(shape[3 - dims :], dims)
    context = config.data.context_slices
    if context is None:
        context = min(_CONTEXT_SLICES, int(shape[0]) - 1) if dims == 2 else 0
    if context and dims == 3:
        raise UsageError(
            f"data.context_slices is {context}, but the run is 3D, where patches have depth; leave it out"
        )
    channels = len(dataset.channel_names) * (2 * context + 1)
    if initial is None:
        features = config.model.features or (16, 32, 64, 128)
        strides = config.model.strides or _strides(len(features) - 1, spacing[3 - dims :])
        model = {
            "dims": dims,
            "in_channels": channels,
            "out_channels": dataset.outputs,
            **_model_options(config.model, tuple(features), strides),
        }
    else:
        model = initial_network(config.model, initial, channels=channels, outputs=dataset.outputs)
    phantom = config.data.root is None
    default_rate = (2e-3 if config.optimiser.name == "adamw" else 1e-2) * (
        1.0 if initial is None else LEARNING_RATE_FACTOR
    )
    defaults = (20, 50, 8) if phantom else (30, 500, 8) if dims == 2 else (50, 50, 2)
    epochs, steps, batch = (
        given or default
        for given, default in zip(
            (config.epochs, config.steps_per_epoch, config.batch_size), defaults, strict=True
        )
    )
    return Plan(
        dims=dims,
        patch_size=tuple(patch),
        context_slices=context,
        model=model,
        epochs=None if config.max_minutes is not None and config.epochs is None else epochs,
        steps_per_epoch=steps,
        batch_size=batch,
        learning_rate=config.optimiser.learning_rate or default_rate,
        max_minutes=config.max_minutes,
    )


def resolve(config: TrainConfig, plan: Plan) -> TrainConfig:
    """``config`` with what the plan decided written out, and paths that hold in any working directory."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else str(Path(path).expanduser().resolve())

    return replace(
        config,
        data=replace(
            config.data,
            root=absolute(config.data.root),
            cache=absolute(config.data.cache),
            dims=plan.dims,  # type: ignore[arg-type]
            patch_size=plan.patch_size,
            context_slices=plan.context_slices,
        ),
        model=_planned_model(config.model, plan.model),
        init=replace(config.init, model=absolute_or_name(config.init.model)),
        optimiser=replace(config.optimiser, learning_rate=plan.learning_rate),
        epochs=plan.epochs,
        steps_per_epoch=plan.steps_per_epoch,
        batch_size=plan.batch_size,
        validate_every=config.validate_every or (1 if plan.max_minutes is None else None),
    )


def _planned_model(config: ModelConfig, planned: dict[str, Any]) -> ModelConfig:
    """``config`` as the network is that was planned, as far as its options can say it."""
    if planned["name"] not in MODEL_NAMES:
        return config
    known = {name: planned[name] for name in vars(config) if name in planned}
    known["features"] = tuple(known["features"])
    known["strides"] = tuple(step if isinstance(step, int) else tuple(step) for step in known["strides"])
    sizes = np.unique(known["kernel_size"]).tolist()
    # Kernels of several sizes come from a model that the run began with; the plan alone holds them.
    known["kernel_size"] = sizes[0] if len(sizes) == 1 else config.kernel_size
    return replace(config, **known)


def build_network(plan: Plan, seed: int) -> nn.Module:
    """The network of a plan, with weights drawn from ``seed``."""
    return build_model(**plan.model, seed=seed)


def _open(config: TrainConfig) -> Dataset:
    if config.data.root is None:
        labels = config.data.phantom_labels
        kind = "" if labels == "tumour" else f"-{labels}"
        root = cache_folder(config) / f"phantom-{config.data.phantom_cases}-{_PHANTOM_SEED}{kind}"
        write_phantom_dataset(
            root,
            cases=config.data.phantom_cases,
            shape=_PHANTOM_SHAPE,
            dims=2,
            seed=_PHANTOM_SEED,
            labels=labels,
        )
        return open_dataset(root)
    return open_dataset(Path(config.data.root).expanduser(), layout=config.data.layout)


def _restore(dataset: Dataset, known: dict[str, Any], epochs: int | None) -> Prepared:
    try:
        split = Split(tuple(known["split"]["train"]), tuple(known["split"]["val"]))
        plan = Plan(**{**known["plan"], "patch_size": tuple(known["plan"]["patch_size"]), "epochs": epochs})
        fingerprint = Fingerprint.from_dict(known["fingerprint"])
        preprocessing = Preprocessing.from_dict(known["preprocessing"])
        labels = list(known["labels"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a DataError is a ValueError
        raise CheckpointError(
            f"the run's dataset.json cannot be restored ({error!r}); start a new run"
        ) from error
    present = {case.case_id for case in dataset.cases}
    missing = sorted({*split.train, *split.val} - present)
    if missing or labels != list(dataset.class_names):
        raise DataError(
            f"{dataset.root} is not the dataset that the run was started on: "
            + (f"case {missing[0]} is missing" if missing else f"its labels are {list(dataset.class_names)}")
        )
    return Prepared(dataset, split, (split,), fingerprint, preprocessing, plan)


def _spacing_option(config: TrainConfig, dims: int) -> str | tuple[float, float, float]:
    # A 2D network sees the pixels of one slice: resampling would only blur slices into each other.
    return "native" if dims == 2 and config.data.spacing_mm == "auto" else config.data.spacing_mm


def _default_patch(shape: np.ndarray, dims: int) -> tuple[int, ...]:
    patch = []
    for extent, largest in zip(shape, _MAX_PATCH[dims], strict=True):
        size = min(int(extent), largest)
        if dims == 2 and extent <= largest:
            size = int(extent) * 3 // 4
        # A multiple of 8 fits three strides of two without padding.
        patch.append(max(8, size // 8 * 8) if extent >= 8 else int(extent))
    return tuple(patch)


def _strides(steps: int, spacing: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Strides of two, but along an axis only once its voxels are no coarser than twice the finest."""
    current = np.asarray(spacing, dtype=float)
    strides = []
    for _ in range(steps):
        stride = np.where(current < 2 * current.min(), 2, 1)
        current = current * stride
        strides.append(tuple(int(s) for s in stride))
    return tuple(strides)


def _model_options(model: ModelConfig, features: tuple[int, ...], strides: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "name": model.name,
        "features": features,
        "strides": strides,
        "kernel_size": model.kernel_size,
        "norm": model.norm,
        "residual": model.residual,
        "deep_supervision": model.deep_supervision is not False,
        "dropout": model.dropout,
        "input_pyramid": model.input_pyramid,
        "decoder_scse": model.decoder_scse,
    }
    if model.name == "attention-unet":
        options |= {option: getattr(model, option) for option in (*GATE_OPTIONS, "gate")}
    return options
