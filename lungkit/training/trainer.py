"""Training as a whole: data, network and run folder are put together, trained, measured."""

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
from typing import TYPE_CHECKING, Any

from lungkit._atomic import write_text_atomic
from lungkit._temporary import remove_leftovers
from lungkit.checkpoint import BEST, LAST, Checkpoint, load_checkpoint, recover_checkpoint
from lungkit.data import CachedCase
from lungkit.errors import Interrupted, LungkitError, UsageError
from lungkit.inference import TrainedModel
from lungkit.metrics import CaseTable
from lungkit.training.config import TrainConfig
from lungkit.training.config_io import config_to_yaml, flat_options, load_config
from lungkit.training.engine import (
    describe_engine,
    memory_errors,
    on_every_process,
    on_first_process,
    resolve_engine,
    start_engine,
)
from lungkit.training.finishing import finish
from lungkit.training.initialisation import load_initial
from lungkit.training.loggers import RunLogger, check_logger, open_logger
from lungkit.training.planning import Plan, Prepared, fill_cache, prepare, prepare_cases, resolve
from lungkit.training.progress import Display
from lungkit.training.run import Run, has_foreground
from lungkit.training.run_folder import RunFolder
from lungkit.training.run_log import RunLog
from lungkit.training.session import Session
from lungkit.training.signals import stop_signals

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_LOG = logging.getLogger("lungkit")


