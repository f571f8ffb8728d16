"""The training loop."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from lungkit.checkpoint import BEST, LAST, Checkpoint, load_checkpoint, recover_checkpoint
from lungkit.data import CachedCase
from lungkit.errors import Interrupted, LungkitError
from lungkit.metrics import CaseTable
from lungkit.report import format_case_table, save_curves, write_case_table
from lungkit.training.config import TrainConfig
from lungkit.training.config_io import config_to_yaml, load_config
from lungkit.training.engine import memory_errors, on_first_process, resolve_engine, start_engine
from lungkit.training.grids import grid_of_scans
from lungkit.training.planning import Plan, Prepared, prepare, prepare_cases, resolve
from lungkit.training.postprocessing_choice import choose_for_run
from lungkit.training.progress import Display
from lungkit.training.run_folder import RunFolder
from lungkit.training.run_log import RunLog
from lungkit.training.session import Session
from lungkit.training.signals import stop_signals
from lungkit.training.validation import METRICS, Predict, draw_overlays, predict

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
    """Metrics of every validation case with the best weights, on the scans' own grid."""
    best_dice: float
    """Of the best validation during training: mean over the cases, NaN where none has foreground."""
    best_epoch: int
    """Whose weights were kept."""
    epochs: int
    """Epochs trained."""

    @property
    def dice(self) -> float:
        """Mean Dice of :attr:`table`."""
        return self.table.mean("dice")


