"""The training loop."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lungkit.data import Augmenter, CachedCase, PatchSampler
from lungkit.data.dataset import IGNORE_INDEX
from lungkit.errors import CheckpointError, Interrupted, LungkitError
from lungkit.losses import DeepSupervisionLoss, DiceCELoss
from lungkit.metrics import CaseTable
from lungkit.report import format_case_table, save_curves, write_case_table
from lungkit.training.batches import Batches, augment_generator, seed_of_step
from lungkit.training.checkpoint import BEST, LAST, load_checkpoint, save_checkpoint
from lungkit.training.config import LossConfig, OptimiserConfig, TrainConfig
from lungkit.training.config_io import config_to_dict, config_to_yaml, load_config
from lungkit.training.engine import as_resource_error, start_engine
from lungkit.training.planning import Plan, Prepared, build_network, prepare, prepare_cases
from lungkit.training.progress import Display
from lungkit.training.run_folder import RunFolder
from lungkit.training.schedule import WeightAverage, learning_rate_factor, parameter_groups
from lungkit.training.validation import METRICS, draw_overlays, validate

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_LOG = logging.getLogger("lungkit")


@dataclass(frozen=True)
class TrainResult:
    """What :meth:`Trainer.fit` gives back."""

    run_folder: Path
    table: CaseTable
    """Metrics of every validation case with the best weights."""
    best_dice: float
    epochs: int


@dataclass
class _Progress:
    """Where a run is; saved with every checkpoint."""

    step: int = 0
    loss_count: int = 0
    best_dice: float = -1.0
    best_epoch: int = 0
    rows: list[dict[str, Any]] | None = None
    waited: float = 0.0
    computed: float = 0.0


class Trainer:
    """Trains one network on one fold and leaves a run folder behind.

    Every random choice is a function of the seed and the step, so a run that was interrupted and resumed ends with the
    same weights, on CPU bit for bit, as one that was not.

    Args:
        config: what to do.
        resume: folder of a run to continue; ``config`` must be the run's own (:func:`load_config`).
        checkpoint: which checkpoint to continue from, "last" or "previous".
        on_epoch_end: called after every epoch with its row of ``metrics.csv``; may call :meth:`stop`.

    Example:
        Train a small U-Net on the phantom for one epoch::

            from lungkit.training import DataConfig, ModelConfig, TrainConfig, Trainer

            config = TrainConfig(model=ModelConfig(name="unet", features=(8, 16)), epochs=1)
            result = Trainer(config).fit()
            print(result.best_dice, result.run_folder)
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        resume: str | Path | None = None,
        checkpoint: str = LAST,
        on_epoch_end: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        config.validate()
        self.config = config
        self.resume = None if resume is None else RunFolder.open(resume)
        self.checkpoint = checkpoint
        self.on_epoch_end = on_epoch_end
        self._stop = threading.Event()

    @classmethod
    def from_run(cls, run: str | Path, *, checkpoint: str = LAST) -> Trainer:
        """A trainer that continues the run in folder ``run``."""
        return cls(load_config(RunFolder.open(run).path / "config.yaml"), resume=run, checkpoint=checkpoint)

    def stop(self) -> None:
        """Ask the run to save itself and end with :class:`~lungkit.errors.Interrupted` after the current step."""
        self._stop.set()

    def fit(self) -> TrainResult:
        """Train to the end, or from where the run to resume was.

        Raises:
            Interrupted: :meth:`stop`, Ctrl-C or SIGTERM; the state is saved.
            UsageError, DataError, CheckpointError, ResourceError: see :mod:`lungkit.errors`.
        """
        fabric = start_engine(self.config.engine)
        with _signals(self.stop), Display(quiet=not fabric.is_global_zero) as display:
            try:
                return self._fit(fabric, display)
            except (RuntimeError, MemoryError) as error:
                translated = as_resource_error(error)
                if translated is not None:
                    raise translated from error
                raise

    def dry_run(self) -> Plan:
        """Read everything, build everything, train one step and validate one case; leaves nothing behind."""
        fabric = start_engine(self.config.engine)
        with Display(quiet=not fabric.is_global_zero) as display:
            prepared = prepare(self.config, progress=display.preparing)
            train, val = prepare_cases(prepared, self.config, progress=display.preparing)
            display.prepared()
            run = _Run(self.config, prepared, fabric)
            with run.batches(train, first_step=0, last_step=1) as batches:
                for step, images, labels in batches:
                    run.train_step(step, images, labels)
            run.validate(val[:1])
        return prepared.plan

    def _fit(self, fabric: Fabric, display: Display) -> TrainResult:
        known = None if self.resume is None else self.resume.dataset()
        prepared = prepare(self.config, known=known, progress=display.preparing)
        train, val = prepare_cases(prepared, self.config, progress=display.preparing)
        display.prepared()
        run = _Run(self.config, prepared, fabric)
        folder = self._open_folder(prepared, fabric)
        if self.resume is not None:
            run.restore(folder.checkpoints / self.checkpoint)
        main = fabric.is_global_zero
        if main:
            folder.start_logging()
            folder.write_status("running", epoch=run.epoch)
        try:
            if self.resume is None:
                _LOG.info("%s", prepared.fingerprint.summary())
            _LOG.info("run folder %s\n%s", folder.path, prepared.plan.summary())
            self._epochs(run, folder, train, val, display)
            table = self._finish(run, folder, val)
        except BaseException as error:
            if main:
                state = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
                folder.write_status(state, epoch=run.epoch, message=str(error))
            raise
        finally:
            folder.stop_logging()
        if main:
            folder.write_status("finished", epoch=run.epoch, best_dice=run.progress.best_dice)
        return TrainResult(folder.path, table, run.progress.best_dice, run.epoch)

    def _open_folder(self, prepared: Prepared, fabric: Fabric) -> RunFolder:
        if self.resume is not None:
            return self.resume
        name = self.config.name or f"{prepared.dataset.name}-{self.config.model.name}".lower().replace(
            " ", "-"
        )
        path = ""
        if fabric.is_global_zero:
            folder = RunFolder.create(self.config.runs, name)
            folder.write_description(config_to_yaml(self.config), prepared.to_dict())
            path = str(folder.path)
        return RunFolder(fabric.broadcast(path))

    def _epochs(
        self, run: _Run, folder: RunFolder, train: list[CachedCase], val: list[CachedCase], display: Display
    ) -> None:
        plan = run.plan
        with run.batches(train, first_step=run.progress.step, last_step=plan.total_steps) as batches:
            display.start_epoch(run.epoch + 1, plan.epochs, plan.steps_per_epoch, run.progress.step)
            for step, images, labels in batches:
                started = time.perf_counter()
                run.train_step(step, images, labels)
                run.progress.computed += time.perf_counter() - started
                run.progress.waited, batches.waited = run.progress.waited + batches.waited, 0.0
                display.step(lambda: run.mean_loss)
                if self._must_stop(run):
                    run.save(folder, LAST)
                    raise Interrupted(
                        f"stopped after step {run.progress.step} of {plan.total_steps} and saved; "
                        f"continue with --resume {folder.path}"
                    )
                if run.progress.step % plan.steps_per_epoch == 0:
                    done = self._end_epoch(run, folder, val, display)
                    if done:
                        return
                    display.start_epoch(run.epoch + 1, plan.epochs, plan.steps_per_epoch, run.progress.step)

    def _must_stop(self, run: _Run) -> bool:
        if run.fabric.world_size == 1:
            return self._stop.is_set()
        if run.progress.step % 8:  # a signal may reach one process only; agreeing costs a synchronisation
            return False
        flag = torch.tensor(float(self._stop.is_set()), device=run.fabric.device)
        total = run.fabric.all_reduce(flag, reduce_op="sum")
        return isinstance(total, Tensor) and float(total) > 0

    def _end_epoch(self, run: _Run, folder: RunFolder, val: list[CachedCase], display: Display) -> bool:
        """Validate, save, report; True where training is over."""
        config, progress, plan = self.config, run.progress, run.plan
        if not math.isfinite(run.mean_loss):
            raise LungkitError(
                f"training diverged in epoch {run.epoch}: the loss is {run.mean_loss}; lower "
                f"optimiser.learning_rate (now {plan.learning_rate:g}) or use engine.precision fp32"
            )
        row: dict[str, Any] = {
            "epoch": run.epoch,
            "step": progress.step,
            "train_loss": run.mean_loss,
            "learning_rate": run.learning_rate,
            "seconds_waiting_for_data": round(progress.waited, 3),
            "seconds_computing": round(progress.computed, 3),
        }
        last_epoch = run.epoch == plan.epochs
        improved = False
        if run.epoch % config.validate_every == 0 or last_epoch:
            display.validating()
            started = time.perf_counter()
            table = run.validate(val)
            row["seconds_validating"] = round(time.perf_counter() - started, 3)
            for metric in METRICS:
                mean = table.mean(metric)
                row[f"val_{metric}"] = None if math.isnan(mean) else mean
            if row["val_dice"] is not None and row["val_dice"] > progress.best_dice:
                improved = True
                progress.best_dice, progress.best_epoch = row["val_dice"], run.epoch
        rows = progress.rows = [*(progress.rows or []), row]
        run.loss_sum.zero_()
        progress.loss_count, progress.waited, progress.computed = 0, 0.0, 0.0
        if run.fabric.is_global_zero:
            if improved or (last_epoch and not (folder.checkpoints / BEST).exists()):
                run.save(folder, BEST)
            run.save(folder, LAST)
            folder.write_metrics(rows)
            save_curves(folder.path / "progress.png", rows)
            folder.write_status("running", epoch=run.epoch, epochs=plan.epochs, best_dice=progress.best_dice)
        run.fabric.barrier()
        display.end_epoch(row, plan.epochs)
        if self.on_epoch_end is not None:
            self.on_epoch_end(row)
        if last_epoch:
            return True
        if self._must_stop(run):
            raise Interrupted(
                f"stopped after epoch {run.epoch} of {plan.epochs} and saved; continue with --resume {folder.path}"
            )
        validated = [r["val_dice"] for r in rows if r.get("val_dice") is not None]
        since_best = len(validated) - 1 - max(range(len(validated)), key=validated.__getitem__, default=0)
        if config.patience is not None and validated and since_best >= config.patience:
            _LOG.info("stopping early: no better Dice in %d validations", config.patience)
            return True
        return False

    def _finish(self, run: _Run, folder: RunFolder, val: list[CachedCase]) -> CaseTable:
        best = load_checkpoint(folder.checkpoints / BEST, with_trainer=False)
        run.evaluated.load_state_dict(best.weights)
        table = run.validate(val, current=False)
        if run.fabric.is_global_zero:
            write_case_table(folder.path, table, name="validation", extra={"epoch": run.progress.best_epoch})
            draw_overlays(folder.overlays, run.evaluated, val, run.plan.patch_size, table)
            _LOG.info(
                "validation with the weights of epoch %d\n%s",
                run.progress.best_epoch,
                format_case_table(table),
            )
        run.fabric.barrier()
        return table


