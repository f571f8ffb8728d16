"""The loop of a run: epochs, the validation that ends each, checkpoints, reports."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from lungkit._allocator import release_free_memory
from lungkit.checkpoint import BEST, LAST
from lungkit.data import CachedCase
from lungkit.errors import Interrupted, LungkitError
from lungkit.report import save_curves
from lungkit.report.pictures import optional_picture
from lungkit.training.engine import on_first_process
from lungkit.training.progress import Display
from lungkit.training.run_folder import RunFolder
from lungkit.training.session import Session
from lungkit.training.time_budget import STEPS_BETWEEN_LOOKS, TimeBudget
from lungkit.training.validation import METRICS

_LOG = logging.getLogger("lungkit")

_STEPS_BETWEEN_VOTES = 8
_SECONDS_BETWEEN_CURVES = 20.0


class Run:
    """A run between its first step and its last, with what it works on.

    Args:
        session: network, optimiser, position.
        folder: where everything goes.
        train: cases to train on.
        val: cases to validate on.
        display: what a person sees.
        stop: set where the run is to save itself and end.
        on_epoch_end: called after every epoch with its row of ``metrics.csv``.
        clock: by which a limited time is counted.
    """

    def __init__(
        self,
        session: Session,
        folder: RunFolder,
        train: list[CachedCase],
        val: list[CachedCase],
        display: Display,
        *,
        stop: threading.Event,
        on_epoch_end: Callable[[dict[str, Any]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.session, self.folder, self.display = session, folder, display
        self.train, self.val = train, val
        self.fabric, self.plan = session.fabric, session.plan
        self._stop, self._on_epoch_end = stop, on_epoch_end
        self._clock = clock
        self._budget: TimeBudget | None = None
        self._steps_since_look = 0
        self._drawn = -math.inf

    def epochs(self) -> None:
        """Train to the end of the budget or of patience, from wherever the session is.

        Raises:
            Interrupted: asked to stop; the state is saved.
            LungkitError: the loss is not finite.
        """
        session, steps, position = self.session, self.plan.steps_per_epoch, self.session.position
        self._budget = self._start_clock()
        if position.loss_count and (position.step % steps == 0 or session.is_over):
            # The run was stopped between the last step of an epoch and the end of its validation.
            self._end_epoch()
        if self._is_over():
            return
        with session.batches(
            self.train, first_step=position.step, last_step=self.plan.total_steps or sys.maxsize
        ) as batches:
            self.display.start_epoch(session.epoch + 1, self.plan.epochs, steps, position.step)
            for step, images, labels in batches:
                started = time.perf_counter()
                session.train_step(step, images, labels)
                position.computed += time.perf_counter() - started
                position.waited, batches.waited = position.waited + batches.waited, 0.0
                self.display.step(lambda: session.mean_loss)
                self._look_at_clock()
                if self._must_stop():
                    session.gather()
                    on_first_process(self.fabric, self._save_and_stop)
                if position.step % steps == 0 or session.is_over:
                    self._end_epoch()
                    if self._is_over():
                        return
                    self.display.start_epoch(session.epoch + 1, self.plan.epochs, steps, position.step)

    def write_status(self, state: str, **details: Any) -> None:
        """Write ``status.json``; for the first process."""
        session = self.session
        self.folder.write_status(
            state,
            epoch=session.epoch,
            epochs=self.plan.epochs,
            best_dice=session.position.best_dice,
            best_epoch=session.best_epoch,
            **details,
        )

    def draw_curves(self, *, now: bool = True) -> None:
        """Draw ``progress.png``; ``now=False`` leaves it out where it was drawn a moment ago."""
        # A picture takes as long as many steps of a small network.
        if now or time.monotonic() - self._drawn > _SECONDS_BETWEEN_CURVES:
            with optional_picture(self.folder.path / "progress.png"):
                save_curves(self.folder.path / "progress.png", self.session.position.rows)
            self._drawn = time.monotonic()

    def stop_in_final_validation(self) -> None:
        """Give up between two cases of the final validation, where asked to stop."""
        if self._may_stop_alone():
            raise Interrupted(
                f"stopped after all epochs, which are saved; --resume {self.folder.path} measures the validation cases"
            )

    def _start_clock(self) -> TimeBudget | None:
        plan = self.plan
        if plan.max_minutes is None:
            return None
        return TimeBudget(
            60 * plan.max_minutes,
            self.session.position.pace,
            steps_per_epoch=plan.steps_per_epoch,
            validate_every=self.session.config.validate_every,
            total_steps=plan.total_steps,
            clock=self._clock,
        )

    def _look_at_clock(self) -> None:
        """Measure the last few steps, at steps that are the same for every process."""
        step = self.session.position.step
        self._steps_since_look += 1
        if (
            step % STEPS_BETWEEN_LOOKS == 0
            or step <= STEPS_BETWEEN_LOOKS
            or step % self.plan.steps_per_epoch == 0
        ):
            steps, self._steps_since_look = self._steps_since_look, 0
            self._count_time(lambda budget, done: budget.after_steps(done, steps))

    def _count_time(self, count: Callable[[TimeBudget, int], None]) -> None:
        """Bring the pace up to date; all processes go by the clock of the first."""
        budget, position = self._budget, self.session.position
        if budget is None:
            return
        count(budget, position.step)
        if self.fabric.world_size > 1:
            position.pace = budget.pace = self.fabric.broadcast(budget.pace)

    def _must_stop(self) -> bool:
        if self.fabric.world_size == 1:
            return self._stop.is_set()
        if self.session.position.step % _STEPS_BETWEEN_VOTES:
            return False
        # A signal may reach one process only, but all must stop at the same step.
        flag = torch.tensor(float(self._stop.is_set()), device=self.fabric.device)
        total = self.fabric.all_reduce(flag, reduce_op="sum")
        return isinstance(total, Tensor) and float(total) > 0

    def _may_stop_alone(self) -> bool:
        # Several processes have different numbers of cases, and finish their validation before they agree to stop.
        return self.fabric.world_size == 1 and self._stop.is_set()

    def _is_over(self) -> bool:
        """Whether all epochs are done, or patience is at its end."""
        session = self.session
        if session.is_over:
            return True
        validated = [row["val_dice"] for row in session.position.rows if row.get("val_dice") is not None]
        patience = session.config.patience
        if patience is None or not validated:
            return False
        since_best = len(validated) - 1 - max(range(len(validated)), key=validated.__getitem__)
        if since_best >= patience:
            _LOG.info("stopping early: no better Dice in %d validations", patience)
            return True
        return False

    def _end_epoch(self) -> None:
        """Validate, save, report."""
        session, position = self.session, self.session.position
        loss = session.epoch_loss()
        if not math.isfinite(loss):
            on_first_process(self.fabric, lambda: self._raise_divergence(loss))
        row: dict[str, Any] = {
            "epoch": session.epoch,
            "step": position.step,
            "train_loss": loss,
            "learning_rate": session.learning_rate,
            "seconds_waiting_for_data": round(position.waited, 3),
            "seconds_computing": round(position.computed, 3),
        }
        every = session.config.validate_every or position.pace.validate_every
        improved, validated = False, session.epoch % every == 0 or session.is_over
        if validated:
            improved = self._validate(row)
            self._count_time(TimeBudget.after_validation)
        last_epoch = session.is_over
        if last_epoch and not validated:
            improved = self._validate(row)
        session.begin_epoch(row)

        def save() -> None:
            if improved or (last_epoch and position.best_dice is None):
                session.save(self.folder, BEST)
            session.save(self.folder, LAST)
            self.folder.write_metrics(position.rows)
            self.draw_curves(now=False)
            self.write_status("running")

        session.gather()
        on_first_process(self.fabric, save)
        seconds_left = None
        if self._budget is not None:
            self._budget.spend()  # of the checkpoints; a validation or a step is measured without them
            seconds_left = 0.0 if last_epoch else self._budget.seconds_left
        release_free_memory()
        self.display.end_epoch(row, self.plan.epochs, seconds_left)
        if self._on_epoch_end is not None:
            self._on_epoch_end(row)
        if not last_epoch and self._must_stop():
            on_first_process(self.fabric, self._raise_stopped)

    def _validate(self, row: dict[str, Any]) -> bool:
        """Add the validation to the row of the epoch; whether it is the best so far."""
        position = self.session.position
        self.display.validating()
        started = time.perf_counter()
        table = self.session.validate(self.val, after_case=self._stop_in_validation)
        row["seconds_validating"] = round(time.perf_counter() - started, 3)
        for metric in METRICS:
            # Without any foreground to find, a mean would only say whether something was found none the less.
            mean = table.mean(metric) if has_foreground(self.val) else math.nan
            row[f"val_{metric}"] = None if math.isnan(mean) else mean
        dice = row["val_dice"]
        if dice is None or (position.best_dice is not None and dice <= position.best_dice):
            return False
        position.best_dice, position.best_epoch = dice, self.session.epoch
        return True

    def _stop_in_validation(self) -> None:
        if self._may_stop_alone():
            self._save_and_stop()

    def _save_and_stop(self) -> NoReturn:
        if self._budget is not None:
            self._budget.spend()
        self.session.save(self.folder, LAST)
        self._raise_stopped()

    def _raise_stopped(self) -> NoReturn:
        position = self.session.position
        where, total = f"step {position.step}", self.plan.total_steps
        if not position.loss_count:
            where, total = f"epoch {self.session.epoch}", self.plan.epochs
        where += "" if total is None else f" of {total}"
        raise Interrupted(f"stopped after {where} and saved; continue with --resume {self.folder.path}")

    def _raise_divergence(self, loss: float) -> NoReturn:
        raise LungkitError(
            f"training diverged in epoch {self.session.epoch}: the loss is {loss}; lower "
            f"optimiser.learning_rate (now {self.plan.learning_rate:g}) or use engine.precision fp32"
        )


def has_foreground(cases: Sequence[CachedCase]) -> bool:
    """Whether any case has a voxel of a class but the background."""
    return any(sum(case.class_voxels[1:]) for case in cases)
