"""Runs of limited time: the schedule ends when the time does, by a clock that the tests move."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lungkit.errors import Interrupted
from lungkit.training import TrainConfig, Trainer, load_checkpoint
from lungkit.training.schedule import learning_rate_factor
from lungkit.training.session import Session
from lungkit.training.time_budget import Pace, TimeBudget

Tiny = Callable[..., TrainConfig]


class Clock:
    """Seconds that pass where a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Every step takes a second, every validation two; nothing else takes any."""
    clock, step, validate = Clock(), Session.train_step, Session.validate

    def slow_step(self: Session, *arguments: Any) -> None:
        step(self, *arguments)
        clock.now += 1

    def slow_validate(self: Session, *arguments: Any, **options: Any) -> Any:
        clock.now += 2
        return validate(self, *arguments, **options)

    monkeypatch.setattr(Session, "train_step", slow_step)
    monkeypatch.setattr(Session, "validate", slow_validate)
    monkeypatch.setattr("lungkit.training.run.save_curves", lambda *args: None)
    monkeypatch.setattr("lungkit.training.finishing.draw_overlays", lambda *args, **options: None)
    return clock


def rows_of(trainer: Trainer) -> list[dict[str, Any]]:
    folder = trainer.fit().run_folder
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_budget(seconds: float, step_seconds: Callable[[int], float]) -> list[float]:
    """The share at every step of a run whose step s takes ``step_seconds(s)``; looks at the clock after each."""
    clock, shares = Clock(), []
    budget = TimeBudget(seconds, Pace(), steps_per_epoch=1000, total_steps=None, clock=clock)
    while not budget.pace.is_over(len(shares)):
        shares.append(budget.pace.share(len(shares)))
        clock.now += step_seconds(len(shares))
        budget.after_steps(len(shares), 1)
    assert clock.now - 100 <= seconds + step_seconds(len(shares))
    return shares


@pytest.mark.parametrize(
    "step_seconds",
    [lambda step: 1.0, lambda step: 1.0 if step < 50 else 3.0, lambda step: 30.0 if step == 1 else 1.0],
    ids=["steady", "slower from half the way on", "a slow first step"],
)
def test_the_share_never_falls_and_ends_where_the_time_does(step_seconds: Callable[[int], float]) -> None:
    shares = run_budget(100, step_seconds)
    assert shares == sorted(shares)
    assert 0.9 < shares[-1] < 1
    steps = [later - earlier for earlier, later in pairwise(shares)]
    assert max(steps) < 0.06  # no jump


def test_fewer_steps_than_there_is_time_for_are_the_end() -> None:
    clock = Clock()
    budget = TimeBudget(1000, Pace(), steps_per_epoch=5, total_steps=20, clock=clock)
    for step in range(1, 11):
        clock.now += 1
        budget.after_steps(step, 1)
    assert budget.pace.last_step == 20
    assert budget.pace.share(15) == pytest.approx(0.75)


def test_a_run_ends_with_its_time_validations_included(tiny: Tiny, clock: Clock) -> None:
    rows = rows_of(
        Trainer(tiny(epochs=None, max_minutes=1, steps_per_epoch=10, validate_every=1), clock=clock)
    )
    # (1 step a second for 10 s, 2 s of validation) five times: what is then left is not enough for a step and another.
    assert clock.now == 100 + 60 and rows[-1]["step"] == 50
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]


def test_an_epoch_that_the_time_cuts_short_is_validated_and_numbered(tiny: Tiny, clock: Clock) -> None:
    rows = rows_of(
        Trainer(tiny(epochs=None, max_minutes=0.5, steps_per_epoch=16, validate_every=3), clock=clock)
    )
    assert [(row["epoch"], row["step"], "val_dice" in row) for row in rows] == [(1, 16, False), (2, 30, True)]


def test_validations_take_a_tenth_of_the_time_where_their_number_is_open(tiny: Tiny, clock: Clock) -> None:
    rows = rows_of(Trainer(tiny(epochs=None, max_minutes=2, steps_per_epoch=8), clock=clock))
    # 2 s of validation are a tenth of 20 steps, so it follows every third epoch of 8 steps, after the first one.
    assert clock.now == 100 + 120
    assert [row["epoch"] for row in rows if "val_dice" in row] == [1, 3, 6, 9, 12, 14]
    assert rows[-1]["step"] == 120 - 6 * 2


def test_a_resumed_run_validates_as_often(tiny: Tiny, clock: Clock, tmp_path: Path) -> None:
    trainer = Trainer(tiny(epochs=None, max_minutes=1, steps_per_epoch=8, name="parts"), clock=clock)
    trainer.on_epoch_end = lambda row: trainer.stop() if row["epoch"] == 2 else None
    with pytest.raises(Interrupted):
        trainer.fit()
    rows = rows_of(Trainer.from_run(tmp_path / "runs" / "parts", clock=clock))
    assert [row["epoch"] for row in rows if "val_dice" in row] == [1, 3, 6, 7]


def test_the_learning_rate_ends_near_zero(tiny: Tiny, clock: Clock) -> None:
    rows = rows_of(Trainer(tiny(epochs=None, max_minutes=1, steps_per_epoch=10), clock=clock))
    assert rows[-1]["learning_rate"] < 0.06 * 2e-3 < 0.5 * rows[1]["learning_rate"]


def test_a_resumed_run_has_what_was_left_and_ends_with_the_same_bits(tiny: Tiny, clock: Clock) -> None:
    options = {"epochs": None, "max_minutes": 0.5, "steps_per_epoch": 12}
    whole = Trainer(tiny(**options), clock=clock).fit().run_folder
    parts = Trainer(tiny(**options, name="parts"), clock=clock)
    parts.on_epoch_end = lambda row: parts.stop()
    with pytest.raises(Interrupted, match="after epoch 1 and saved"):
        parts.fit()
    clock.now += 10_000
    resumed = Trainer.from_run(whole.parent / "parts", clock=clock).fit().run_folder
    first, other = (load_checkpoint(run / "checkpoints" / "last") for run in (whole, resumed))
    assert first.trainer and other.trainer
    assert first.trainer["position"]["step"] == other.trainer["position"]["step"] > 12
    assert all(torch.equal(value, other.weights[name]) for name, value in first.weights.items())


def test_a_run_whose_time_was_up_stays_so(tiny: Tiny, clock: Clock) -> None:
    first = Trainer(tiny(epochs=None, max_minutes=0.2, steps_per_epoch=5), clock=clock).fit()
    assert Trainer.from_run(first.run_folder, clock=clock).fit().epochs == first.epochs


def test_epochs_end_a_run_that_has_time_left(tiny: Tiny, clock: Clock) -> None:
    assert Trainer(tiny(epochs=2, max_minutes=60), clock=clock).fit().epochs == 2


def test_without_a_limit_the_rates_are_those_of_the_steps_bit_for_bit(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = Session.train_step

    def noted(self: Session, *arguments: Any) -> None:
        step(self, *arguments)
        rates.append(self.learning_rate)

    monkeypatch.setattr(Session, "train_step", noted)
    folder = Trainer(tiny(epochs=2)).fit().run_folder
    factors = [learning_rate_factor(s, 4, schedule="polynomial", warmup_steps=3) for s in range(4)]
    assert rates == [2e-3 * factor for factor in factors]
    trainer = load_checkpoint(folder / "checkpoints" / "last").trainer
    assert trainer and trainer["position"]["pace"]["seconds"] == 0
