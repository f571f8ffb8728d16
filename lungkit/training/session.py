"""What a run is made of between two steps: network, averaged weights, optimiser, position."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lungkit.checkpoint import Checkpoint, save_checkpoint
from lungkit.data import Augmenter, CachedCase, PatchSampler
from lungkit.data.dataset import IGNORE_INDEX
from lungkit.data.readers import CodedCase
from lungkit.errors import CheckpointError, DataError
from lungkit.inference import TrainedModel
from lungkit.inference.patches import TRAINED_TILING
from lungkit.metrics import CaseTable
from lungkit.nn.convolution import CHANNELS_LAST
from lungkit.training.batches import Batches, augment_generator, seed_of_step
from lungkit.training.captured_step import CapturedStep, cuda_recorder
from lungkit.training.config import OptimiserConfig, TrainConfig
from lungkit.training.config_io import EXTENSIBLE, MOVABLE, config_to_dict
from lungkit.training.criterion import make_criterion
from lungkit.training.initialisation import check_frozen_is_trained, copy_weights, freeze_encoder
from lungkit.training.lesion_numbers import number_lesions
from lungkit.training.planning import Prepared, build_network, codes_of_labels
from lungkit.training.run_folder import RunFolder
from lungkit.training.schedule import WeightAverage, learning_rate_factor, parameter_groups
from lungkit.training.sharding import ShardedWeightAverage, gathered, load_whole, shared_out_moments
from lungkit.training.time_budget import Pace
from lungkit.training.validation import validate

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_LOG = logging.getLogger("lungkit")


@dataclass
class Position:
    """Where a run is; saved with every checkpoint."""

    step: int = 0
    loss_count: int = 0
    """Steps in the current epoch."""
    best_dice: float | None = None
    """None until a validation case with foreground was measured."""
    best_epoch: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of metrics.csv, one an epoch."""
    waited: float = 0.0
    """Seconds of the current epoch that were spent waiting for patches."""
    computed: float = 0.0
    """Seconds of the current epoch that were spent in training steps."""
    pace: Pace = field(default_factory=Pace)
    """Of a run of limited time."""