class Trainer:
    """Trains one network on one fold and leaves a run folder behind.

    Every random choice is a function of the seed and the step, so a run that was interrupted and resumed ends with the
    same weights, on CPU bit for bit, as one that was not.

    Args:
        config: what to do; what it leaves open is filled in when the data are known.
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
        self.config = replace(config, engine=resolve_engine(config.engine))
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
        with memory_errors():
            fabric = start_engine(self.config.engine)
            main = fabric.is_global_zero
            with RunLog(enabled=main) as log, Display(quiet=not main) as display:
                return self._fit(fabric, display, log)

    def dry_run(self) -> Plan:
        """Read everything, build everything, train one step and validate one case.

        No run is left behind, only the cache of preprocessed scans.
        """
        with memory_errors():
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
        def read() -> tuple[Prepared, list[CachedCase], list[CachedCase]]:
            known = None if self.resume is None else self.resume.dataset()
            prepared = prepare(self.config, known=known, progress=display.preparing)
            return prepared, *prepare_cases(prepared, self.config, progress=display.preparing)

        prepared, train, val = on_first_process(fabric, read)
        if fabric.local_rank == 0 and not fabric.is_global_zero:
            # Another machine may have a cache of its own.
            train, val = prepare_cases(prepared, self.config)
        fabric.barrier()
        if self.resume is None:
            self.config = resolve(self.config, prepared.plan)
        display.prepared()
        if not _has_foreground(val):
            _LOG.warning(
                "no validation case of fold %d has foreground: there is no Dice, the last weights count as the best",
                self.config.data.fold,
            )
        return prepared, train, val

    def _fit(self, fabric: Fabric, display: Display, log: RunLog) -> TrainResult:
        prepared, train, val = self._prepare(fabric, display)
        session = Session(self.config, prepared, fabric, [*train, *val])
        folder = on_first_process(fabric, lambda: self._open_folder(prepared, log))
        if self.resume is None:
            _LOG.info("%s", prepared.fingerprint.summary())
        else:
            self._restore(session, folder)  # what cannot be restored leaves the run's status as it is
        try:
            _LOG.info("run folder %s\n%s", folder.path, prepared.plan.summary())
            on_first_process(fabric, lambda: _write_status(folder, session, "running"))
            with stop_signals(self.stop):
                self._epochs(session, folder, train, val, display)
                table = self._finish(session, folder, val)
            on_first_process(fabric, lambda: _write_status(folder, session, "finished"))
        except BaseException as error:
            if fabric.is_global_zero:
                state = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
                message = str(error) or type(error).__name__
                with contextlib.suppress(LungkitError, OSError):  # a full disk: the first error says more
                    _write_status(folder, session, state, message=message)
            raise
        best = math.nan if session.position.best_dice is None else session.position.best_dice
        result = TrainResult(folder.path, table, best, session.best_epoch, session.epoch)
        told = "undefined" if math.isnan(best) else f"{result.dice:.4f}"
        _LOG.info("best validation Dice %s; everything is in %s", told, folder.path)
        return result

    def _open_folder(self, prepared: Prepared, log: RunLog) -> RunFolder:
        folder = self.resume
        if folder is None:
            # The dataset's name comes from a file: only what is harmless in the name of a folder is kept.
            dataset = re.sub(r"[^a-z0-9_.]+", "-", prepared.dataset.name.lower()).strip("-.") or "run"
            name = self.config.name or f"{dataset}-{self.config.model.name}"
            folder = RunFolder.create(self.config.runs, name)
            folder.write_description(config_to_yaml(self.config), prepared.to_dict(), prepared.splits)
        log.open(folder.path / "train.log")
        return folder

    def _restore(self, session: Session, folder: RunFolder) -> None:
        def load() -> Checkpoint:
            for name in (LAST, BEST):
                recover_checkpoint(folder.checkpoints / name)
            checkpoint = load_checkpoint(folder.checkpoints / self.checkpoint)
            session.restore(checkpoint)
            return checkpoint

        checkpoint = on_first_process(session.fabric, load)
        if not session.fabric.is_global_zero:
            session.restore(checkpoint)
        _LOG.info("continuing after step %d of %d", session.position.step, session.plan.total_steps)

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
                    _save_and_stop(session, folder)
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
        position, plan, fabric = session.position, session.plan, session.fabric
        loss = session.epoch_loss()
        if not math.isfinite(loss):
            on_first_process(fabric, lambda: _raise_divergence(session, loss))
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
                # Without any foreground to find, a mean would only say whether something was found none the less.
                mean = table.mean(metric) if _has_foreground(val) else math.nan
                row[f"val_{metric}"] = None if math.isnan(mean) else mean
            dice = row["val_dice"]
            improved = dice is not None and (position.best_dice is None or dice > position.best_dice)
            if improved:
                position.best_dice, position.best_epoch = dice, session.epoch
        session.begin_epoch(row)

        def save() -> None:
            if improved or (last_epoch and position.best_dice is None):
                session.save(folder, BEST)
            session.save(folder, LAST)
            folder.write_metrics(position.rows)
            self._draw_curves(session, folder)
            _write_status(folder, session, "running")

        on_first_process(fabric, save)
        display.end_epoch(row, plan.epochs)
        if self.on_epoch_end is not None:
            self.on_epoch_end(row)
        if not last_epoch and self._must_stop(session):
            on_first_process(fabric, lambda: _raise_stopped(session, folder))

    def _draw_curves(self, session: Session, folder: RunFolder, *, now: bool = False) -> None:
        # A picture takes as long as many steps of a small network.
        if now or time.monotonic() - self._drawn > _SECONDS_BETWEEN_CURVES:
            save_curves(folder.path / "progress.png", session.position.rows)
            self._drawn = time.monotonic()

    def _stop_in_validation(self, session: Session, folder: RunFolder) -> None:
        # Several processes have different numbers of cases, and finish their validation before they agree to stop.
        if session.fabric.world_size == 1 and self._stop.is_set():
            _save_and_stop(session, folder)

    def _stop_in_final_validation(self, session: Session, folder: RunFolder) -> None:
        if session.fabric.world_size == 1 and self._stop.is_set():
            raise Interrupted(
                f"stopped after all epochs, which are saved; --resume {folder.path} measures the validation cases"
            )

    def _finish(self, session: Session, folder: RunFolder, val: list[CachedCase]) -> CaseTable:
        """Measure and draw the validation cases with the best weights, on the scans' own grid."""
        prepared, fabric = session.prepared, session.fabric
        best = on_first_process(
            fabric, lambda: load_checkpoint(folder.checkpoints / BEST, with_trainer=False)
        )
        session.evaluated.load_state_dict(best.weights)
        grid = grid_of_scans(prepared.dataset, prepared.preprocessing, max_voxels=self.config.data.max_voxels)
        after_case = partial(self._stop_in_final_validation, session, folder)
        notes, extra = [grid.note], {"epoch": session.best_epoch, "grid": grid.note}
        predicted: Predict = predict
        if self.config.choose_postprocessing:
            choice = choose_for_run(session, folder, val, after_case=after_case)
            notes, extra["postprocessing"] = [*notes, choice.note], choice.options.to_dict()
            predicted = choice.predict(prepared.preprocessing)
        table = session.validate(val, current=False, grid=grid, predict=predicted, after_case=after_case)

        def write() -> None:
            self._draw_curves(session, folder, now=True)
            write_case_table(folder.path, table, name="validation", notes=notes, extra=extra)
            with fabric.autocast():
                draw_overlays(
                    folder.overlays, session.evaluated, val, session.plan, table, grid=grid, predict=predicted
                )
            _LOG.info(
                "validation with the weights of epoch %d\n%s\n%s",
                session.best_epoch,
                format_case_table(table),
                "\n".join(notes),
            )

        on_first_process(fabric, write)
        return table


def _has_foreground(cases: Sequence[CachedCase]) -> bool:
    return any(sum(case.class_voxels[1:]) for case in cases)


def _write_status(folder: RunFolder, session: Session, state: str, **details: Any) -> None:
    position = session.position
    folder.write_status(
        state,
        epoch=session.epoch,
        epochs=session.plan.epochs,
        best_dice=position.best_dice,
        best_epoch=session.best_epoch,
        **details,
    )


def _save_and_stop(session: Session, folder: RunFolder) -> None:
    def save() -> None:
        session.save(folder, LAST)
        _raise_stopped(session, folder)

    on_first_process(session.fabric, save)


def _raise_stopped(session: Session, folder: RunFolder) -> NoReturn:
    position, plan = session.position, session.plan
    where = f"step {position.step} of {plan.total_steps}"
    if not position.loss_count:
        where = f"epoch {session.epoch} of {plan.epochs}"
    raise Interrupted(f"stopped after {where} and saved; continue with --resume {folder.path}")


def _raise_divergence(session: Session, loss: float) -> NoReturn:
    raise LungkitError(
        f"training diverged in epoch {session.epoch}: the loss is {loss}; lower "
        f"optimiser.learning_rate (now {session.plan.learning_rate:g}) or use engine.precision fp32"
    )
