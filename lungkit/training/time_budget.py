"""A run that is given minutes: what it has used, how many steps are left, and so where its schedule is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

STEPS_BETWEEN_LOOKS = 8
_FEWEST_STEPS = 3  # before their mean says how long a step takes
_SMALLEST_WEIGHT = 0.1  # of the last few steps in the running mean
_SHARE_OF_VALIDATIONS = 0.1  # of the time of training, where their number is left open


@dataclass
class Pace:
    """Where a run of limited time is; saved with every checkpoint.

    The schedule's share t goes on a straight line from what it is now to 1 at the step at which the time is up. Every
    look at the clock draws the rest of the line anew, so that t never falls and ends where the time does.

    Example:
        >>> pace = Pace(first_step=10, first_share=0.25, last_step=18)
        >>> pace.share(10), pace.share(14), pace.is_over(17), pace.is_over(18)
        (0.25, 0.625, False, True)
    """

    seconds: float = 0.0
    """Used so far: steps, validations and checkpoints."""
    step_seconds: float = 0.0
    """Of one step, a running mean."""
    steps_measured: int = 0
    validation_seconds: float = 0.0
    """Of the last validation."""
    validate_every: int = 1
    """Epochs between validations, where the configuration leaves it open."""
    first_step: int = 0
    """Where the line begins."""
    first_share: float = 0.0
    last_step: int | None = None
    """Steps of the run in all, as they look now; None where it is too early to tell."""

    def share(self, step: int) -> float:
        """t at ``step``, from 0 to 1."""
        if self.last_step is None:
            return self.first_share
        if step >= self.last_step:
            return 1.0
        done = (step - self.first_step) / (self.last_step - self.first_step)
        return self.first_share + (1 - self.first_share) * done

    def is_over(self, step: int) -> bool:
        """Whether the run ends before ``step``."""
        return self.last_step is not None and step >= self.last_step


class TimeBudget:
    """Measures a run and keeps its :class:`Pace`.

    The steps left are those that fit into the seconds left, with the validations between them and the one that ends the
    run. A step takes the mean of the steps measured, of many of them a running one that forgets in some 80 steps; the
    first step of a process, which compiles and fills caches, takes time but is not measured. A validation takes as long
    as the last one, nothing until there was one.

    Args:
        seconds: of the whole run.
        pace: where it is; changed.
        steps_per_epoch: of which one or several lie between validations.
        validate_every: epochs between validations; None decides at the first one.
        total_steps: steps after which the run ends though time be left; None where time alone ends it.
        clock: seconds that only grow, as ``time.monotonic``.

    Example:
        >>> times = iter([0.0, 5.0, 11.0])
        >>> budget = TimeBudget(101, Pace(), steps_per_epoch=1000, total_steps=None, clock=lambda: next(times))
        >>> budget.after_steps(1, 1)
        >>> budget.after_steps(7, 6)
        >>> budget.pace.step_seconds, budget.pace.last_step, round(budget.pace.share(52), 2)
        (1.0, 97, 0.5)
    """

    def __init__(
        self,
        seconds: float,
        pace: Pace,
        *,
        steps_per_epoch: int,
        validate_every: int | None = None,
        total_steps: int | None,
        clock: Callable[[], float],
    ) -> None:
        self.seconds, self.pace = seconds, pace
        self._steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        self._is_open = validate_every is None
        self._clock, self._looked = clock, clock()
        self._is_warm = False
        if pace.last_step is None:
            pace.last_step = total_steps
        if validate_every is not None:
            pace.validate_every = validate_every

    @property
    def validate_every(self) -> int:
        """Steps between validations."""
        return self._steps_per_epoch * self.pace.validate_every

    @property
    def seconds_left(self) -> float:
        """As of the last look at the clock."""
        return max(0.0, self.seconds - self.pace.seconds)

    def after_steps(self, step: int, steps: int) -> None:
        """``step`` steps are done in all, ``steps`` of them since the clock was looked at last."""
        passed, pace = self.spend(), self.pace
        if self._is_warm and steps:
            pace.steps_measured += steps
            weight = max(steps / pace.steps_measured, _SMALLEST_WEIGHT)
            pace.step_seconds += weight * (passed / steps - pace.step_seconds)
        self._is_warm = True
        self._plan(step, validation_due=step % self.validate_every == 0)

    def after_validation(self, step: int) -> None:
        """A validation has ended, nothing else was done since the clock was looked at last."""
        pace, is_first = self.pace, self.pace.validation_seconds == 0
        pace.validation_seconds = self.spend()
        if self._is_open and is_first and pace.step_seconds:
            of_epoch = pace.step_seconds * self._steps_per_epoch
            pace.validate_every = max(
                1, math.ceil(pace.validation_seconds / (_SHARE_OF_VALIDATIONS * of_epoch))
            )
        self._plan(step)

    def spend(self) -> float:
        """Count the seconds since the last look as used, and return them."""
        now = self._clock()
        passed, self._looked = now - self._looked, now
        self.pace.seconds += passed
        return passed

    def _plan(self, step: int, *, validation_due: bool = False) -> None:
        pace, left = self.pace, self.seconds - self.pace.seconds
        if pace.is_over(step):
            return  # the line is at its end: further steps would have a learning rate of zero
        share, last_step = pace.share(step), self.total_steps
        if left <= 0:
            last_step = step
        elif pace.steps_measured >= _FEWEST_STEPS:
            steps = self._steps_in(left - pace.validation_seconds if validation_due else left, step)
            last_step = step + steps if last_step is None else min(step + steps, last_step)
        pace.first_step, pace.first_share, pace.last_step = step, share, last_step

    def _steps_in(self, left: float, step: int) -> int:
        """Steps that fit into ``left`` seconds with the validations between them and the one after the last."""
        one, validation = max(self.pace.step_seconds, 1e-9), self.pace.validation_seconds
        until_next = self.validate_every - step % self.validate_every
        steps = 0
        if left - validation >= until_next * one:
            period = self.validate_every * one + validation
            left -= until_next * one + validation
            periods = math.floor(left / period)
            steps = until_next + periods * self.validate_every
            left -= periods * period
        return steps + max(0, math.floor((left - validation) / one))