class Session:
    """Network, averaged weights, optimiser and where the run is; one step, one validation, saving and restoring.

    Args:
        config: of the run.
        prepared: the dataset and the plan.
        fabric: started.
        cases: all cases that the run reads; a resumed run must find the same ones.
        initial: the model whose weights a new run begins with; None keeps the drawn ones.

    Raises:
        UsageError: the encoder is to be frozen, but has weights that nothing has trained.
    """

    def __init__(
        self,
        config: TrainConfig,
        prepared: Prepared,
        fabric: Fabric,
        cases: Sequence[CachedCase],
        *,
        initial: TrainedModel | None = None,
    ) -> None:
        self.config, self.prepared, self.fabric = config, prepared, fabric
        self.plan = prepared.plan
        # Entries of the cache are named after a hash of the scans and of what was done to them.
        names = "\n".join(case.directory.name for case in cases)
        self._data_digest = hashlib.sha256(names.encode()).hexdigest()
        self.position = Position()
        # On the device: reading it would make every step wait for the GPU.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=fabric.device)
        network = build_network(self.plan, config.seed)
        self._initialised_from: dict[str, Any] | None = None
        if initial is not None:
            copied = copy_weights(network, initial, prepared.dataset)
            if config.init.freeze == "encoder":
                check_frozen_is_trained(copied)
            _LOG.info("initialised from %s: %s", initial.name, copied)
            self._initialised_from = {**initial.to_dict(), "copied": copied.numbers, "new": list(copied.new)}
        self._frozen = freeze_encoder(network) if config.init.freeze == "encoder" else []
        self.network = network.to(fabric.device)
        self._is_sharded = config.engine.strategy == "fsdp" and fabric.world_size > 1
        self._whole: dict[str, Any] | None = None
        self.average: WeightAverage | ShardedWeightAverage
        if self._is_sharded:
            whole = copy.deepcopy(self.network)
            self.wrapped: Any = fabric.setup_module(self.network)
            self.average = ShardedWeightAverage(self.network, whole, decay=config.optimiser.ema_decay)
        else:
            if config.engine.channels_last:
                self.network = self.network.to(memory_format=CHANNELS_LAST[self.plan.dims])  # type: ignore[call-overload]
            self.average = WeightAverage(self.network, decay=config.optimiser.ema_decay)
        # fp16 scales the loss; without the scale a resumed run would skip steps to find it again.
        self._scaler = getattr(fabric.strategy.precision, "scaler", None)
        optimiser = make_optimiser(
            self.network,
            config.optimiser,
            self.plan.learning_rate,
            # Fabric clips no gradients that the optimiser itself has to bring back to scale.
            fused=fabric.device.type in ("cuda", "cpu") and self._scaler is None,
        )
        if self._is_sharded:
            self.optimiser: Any = fabric.setup_optimizers(optimiser)
        else:
            forward: Any = torch.compile(self.network) if config.engine.compile else self.network
            self.wrapped, self.optimiser = fabric.setup(forward, optimiser)
        self._codes = codes_of_labels(config, prepared.dataset)
        self.criterion = make_criterion(
            config.loss,
            self.plan,
            self._codes,
            prepared.dataset,
            synchronise=fabric.world_size > 1,
        ).to(fabric.device)
        recorder = cuda_recorder(config.engine, fabric)
        self._captured = None
        if recorder is not None:
            self._captured = CapturedStep(
                self._compute_gradients,
                [*self.network.parameters()],
                recorder,
                insist=bool(config.engine.cuda_graph),
            )
        self.augment = Augmenter(config.augment, self.plan.dims, **augmenter_geometry(prepared))

    @property
    def epoch(self) -> int:
        """Whole epochs done; the last one counts though the time cut it short."""
        step, steps = self.position.step, self.plan.steps_per_epoch
        return -(-step // steps) if self.is_over else step // steps

    @property
    def is_over(self) -> bool:
        """Whether all steps are done, or the time is up."""
        step, total = self.position.step, self.plan.total_steps
        if self.plan.max_minutes is not None and self.position.pace.is_over(step):
            return True
        return total is not None and step >= total

    @property
    def best_epoch(self) -> int:
        """Whose weights are kept as the best; the last one where no validation had a Dice."""
        return self.position.best_epoch or self.epoch

    @property
    def mean_loss(self) -> float:
        """Mean training loss of the current epoch so far, on this process."""
        return float(self.loss_sum) / max(1, self.position.loss_count)

    def epoch_loss(self) -> float:
        """Mean training loss of the current epoch over all processes."""
        mean = self.fabric.all_reduce(self.loss_sum / max(1, self.position.loss_count), reduce_op="mean")
        return float(torch.as_tensor(mean))

    def begin_epoch(self, row: dict[str, Any]) -> None:
        """Keep the row of the epoch that is done and start to count afresh."""
        self.position.rows.append(row)
        self.loss_sum.zero_()
        self.position.loss_count, self.position.waited, self.position.computed = 0, 0.0, 0.0

    @property
    def learning_rate(self) -> float:
        """As of the last step."""
        return float(self.optimiser.param_groups[0]["lr"])

    def batches(self, cases: list[CachedCase], *, first_step: int, last_step: int) -> Batches:
        """Batches of the steps from ``first_step`` on, before ``last_step``; a context manager."""
        sampler = PatchSampler(
            cases if self._codes is None else [CodedCase(case) for case in cases],
            self.plan.patch_size,
            foreground_fraction=self.config.data.foreground_fraction,
            background_fraction=self.config.data.background_fraction,
            seed=self.config.seed,
            pad_label=IGNORE_INDEX,
            context_slices=self.plan.context_slices,
        )
        return Batches(
            sampler,
            batch_size=self.plan.batch_size,
            first_step=first_step,
            last_step=last_step,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
            pin_memory=self.fabric.device.type == "cuda",
            prepare_labels=number_lesions if self.config.loss.lesion_weight else None,
        )

    def train_step(self, step: int, images: Tensor, labels: Tensor) -> None:
        """Augment a batch and take optimiser step ``step``."""
        config, fabric = self.config, self.fabric
        torch.manual_seed(seed_of_step(config.seed + 1, step, fabric.global_rank))  # dropout
        device = fabric.device
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        generator = augment_generator(config.seed, step, fabric.global_rank)
        images, labels = self.augment(images, labels, generator=generator)
        if config.engine.channels_last:
            images = images.contiguous(memory_format=CHANNELS_LAST[self.plan.dims])
        factor = learning_rate_factor(
            step,
            self.plan.total_steps,
            schedule=config.optimiser.schedule,
            warmup_steps=config.optimiser.warmup_steps,
            share=None if self.plan.max_minutes is None else self.position.pace.share(step),
        )
        for group in self.optimiser.param_groups:
            group["lr"] = factor * self.plan.learning_rate
        loss = (self._captured or self._compute_gradients)(images, labels)
        self.optimiser.step()
        self.average.update(updates=step)
        self.position.step = step + 1
        self.loss_sum += loss
        self.position.loss_count += 1

    def _compute_gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Clipped gradients of a batch, in the parameters; returns its loss. Nothing here may wait for the device."""
        self.network.train()
        for module in self._frozen:
            module.eval()
        self.optimiser.zero_grad()
        loss: Tensor = self.criterion(self.wrapped(images), labels)
        self.fabric.backward(loss)
        clip_norm = self.config.optimiser.clip_norm
        if clip_norm is not None:
            self.fabric.clip_gradients(
                self.wrapped, self.optimiser, max_norm=clip_norm, error_if_nonfinite=False
            )
        return loss.detach()

    def validate(self, cases: list[CachedCase], *, after_case: Callable[[], None] | None = None) -> CaseTable:
        """Metrics of ``cases`` with the averaged weights, on the grid of training, see :func:`validate`."""
        if self._captured is not None:
            self._captured.release()  # activations that training keeps are memory for validation
        if isinstance(self.average, ShardedWeightAverage):
            self.average.gather()
        with self.fabric.autocast():
            return validate(
                self.average.network,
                cases,
                self.plan,
                self.prepared.dataset.class_names,
                regions=self.prepared.dataset.region_classes,
                rank=self.fabric.global_rank,
                world_size=self.fabric.world_size,
                after_case=after_case,
            )

    def gather(self) -> None:
        """Bring what the processes hold shares of together, for :meth:`save`; for every process."""
        if isinstance(self.average, ShardedWeightAverage):
            self.average.gather()
            state = {"network": self.network.state_dict(), "optimiser": self.optimiser.state_dict()}
            self._whole = gathered(state)

    def save(self, folder: RunFolder, name: str) -> None:
        """Write the checkpoint ``name``, after :meth:`gather`; for the first process."""
        save_checkpoint(
            folder.checkpoints / name,
            weights=self.average.network.state_dict(),
            description={
                "epoch": self.epoch,
                "step": self.position.step,
                "val_dice": self.position.best_dice,
                "model": {**self.network.config},  # type: ignore[dict-item]
                "preprocessing": self.prepared.preprocessing.to_dict(),
                "labels": {name: index for index, name in enumerate(self.prepared.dataset.class_names)},
                "label_values": dict(self.prepared.dataset.labels),
                # A list, since the order counts: JSON objects have none.
                "regions": [[name, list(values)] for name, values in self.prepared.dataset.regions.items()],
                "channels": list(self.prepared.dataset.channel_names),
                "patch_size": list(self.plan.patch_size),
                "tiling": asdict(TRAINED_TILING),
                "context_slices": self.plan.context_slices,
                "training_spacing_mm": _spacing_range(self.prepared),
                "intensities": [asdict(channel) for channel in self.prepared.fingerprint.channels],
                "precision": self.config.engine.precision,
                **({} if self._initialised_from is None else {"initialised_from": self._initialised_from}),
            },
            trainer={
                **(
                    self._whole
                    or {"network": self.network.state_dict(), "optimiser": self.optimiser.state_dict()}
                ),
                "position": asdict(self.position),
                "loss_sum": float(self.loss_sum),
                "scaler": None if self._scaler is None else self._scaler.state_dict(),
                "data": self._data_digest,
                "config": _options_that_shape_weights(self.config),
            },
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint that was loaded with its trainer state.

        Raises:
            CheckpointError: it is of another network or configuration.
            DataError: the scans have changed since.
        """
        folder, state = checkpoint.folder, checkpoint.trainer or {}
        if state.get("data") != self._data_digest:
            raise DataError(
                f"{self.prepared.dataset.root}: the scans or masks, or what this version of lungkit makes of them, are "
                "not those that the run was started on; restore them, go on with the version that began the run "
                f"({checkpoint.description.get('lungkit')}), or start a new run. Its checkpoints can be used to predict"
            )
        own = _options_that_shape_weights(self.config)
        saved = _with_later_options(state.get("config") or {})
        changed = [name for name in sorted({*saved, *own}) if saved.get(name) != own.get(name)]
        if changed:
            raise CheckpointError(
                f"{folder}: was saved under another configuration than the run's config.yaml: {', '.join(changed)}"
            )
        try:
            moments = _computed_as(self.optimiser, state["optimiser"])
            if isinstance(self.average, ShardedWeightAverage):
                load_whole(self.network, state["network"])
                self.optimiser.load_state_dict(shared_out_moments(self.optimiser, moments))
                self.average.load(checkpoint.weights)
            else:
                self.network.load_state_dict(state["network"])
                self.optimiser.load_state_dict(moments)
                self.average.network.load_state_dict(checkpoint.weights)
            if self._scaler is not None:
                self._scaler.load_state_dict(state["scaler"])
            position = state["position"]
            self.position = Position(**{**position, "pace": Pace(**position.get("pace", {}))})
            self.loss_sum.fill_(state["loss_sum"])
            self._initialised_from = checkpoint.description.get("initialised_from")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{folder}: does not fit the network of this run ({error})") from error


def _computed_as(optimiser: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """The saved state with the optimiser's own way to compute a step: that belongs to the device, not to the run."""
    groups = [
        {**group, **{name: own[name] for name in ("foreach", "fused") if name in own}}
        for group, own in zip(saved["param_groups"], optimiser.param_groups, strict=True)
    ]
    return {**saved, "param_groups": groups}


def _spacing_range(prepared: Prepared) -> dict[str, list[float]]:
    """Smallest, median and largest spacing (z, y, x) of the training scans: which pixels the network knows."""
    spacings = np.asarray(prepared.fingerprint.spacings_mm)
    return {
        name: [float(size) for size in reduce(spacings, axis=0)]
        for name, reduce in (("min", np.min), ("median", np.median), ("max", np.max))
    }


def _options_that_shape_weights(config: TrainConfig) -> dict[str, Any]:
    """The configuration without what may differ when a run is continued."""
    content = config_to_dict(config)
    for name in (*MOVABLE, *EXTENSIBLE):
        *groups, option = name.split(".")
        part = content
        for group in groups:
            part = part[group]
        del part[option]
    return content


def _with_later_options(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration with the defaults of options that came after it: they do what was done before."""
    merged = _options_that_shape_weights(TrainConfig()) if saved else {}
    for name, value in saved.items():
        if name in EXTENSIBLE:
            continue  # earlier versions kept them too
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = {**merged[name], **value} if both else value
    return merged


def augmenter_geometry(prepared: Prepared) -> dict[str, Any]:
    """What :class:`~lungkit.data.Augmenter` has to know of the scans: their spacing, and the intensity of air.

    Channels may differ in what air is; then it is the smallest value of each patch.
    """
    bounds = {channel.bounds[0] for channel in prepared.preprocessing.channels}
    median = np.median(np.asarray(prepared.fingerprint.spacings_mm), axis=0).tolist()
    return {
        "spacing_mm": prepared.preprocessing.target_spacing_mm or tuple(median),
        "pad_value": bounds.pop() if len(bounds) == 1 else None,
    }


def make_optimiser(
    network: nn.Module, config: OptimiserConfig, learning_rate: float, *, fused: bool = False
) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum; ``fused`` takes a step in one kernel, a quarter of the time on a CPU."""
    groups = parameter_groups(network, weight_decay=config.weight_decay)
    if config.name == "sgd":
        return torch.optim.SGD(
            groups,
            lr=learning_rate,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            fused=fused or None,
        )
    return torch.optim.AdamW(groups, lr=learning_rate, fused=fused or None)
