"""The loop of a run: when it ends, what it writes after every epoch, what is left when it fails."""

from __future__ import annotations

import json

import pytest

from lungkit.errors import LungkitError, ResourceError
from lungkit.training import Trainer, load_checkpoint
from lungkit.training.session import Session


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures take most of the time of a tiny run."""
    monkeypatch.setattr("lungkit.training.run.save_curves", lambda *args: None)
    monkeypatch.setattr("lungkit.training.finishing.draw_overlays", lambda *args, **options: None)


def idle_step(self, step, images, labels):
    """A step that learns nothing."""
    self.position.step = step + 1
    self.position.loss_count += 1


def test_stops_early_without_progress(tiny, monkeypatch):
    monkeypatch.setattr(Session, "train_step", idle_step)
    result = Trainer(tiny(patience=2)).fit()
    assert result.epochs == 3 and result.best_epoch == 1


def test_a_run_that_stopped_early_stays_stopped(tiny, monkeypatch):
    monkeypatch.setattr(Session, "train_step", idle_step)
    first = Trainer(tiny(patience=2)).fit()
    again = Trainer.from_run(first.run_folder).fit()
    assert again.epochs == 3


def test_validates_only_as_often_as_asked(tiny):
    result = Trainer(tiny(epochs=3, validate_every=2)).fit()
    rows = [json.loads(line) for line in (result.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert ["val_dice" in row for row in rows] == [False, True, True]


def test_a_loss_that_is_not_finite_ends_the_run(tiny, monkeypatch, tmp_path):
    def diverging(self, step, images, labels):
        idle_step(self, step, images, labels)
        self.loss_sum += float("nan")

    monkeypatch.setattr(Session, "train_step", diverging)
    with pytest.raises(LungkitError, match=r"diverged in epoch 1.*optimiser\.learning_rate"):
        Trainer(tiny()).fit()
    status = json.loads((tmp_path / "runs" / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "diverged" in status["message"]


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(tiny, monkeypatch, tmp_path):
    run, saves = tmp_path / "runs" / "run", []
    save = Session.save

    def filling(self, folder, name):
        saves.append(name)
        if self.epoch == 3:
            monkeypatch.setattr("lungkit.checkpoint.save_file", full)
        save(self, folder, name)

    def full(weights, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Session, "save", filling)
    with pytest.raises(ResourceError, match="disk or quota is full"):
        Trainer(tiny()).fit()
    monkeypatch.undo()
    assert load_checkpoint(run / "checkpoints" / "last").description["epoch"] == 2
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert Trainer.from_run(run).fit().epochs == 6


def test_time_waiting_for_data_is_told_from_time_computing(tiny):
    result = Trainer(tiny(epochs=1)).fit()
    row = json.loads((result.run_folder / "metrics.jsonl").read_text())
    assert row["seconds_computing"] > 0 and row["seconds_waiting_for_data"] >= 0
    assert row["seconds_validating"] > 0


def test_curves_are_drawn_at_the_end_and_not_after_every_quick_epoch(tiny, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "lungkit.training.run.save_curves", lambda path, rows: drawn.append((path.name, len(rows)))
    )
    Trainer(tiny(epochs=3)).fit()
    assert drawn == [("progress.png", 1), ("progress.png", 3)]
