"""What a person sees while a run goes on: bars on a terminal, otherwise one line an epoch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lungkit._terminal import progress_bars, shows_progress

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LOG = logging.getLogger("lungkit")
_REFRESH_SECONDS = 0.25
_EPOCHS_AVERAGED = 5


class Display:
    """Progress of one run on standard error; ``quiet`` for all processes but the first."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._shown = 0.0
        self._epochs: list[float] = []  # seconds of each

    def __enter__(self) -> Display:
        if not self._quiet and shows_progress():
            self._bars = progress_bars()
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def preparing(self, what: str, done: int, total: int) -> None:
        """Cases read or preprocessed so far."""
        if self._bars is None:
            if done == total and not self._quiet:
                _LOG.info("%s: %d cases", what, total)
            return
        self._show(what, total)
        self._update(completed=done, force=done == total)

    def prepared(self) -> None:
        """The cases are ready."""
        self._remove()

    def start_epoch(self, epoch: int, epochs: int | None, steps: int, step: int) -> None:
        """An epoch of ``steps`` steps begins, or goes on after a resume, at global step ``step``."""
        if epochs is None or epoch <= epochs:
            self._remove()
            self._show(f"epoch {_of(epoch, epochs)}", steps)
            self._update(completed=step % steps, force=True)

    def step(self, loss: Callable[[], float]) -> None:
        """A step is done; ``loss`` is only asked for where it is shown, since that may wait for the GPU."""
        if self._bars is None or self._task is None:
            return
        self._bars.advance(self._task)
        if time.monotonic() - self._shown > _REFRESH_SECONDS:
            head = self._bars.tasks[-1].description.split("  ")[0]
            self._update(description=f"{head}  loss {loss():.4f}", force=True)

    def validating(self) -> None:
        """The validation of an epoch begins."""
        if self._bars is not None and self._task is not None:
            self._update(description=f"{self._bars.tasks[-1].description}  validating", force=True)

    def end_epoch(self, row: dict[str, Any], epochs: int | None, seconds_left: float | None = None) -> None:
        """Log one line with the epoch's numbers, and the time that those to come will take like the last few.

        ``seconds_left`` is what a run of limited time has left.
        """
        if self._quiet:
            return
        dice = row.get("val_dice")
        seconds = (
            row["seconds_computing"] + row["seconds_waiting_for_data"] + row.get("seconds_validating", 0.0)
        )
        self._epochs.append(seconds)
        few = self._epochs[-_EPOCHS_AVERAGED:]
        left = seconds_left or 0.0
        if epochs is not None:
            to_come = (epochs - row["epoch"]) * sum(few) / len(few)
            left = to_come if seconds_left is None else min(left, to_come)
        _LOG.info(
            "epoch %s  loss %.4f  %s  lr %.2e  %.1f s (%.1f waiting for data, %.1f validating)%s",
            _of(row["epoch"], epochs),
            row["train_loss"],
            "not validated" if dice is None else f"val Dice {dice:.4f}",
            row["learning_rate"],
            seconds,
            row["seconds_waiting_for_data"],
            row.get("seconds_validating", 0.0),
            f"  {_duration(left)} left" if left > 0 else "",
        )

    def _show(self, description: str, total: int) -> None:
        if self._bars is None:
            return
        if self._task is not None and self._bars.tasks[-1].description != description:
            self._remove()
        if self._task is None:
            self._task = self._bars.add_task(description, total=total)

    def _update(self, *, force: bool = False, **changes: Any) -> None:
        if self._bars is None or self._task is None:
            return
        if force or time.monotonic() - self._shown > _REFRESH_SECONDS:
            self._shown = time.monotonic()
            self._bars.update(self._task, **changes)

    def _remove(self) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None


def _of(epoch: int, epochs: int | None) -> str:
    return str(epoch) if epochs is None else f"{epoch}/{epochs}"


def _duration(seconds: float) -> str:
    """Example: ``_duration(4000)`` is "1 h 07 min"."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"
