"""The training loop."""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lungkit.data import CachedCase
from lungkit.errors import Interrupted, LungkitError
from lungkit.metrics import CaseTable
from lungkit.report import format_case_table, save_curves, write_case_table
from lungkit.training.checkpoint import BEST, LAST, load_checkpoint, recover_checkpoint
from lungkit.training.config import TrainConfig
from lungkit.training.config_io import config_to_yaml, load_config
from lungkit.training.engine import as_resource_error, start_engine
from lungkit.training.planning import Plan, Prepared, prepare, prepare_cases, resolve
from lungkit.training.progress import Display
from lungkit.training.run_folder import RunFolder
from lungkit.training.session import Session
from lungkit.training.signals import stop_signals
from lungkit.training.validation import METRICS, draw_overlays

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_LOG = logging.getLogger("lungkit")

_STEPS_BETWEEN_VOTES = 8
_SECONDS_BETWEEN_CURVES = 20.0


@dataclass(frozen=True)
class TrainResult:
    """What :meth:`Trainer.fit` gives back."""

    run_folder: Path
    table: CaseTable
    """Metrics of every validation case with the best weights."""
    best_dice: float
    """Mean over the validation cases; -1 where no case has foreground."""
    best_epoch: int
    epochs: int
    """Epochs trained."""


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
        self._drawn = -math.inf

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
        with Display(quiet=not fabric.is_global_zero) as display:
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
            prepared, train, val = self._prepare(fabric, display)
            session = Session(self.config, prepared, fabric, [*train, *val])
            with session.batches(train, first_step=0, last_step=1) as batches:
                for step, images, labels in batches:
                    session.train_step(step, images, labels)
            session.validate(val[:1])
        return prepared.plan

    def _prepare(
        self, fabric: Fabric, display: Display
    ) -> tuple[Prepared, list[CachedCase], list[CachedCase]]:
        known = None if self.resume is None else self.resume.dataset()
        # The first process fills the cache; the others then only open it.
        with fabric.rank_zero_first():
            prepared = prepare(self.config, known=known, progress=display.preparing)
            train, val = prepare_cases(prepared, self.config, progress=display.preparing)
        if self.resume is None:
            self.config = resolve(self.config, prepared.plan)
        display.prepared()
        return prepared, train, val

    def _fit(self, fabric: Fabric, display: Display) -> TrainResult:
        prepared, train, val = self._prepare(fabric, display)
        session = Session(self.config, prepared, fabric, [*train, *val])
        folder = self._open_folder(prepared, fabric)
        if self.resume is not None:
            if fabric.is_global_zero:
                recover_checkpoint(folder.checkpoints / BEST)
            session.restore(folder.checkpoints / self.checkpoint)
        main = fabric.is_global_zero
        if main:
            folder.start_logging()
            folder.write_status("running", epoch=session.epoch, epochs=session.plan.epochs)
        try:
            if self.resume is None:
                _LOG.info("%s", prepared.fingerprint.summary())
            _LOG.info("run folder %s\n%s", folder.path, prepared.plan.summary())
            with stop_signals(self.stop):
                self._epochs(session, folder, train, val, display)
            table = self._finish(session, folder, val)
        except BaseException as error:
            if main:
                self._report_failure(folder, session, error)
            raise
        finally:
            folder.stop_logging()
        position = session.position
        if main:
            folder.write_status(
                "finished",
                epoch=session.epoch,
                epochs=session.plan.epochs,
                best_dice=position.best_dice,
                best_epoch=position.best_epoch,
            )
        return TrainResult(folder.path, table, position.best_dice, position.best_epoch, session.epoch)

    @staticmethod
    def _report_failure(folder: RunFolder, session: Session, error: BaseException) -> None:
        state = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
        message = str(error) or type(error).__name__
        try:
            folder.write_status(state, epoch=session.epoch, epochs=session.plan.epochs, message=message)
        except LungkitError as second:  # a full disk: the first error says more
            _LOG.warning("%s", second)

    def _open_folder(self, prepared: Prepared, fabric: Fabric) -> RunFolder:
        if self.resume is not None:
            return self.resume
        # The dataset's name comes from a file: only what is harmless in the name of a folder is kept.
        dataset = re.sub(r"[^a-z0-9_.]+", "-", prepared.dataset.name.lower()).strip("-.") or "run"
        name = self.config.name or f"{dataset}-{self.config.model.name}"
        path = ""
        if fabric.is_global_zero:
            folder = RunFolder.create(self.config.runs, name)
            folder.write_description(config_to_yaml(self.config), prepared.to_dict(), prepared.splits)
            path = str(folder.path)
        return RunFolder(fabric.broadcast(path))

    def _epochs(
        self,
        session: Session,
        folder: RunFolder,
        train: list[CachedCase],
        val: list[CachedCase],
        display: Display,
    ) -> None:
        plan, position = session.plan, session.position
        if position.loss_count and position.step % plan.steps_per_epoch == 0:
            # The run was stopped between the last step of an epoch and the end of its validation.
            self._end_epoch(session, folder, val, display)
        if self._is_over(session):
            return
        with session.batches(train, first_step=position.step, last_step=plan.total_steps) as batches:
            display.start_epoch(session.epoch + 1, plan.epochs, plan.steps_per_epoch, position.step)
            for step, images, labels in batches:
                started = time.perf_counter()
                session.train_step(step, images, labels)
                position.computed += time.perf_counter() - started
                position.waited, batches.waited = position.waited + batches.waited, 0.0
                display.step(lambda: session.mean_loss)
                if self._must_stop(session):
                    self._save_and_stop(session, folder)
                if position.step % plan.steps_per_epoch == 0:
                    self._end_epoch(session, folder, val, display)
                    if self._is_over(session):
                        return
                    display.start_epoch(session.epoch + 1, plan.epochs, plan.steps_per_epoch, position.step)

    def _must_stop(self, session: Session) -> bool:
        if session.fabric.world_size == 1:
            return self._stop.is_set()
        if session.position.step % _STEPS_BETWEEN_VOTES:
            return False
        # A signal may reach one process only, but all must stop at the same step.
        flag = torch.tensor(float(self._stop.is_set()), device=session.fabric.device)
        total = session.fabric.all_reduce(flag, reduce_op="sum")
        return isinstance(total, Tensor) and float(total) > 0

    def _save_and_stop(self, session: Session, folder: RunFolder) -> None:
        session.save(folder, LAST)
        raise Interrupted(
            f"stopped after step {session.position.step} of {session.plan.total_steps} and saved; "
            f"continue with --resume {folder.path}"
        )

    def _is_over(self, session: Session) -> bool:
        """Whether all epochs are done, or patience is at its end."""
        if session.epoch >= session.plan.epochs:
            return True
        validated = [row["val_dice"] for row in session.position.rows if row.get("val_dice") is not None]
        patience = self.config.patience
        if patience is None or not validated:
            return False
        since_best = len(validated) - 1 - max(range(len(validated)), key=validated.__getitem__)
        if since_best >= patience:
            _LOG.info("stopping early: no better Dice in %d validations", patience)
            return True
        return False

    def _end_epoch(
        self, session: Session, folder: RunFolder, val: list[CachedCase], display: Display
    ) -> None:
        """Validate, save, report."""
        position, plan = session.position, session.plan
        loss = session.epoch_loss()
        if not math.isfinite(loss):
            raise LungkitError(
                f"training diverged in epoch {session.epoch}: the loss is {loss}; lower "
                f"optimiser.learning_rate (now {plan.learning_rate:g}) or use engine.precision fp32"
            )
        row: dict[str, Any] = {
            "epoch": session.epoch,
            "step": position.step,
            "train_loss": loss,
            "learning_rate": session.learning_rate,
            "seconds_waiting_for_data": round(position.waited, 3),
            "seconds_computing": round(position.computed, 3),
        }
        last_epoch = session.epoch == plan.epochs
        improved = False
        if session.epoch % self.config.validate_every == 0 or last_epoch:
            display.validating()
            started = time.perf_counter()
            table = session.validate(val, after_case=lambda: self._stop_in_validation(session, folder))
            row["seconds_validating"] = round(time.perf_counter() - started, 3)
            for metric in METRICS:
                mean = table.mean(metric)
                row[f"val_{metric}"] = None if math.isnan(mean) else mean
            if row["val_dice"] is not None and row["val_dice"] > position.best_dice:
                improved = True
                position.best_dice, position.best_epoch = row["val_dice"], session.epoch
        session.begin_epoch(row)
        if session.fabric.is_global_zero:
            if improved or (last_epoch and not (folder.checkpoints / BEST).exists()):
                session.save(folder, BEST)
            session.save(folder, LAST)
            folder.write_metrics(position.rows)
            self._draw_curves(session, folder)
            folder.write_status(
                "running", epoch=session.epoch, epochs=plan.epochs, best_dice=position.best_dice
            )
        session.fabric.barrier()
        display.end_epoch(row, plan.epochs)
        if self.on_epoch_end is not None:
            self.on_epoch_end(row)
        if not last_epoch and self._must_stop(session):
            raise Interrupted(
                f"stopped after epoch {session.epoch} of {plan.epochs} and saved; "
                f"continue with --resume {folder.path}"
            )

    def _draw_curves(self, session: Session, folder: RunFolder, *, now: bool = False) -> None:
        # A picture takes as long as many steps of a small network.
        if now or time.monotonic() - self._drawn > _SECONDS_BETWEEN_CURVES:
            save_curves(folder.path / "progress.png", session.position.rows)
            self._drawn = time.monotonic()

    def _stop_in_validation(self, session: Session, folder: RunFolder) -> None:
        # Several processes have different numbers of cases, and finish their validation before they agree to stop.
        if session.fabric.world_size == 1 and self._stop.is_set():
            self._save_and_stop(session, folder)

    def _finish(self, session: Session, folder: RunFolder, val: list[CachedCase]) -> CaseTable:
        best = load_checkpoint(folder.checkpoints / BEST, with_trainer=False)
        session.evaluated.load_state_dict(best.weights)
        table = session.validate(val, current=False)
        if session.fabric.is_global_zero:
            self._draw_curves(session, folder, now=True)
            epoch = session.position.best_epoch or session.epoch
            write_case_table(folder.path, table, name="validation", extra={"epoch": epoch})
            draw_overlays(folder.overlays, session.evaluated, val, session.plan, table)
            _LOG.info("validation with the weights of epoch %d\n%s", epoch, format_case_table(table))
        session.fabric.barrier()
        return table
