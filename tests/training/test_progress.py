"""What a person sees: bars on a terminal, one line an epoch elsewhere, nothing of the other processes."""

from __future__ import annotations

import io
import logging

import pytest

from lungkit.training.progress import Display

ROW = {
    "epoch": 1,
    "train_loss": 0.5,
    "val_dice": 0.75,
    "learning_rate": 1e-3,
    "seconds_computing": 3.0,
    "seconds_waiting_for_data": 1.0,
    "seconds_validating": 2.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_an_epoch(display: Display) -> None:
    with display:
        display.preparing("reading scans", 4, 4)
        display.prepared()
        display.start_epoch(1, 2, steps=2, step=0)
        for _ in range(2):
            display.step(lambda: 0.5)
        display.validating()
        display.end_epoch(ROW, 2)


def test_a_terminal_has_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal)
    run_an_epoch(Display())
    shown = terminal.getvalue()
    assert "epoch 1/2" in shown
    assert "2/2" in shown
    assert "validating" in shown


def test_elsewhere_an_epoch_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = io.StringIO()
    monkeypatch.setattr("sys.stderr", file)
    caplog.set_level(logging.INFO, logger="lungkit")
    run_an_epoch(Display())
    assert "\x1b" not in file.getvalue()
    assert caplog.messages == [
        "reading scans: 4 cases",
        "epoch 1/2  loss 0.5000  val Dice 0.7500  lr 1.00e-03  6.0 s (1.0 waiting for data, 2.0 validating)  6 s left",
    ]


def test_the_loss_is_not_fetched_where_it_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with Display() as display:
        display.start_epoch(1, 2, steps=2, step=0)
        display.step(lambda: pytest.fail("waited for the loss"))


def test_other_processes_show_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    caplog.set_level(logging.INFO, logger="lungkit")
    run_an_epoch(Display(quiet=True))
    assert terminal.getvalue() == ""
    assert caplog.messages == []


def test_the_time_left_is_that_of_the_last_epochs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lungkit")
    display = Display()
    for epoch, seconds in ((1, 10_000.0), *((epoch, 120.0) for epoch in range(2, 7))):
        display.end_epoch({**ROW, "epoch": epoch, "seconds_computing": seconds - 3}, 100)
    assert caplog.messages[0].endswith("  275 h 00 min left")
    assert caplog.messages[-1].endswith("  3 h 08 min left")
    display.end_epoch({**ROW, "epoch": 100}, 100)
    assert caplog.messages[-1].endswith("validating)")