class _Run:
    """Network, optimiser and their state."""

    def __init__(self, config: TrainConfig, prepared: Prepared, fabric: Fabric) -> None:
        self.config, self.prepared, self.fabric = config, prepared, fabric
        self.plan = prepared.plan
        self.progress = _Progress()
        # On the device: reading it would make every step wait for the GPU.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=fabric.device)
        self.network = self._new_network()
        # What is validated and kept: the average of the weights, in a network of its own.
        self.evaluated = self._new_network()
        self.average = WeightAverage(self.network, decay=config.optimiser.ema_decay)
        optimiser = make_optimiser(self.network, config.optimiser, self.plan.learning_rate)
        forward: Any = torch.compile(self.network) if config.engine.compile else self.network
        self.wrapped, self.optimiser = fabric.setup(forward, optimiser)
        self.criterion = make_criterion(config.loss, self.plan)
        spacing = prepared.preprocessing.target_spacing_mm or prepared.fingerprint.spacings_mm[0]
        air = prepared.preprocessing.channels[0].bounds[0]
        self.augment = Augmenter(config.augment, self.plan.dims, spacing_mm=spacing, pad_value=air)

    def _new_network(self) -> nn.Module:
        network = build_network(self.plan, self.config.seed).to(self.fabric.device)
        if self.config.engine.channels_last:
            layout = torch.channels_last if self.plan.dims == 2 else torch.channels_last_3d
            network = network.to(memory_format=layout)  # type: ignore[call-overload]
        return network

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.progress.step // self.plan.steps_per_epoch

    @property
    def mean_loss(self) -> float:
        """Mean training loss of the current epoch."""
        return float(self.loss_sum) / max(1, self.progress.loss_count)

    @property
    def learning_rate(self) -> float:
        """As of the last step."""
        return float(self.optimiser.param_groups[0]["lr"])

    def batches(self, cases: list[CachedCase], *, first_step: int, last_step: int) -> Batches:
        sampler = PatchSampler(
            cases,
            self.plan.patch_size,
            foreground_fraction=self.config.data.foreground_fraction,
            seed=self.config.seed,
            pad_label=IGNORE_INDEX,
        )
        return Batches(
            sampler,
            batch_size=self.plan.batch_size,
            first_step=first_step,
            last_step=last_step,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
            pin_memory=self.fabric.device.type == "cuda",
        )

    def train_step(self, step: int, images: Tensor, labels: Tensor) -> None:
        config, fabric = self.config, self.fabric
        torch.manual_seed(seed_of_step(config.seed + 1, step, fabric.global_rank))  # dropout
        device = fabric.device
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        generator = augment_generator(config.seed, step, fabric.global_rank)
        images, labels = self.augment(images, labels, generator=generator)
        if config.engine.channels_last:
            layout = torch.channels_last if self.plan.dims == 2 else torch.channels_last_3d
            images = images.contiguous(memory_format=layout)
        factor = learning_rate_factor(
            step,
            self.plan.total_steps,
            schedule=config.optimiser.schedule,
            warmup_steps=config.optimiser.warmup_steps,
        )
        for group in self.optimiser.param_groups:
            group["lr"] = factor * self.plan.learning_rate
        self.network.train()
        loss = self.criterion(self.wrapped(images), labels)
        self.optimiser.zero_grad()
        fabric.backward(loss)
        if config.optimiser.clip_norm is not None:
            fabric.clip_gradients(
                self.wrapped, self.optimiser, max_norm=config.optimiser.clip_norm, error_if_nonfinite=False
            )
        self.optimiser.step()
        self.average.update(self.network, updates=step)
        self.progress.step = step + 1
        self.loss_sum += loss.detach()
        self.progress.loss_count += 1

    def validate(self, cases: list[CachedCase], *, current: bool = True) -> CaseTable:
        """Metrics of ``cases`` with the averaged weights as they are now, or as :attr:`evaluated` holds them."""
        if current:
            self.evaluated.load_state_dict(self.average.state)
        with self.fabric.autocast():
            return validate(
                self.evaluated,
                cases,
                self.plan.patch_size,
                self.prepared.dataset.class_names,
                rank=self.fabric.global_rank,
                world_size=self.fabric.world_size,
            )

    def save(self, folder: RunFolder, name: str) -> None:
        if not self.fabric.is_global_zero:
            return
        save_checkpoint(
            folder.checkpoints / name,
            weights=self.average.state,
            description={
                "epoch": self.epoch,
                "step": self.progress.step,
                "val_dice": None if self.progress.best_dice < 0 else self.progress.best_dice,
                "model": {**self.network.config},  # type: ignore[dict-item]
                "preprocessing": self.prepared.preprocessing.to_dict(),
                "labels": {name: index for index, name in enumerate(self.prepared.dataset.class_names)},
                "label_values": dict(self.prepared.dataset.labels),
                "channels": list(self.prepared.dataset.channel_names),
                "patch_size": list(self.plan.patch_size),
            },
            trainer={
                "network": self.network.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "progress": asdict(self.progress),
                "loss_sum": float(self.loss_sum),
                "config": config_to_dict(self.config),
            },
        )

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: it is damaged, or of another network or configuration.
        """
        checkpoint = load_checkpoint(folder)
        state = checkpoint.trainer or {}
        if state.get("config") != config_to_dict(self.config):
            raise CheckpointError(
                f"{folder}: was saved under another configuration than the run's config.yaml"
            )
        try:
            self.network.load_state_dict(state["network"])
            self.optimiser.load_state_dict(state["optimiser"])
            for name, value in checkpoint.weights.items():
                self.average.state[name].copy_(value)
            self.progress = _Progress(**state["progress"])
            self.loss_sum.fill_(state["loss_sum"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{folder}: does not fit the network of this run ({error})") from error


def make_optimiser(
    network: nn.Module, config: OptimiserConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum."""
    groups = parameter_groups(network, weight_decay=config.weight_decay)
    if config.name == "sgd":
        return torch.optim.SGD(
            groups, lr=learning_rate, momentum=config.momentum, nesterov=config.momentum > 0
        )
    return torch.optim.AdamW(groups, lr=learning_rate)


def make_criterion(config: LossConfig, plan: Plan) -> nn.Module:
    """Dice + cross-entropy as configured; over all outputs with deep supervision."""
    criterion = DiceCELoss(
        softmax=True,
        include_background=config.include_background,
        batch=config.batch_dice,
        lambda_dice=config.dice_weight,
        lambda_ce=config.ce_weight,
        ignore_index=IGNORE_INDEX,
    )
    return DeepSupervisionLoss(criterion) if plan.model["deep_supervision"] else criterion


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call ``stop``; the second one takes its usual effect at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in caught}

    def handle(number: int, frame: FrameType | None) -> None:
        for other, handler in before.items():
            signal.signal(other, handler)
        _LOG.warning("%s: saving; once more to quit at once", signal.Signals(number).name)
        stop()

    for number in caught:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