@dataclass(frozen=True)
class TrainResult:
    """What :meth:`Trainer.fit` gives back."""

    run_folder: Path
    table: CaseTable
    """Metrics of every validation case with the best weights, as ``lungkit-predict`` and ``lungkit-evaluate`` give."""
    best_dice: float
    """Of the best epoch, on the grid of training: mean over the cases, NaN where none has foreground."""
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

    A run, finished or not, can be resumed with another number of epochs. From the step at which it is resumed its
    learning rate is that of a run of so many epochs from the start. With the constant schedule it so ends with the
    weights of such a run; with the others the steps already done had a smaller rate, which now rises to the new curve.

    Args:
        config: what to do; what it leaves open is filled in when the data are known.
        resume: folder of a run to continue; ``config`` must be the run's own (:func:`load_config`).
        checkpoint: which checkpoint to continue from, "last" or "previous".
        on_epoch_end: called after every epoch with its row of ``metrics.csv``; may call :meth:`stop`.
        clock: seconds that only grow, by which ``max_minutes`` are counted.

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config.validate()
        check_logger(config.logger)
        self.config = replace(config, engine=resolve_engine(config.engine))
        self.resume = None if resume is None else RunFolder.open(resume)
        self.checkpoint = checkpoint
        self.on_epoch_end = on_epoch_end
        self.clock = clock
        self._stop = threading.Event()

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        *,
        epochs: int | None = None,
        checkpoint: str = LAST,
        clock: Callable[[], float] = time.monotonic,
    ) -> Trainer:
        """A trainer that continues the run in folder ``run``, to ``epochs`` in all where that is given."""
        config = load_config(RunFolder.open(run).path / "config.yaml")
        config = replace(config, epochs=epochs or config.epochs)
        return cls(config, resume=run, checkpoint=checkpoint, clock=clock)

    def stop(self) -> None:
        """Ask the run to save itself and end with :class:`~lungkit.errors.Interrupted` after the current step."""
        self._stop.set()

    def fit(self) -> TrainResult:
        """Train to the end, or from where the run to resume was.

        What goes on is logged to the logger "lungkit": to standard error where the program has set up no logging.

        Raises:
            Interrupted: :meth:`stop`, Ctrl-C or SIGTERM; the state is saved.
            UsageError, DataError, CheckpointError, ResourceError: see :mod:`lungkit.errors`.
        """
        with memory_errors():
            fabric = start_engine(self.config.engine)
            main = fabric.is_global_zero
            with RunLog(enabled=main) as log, Display(quiet=not main) as display:
                if self.resume is None:
                    RunFolder.check_root(self.config.runs)
                return self._fit(fabric, display, log)

    def dry_run(self) -> Plan:
        """Read everything, build everything, train one step and validate one case.

        No run is left behind, only the cache of preprocessed scans.
        """
        with memory_errors():
            fabric = start_engine(self.config.engine)
            with Display(quiet=not fabric.is_global_zero) as display:
                initial = self._load_initial(fabric)
                prepared, train, val = self._prepare(fabric, display, initial)
                session = Session(self.config, prepared, fabric, [*train, *val], initial=initial)
                with session.batches(train, first_step=0, last_step=1) as batches:
                    for step, images, labels in batches:
                        session.train_step(step, images, labels)
                session.validate(val[:1])
        return prepared.plan

    def _load_initial(self, fabric: Fabric) -> TrainedModel | None:
        """The model that a new run begins with; a run that goes on has its own weights."""
        if self.resume is not None or self.config.init.model is None:
            return None
        # It may lie on a disk that the first process alone can see.
        return on_first_process(fabric, lambda: load_initial(self.config.init))

    def _prepare(
        self, fabric: Fabric, display: Display, initial: TrainedModel | None
    ) -> tuple[Prepared, list[CachedCase], list[CachedCase]]:
        def read() -> Prepared:
            known = None if self.resume is None else self.resume.dataset()
            return prepare(self.config, known=known, initial=initial, progress=display.preparing)

        prepared = on_first_process(fabric, read)
        rank, world_size = fabric.global_rank, fabric.world_size
        if world_size > 1:
            share = partial(fill_cache, rank=rank, world_size=world_size, progress=display.preparing)
            on_every_process(fabric, lambda: share(prepared, self.config))
        # Of several processes the first finds what all have made.
        train, val = on_first_process(
            fabric, lambda: prepare_cases(prepared, self.config, progress=display.preparing)
        )
        if fabric.local_rank == 0 and not fabric.is_global_zero:
            # Another machine may have a cache of its own.
            train, val = prepare_cases(prepared, self.config)
        fabric.barrier()
        if self.resume is None:
            self.config = resolve(self.config, prepared.plan)
        display.prepared()
        if not has_foreground(val):
            _LOG.warning(
                "no validation case of fold %d has foreground: there is no Dice, the last weights count as the best",
                self.config.data.fold,
            )
        return prepared, train, val

    def _fit(self, fabric: Fabric, display: Display, log: RunLog) -> TrainResult:
        initial = self._load_initial(fabric)
        prepared, train, val = self._prepare(fabric, display, initial)
        session = Session(self.config, prepared, fabric, [*train, *val], initial=initial)
        folder = on_first_process(fabric, lambda: self._open_folder(prepared, log))
        if self.resume is None:
            _LOG.info("%s", prepared.fingerprint.summary())
        else:
            self._restore(session, folder)  # what cannot be restored leaves the run's status as it is
            on_first_process(fabric, lambda: self._extend(session, folder))
        logger = RunLogger(None)
        if fabric.is_global_zero:
            logger = open_logger(self.config.logger, folder, next_step=session.position.step)
        logger.begin(flat_options(self.config))
        reports = [report for report in (logger.epoch, self.on_epoch_end) if report is not None]
        report = _all_of(reports)
        run = Run(
            session, folder, train, val, display, stop=self._stop, on_epoch_end=report, clock=self.clock
        )
        try:
            _LOG.info("run folder %s\n%s", folder.path, prepared.plan.summary())
            _LOG.info(
                "on %s; data: %s", describe_engine(fabric, self.config.engine), _describe_data(self.config)
            )
            on_first_process(fabric, lambda: run.write_status("running"))
            with stop_signals(self.stop):
                run.epochs()
                table = finish(run)
            on_first_process(fabric, lambda: run.write_status("finished"))
            logger.measured({name: table.mean(name) for name in table.metrics}, folder, session.position.step)
            logger.end("finished")
        except BaseException as error:
            if fabric.is_global_zero:
                state = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
                message = str(error) or type(error).__name__
                with contextlib.suppress(LungkitError, OSError):  # a full disk: the first error says more
                    run.write_status(state, message=message)
                logger.end(state)
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
            description = config_to_yaml(self.config), prepared.to_dict(), prepared.splits
            folder = RunFolder.create(self.config.runs, name, lambda new: new.write_description(*description))
        log.open(folder.path / "train.log")
        remove_leftovers(folder.path)
        return folder

    def _restore(self, session: Session, folder: RunFolder) -> None:
        def load() -> Checkpoint | None:
            for name in (LAST, BEST):
                recover_checkpoint(folder.checkpoints / name)
            if self.checkpoint == LAST and folder.has_saved_nothing:
                return None
            checkpoint = load_checkpoint(folder.checkpoints / self.checkpoint)
            session.restore(checkpoint)
            # A kill between the checkpoint and the table loses no row of it.
            folder.write_metrics(session.position.rows)
            return checkpoint

        checkpoint = on_first_process(session.fabric, load)
        if checkpoint is None:
            _LOG.info(
                "nothing was saved yet: starting from the beginning; the run is of %s", session.plan.budget
            )
            return
        if not session.fabric.is_global_zero:
            session.restore(checkpoint)
        _LOG.info("continuing after step %d; the run is of %s", session.position.step, session.plan.budget)

    def _extend(self, session: Session, folder: RunFolder) -> None:
        """Write down that the run is to train longer (or shorter) than it was told; for the first process."""
        path = folder.path / "config.yaml"
        saved = load_config(path)
        if (saved.epochs, saved.patience) == (self.config.epochs, self.config.patience):
            return
        if saved.epochs != self.config.epochs:
            if saved.max_minutes is not None:
                raise UsageError(
                    f"epochs: {folder.path} trains for {saved.max_minutes:g} minutes, which --resume cannot change; "
                    f"start a new run with --init {folder.path}"
                )
            total = session.plan.total_steps
            if total is None or total < session.position.step:
                raise UsageError(
                    f"epochs is {self.config.epochs}, but {folder.path} has trained {session.epoch} already; give "
                    "more, as they are counted from its start"
                )
        # The configuration alone says how long a run trains; dataset.json keeps what was planned at first.
        config = replace(saved, epochs=self.config.epochs, patience=self.config.patience)
        write_text_atomic(path, config_to_yaml(config))


def _all_of(reports: Sequence[Callable[[dict[str, Any]], None]]) -> Callable[[dict[str, Any]], None]:
    def report(row: dict[str, Any]) -> None:
        for one in reports:
            one(row)

    return report


def _describe_data(config: TrainConfig) -> str:
    if config.data.root is not None:
        return config.data.root
    return f"the built-in phantom of {config.data.phantom_cases} slices, as data.root (--data DIR) is not set"
