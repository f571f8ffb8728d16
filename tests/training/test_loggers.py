"""Runs logged to TensorBoard, MLflow and Weights & Biases as well, and loggers that fail."""

from __future__ import annotations

import csv
import logging
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lungkit.cli.train import main
from lungkit.errors import Interrupted, UsageError
from lungkit.training import Trainer
from lungkit.training.loggers import RunLogger, check_logger


@pytest.fixture(autouse=True)
def small_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time of a tiny run; one test has those that people see."""
    if "hold_scalars_pictures" not in request.node.name:
        from matplotlib.image import imsave

        def draw(folder: Path, *arguments: Any, **options: Any) -> None:
            imsave(folder / "worst.png", np.zeros((2, 2)))

        monkeypatch.setattr("lungkit.training.finishing.draw_overlays", draw)
        monkeypatch.setattr("lungkit.training.run.save_curves", lambda *arguments: None)


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def events(run: Path) -> Any:
    reading = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed (extra 'tensorboard')",
    )
    found = reading.EventAccumulator(
        str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0, "tensors": 0}
    )
    return found.Reload()


def test_event_files_of_tensorboard_hold_scalars_pictures_and_configuration(tiny: Any) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra 'tensorboard')")
    run = Trainer(tiny(epochs=2, logger="tensorboard")).fit().run_folder
    found, rows = events(run), rows_of(run)
    logged = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert logged == [(int(row["step"]), pytest.approx(float(row["train_loss"]))) for row in rows]
    assert found.Scalars("val/dice")[-1].value == pytest.approx(float(rows[-1]["val_dice"]))
    assert 0 <= found.Scalars("final/dice")[0].value <= 1
    names = found.Tags()["images"]
    assert "progress" in names and any(name.startswith("overlays/") for name in names)
    text = found.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| optimiser.warmup_steps | 3 |" in text
    assert b"best" in found.Tensors("model/text_summary")[0].tensor_proto.string_val[0]


def test_a_resumed_run_goes_on_in_the_same_event_files(tiny: Any) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra 'tensorboard')")
    config = tiny(epochs=3, logger="tensorboard")
    trainer = Trainer(config, on_epoch_end=lambda row: trainer.stop() if row["epoch"] == 1 else None)
    with pytest.raises(Interrupted):
        trainer.fit()
    run = Path(config.runs) / "run"
    Trainer.from_run(run).fit()
    assert [event.step for event in events(run).Scalars("train/loss")] == [2, 4, 6]


def test_mlflow_keeps_everything_in_a_local_store(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    for module in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(module, reason=f"{module} is not installed (extra 'mlflow')")
    from mlflow import MlflowClient

    config = tiny(epochs=2, logger="mlflow")
    trainer = Trainer(config, on_epoch_end=lambda row: trainer.stop() if row["epoch"] == 1 else None)
    with pytest.raises(Interrupted):
        trainer.fit()
    path = Trainer.from_run(Path(config.runs) / "run").fit().run_folder
    client = MlflowClient(tracking_uri=f"sqlite:///{path.parent / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("lungkit").experiment_id])
    assert (run.info.run_name, run.info.status) == (path.name, "FINISHED")
    assert run.data.params["model.features"] == "[4, 8]" and run.data.params["epochs"] == "2"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(one.step, one.value) for one in history] == [
        (int(row["step"]), pytest.approx(float(row["train_loss"]))) for row in rows_of(path)
    ]
    files = {
        file.path
        for folder in ("model", "overlays")
        for file in client.list_artifacts(run.info.run_id, folder)
    }
    assert "model/model.safetensors" in files and any(file.startswith("overlays/") for file in files)


class FakeWandb(types.ModuleType):
    """What lungkit calls of the wandb client."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.told: list[tuple[Any, ...]] = []
        self.config, self.id = self, "abc"

    def init(self, **options: Any) -> FakeWandb:
        self.told.append(("init", options))
        return self

    def update(self, options: dict[str, Any], allow_val_change: bool) -> None:
        self.told.append(("config", options))

    def log(self, values: dict[str, Any], step: int) -> None:
        self.told.append(("log", values, step))

    def log_artifact(self, artefact: Any) -> None:
        self.told.append(("artefact", artefact))

    def finish(self, exit_code: int) -> None:
        self.told.append(("finish", exit_code))

    def Image(self, path: str) -> str:
        return path

    def Artifact(self, name: str, type: str) -> Any:
        return types.SimpleNamespace(
            name=name, type=type, add_dir=lambda path: self.told.append(("model", path))
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_scalars_pictures_configuration_and_model(tiny: Any, wandb: FakeWandb) -> None:
    run = Trainer(tiny(epochs=1, logger="wandb")).fit().run_folder
    kinds = [entry[0] for entry in wandb.told]
    assert kinds[:3] == ["init", "config", "log"] and kinds[-3:] == ["model", "artefact", "finish"]
    assert wandb.told[0][1]["name"] == "run" and wandb.told[0][1]["id"] is None
    assert wandb.told[2][1]["train/loss"] == pytest.approx(float(rows_of(run)[0]["train_loss"]))
    assert any("overlays/" in str(entry[1]) for entry in wandb.told if entry[0] == "log")
    assert wandb.told[-1] == ("finish", 0)
    assert wandb.told[-3][1] == str(run / "checkpoints" / "best")


def test_a_run_that_fails_is_closed_as_such(tiny: Any, wandb: FakeWandb) -> None:
    def fail(row: dict[str, Any]) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        Trainer(tiny(epochs=1, logger="wandb"), on_epoch_end=fail).fit()
    assert wandb.told[-1] == ("finish", 1)


@pytest.mark.parametrize("call", ["init", "update", "log", "finish"])
def test_a_logger_that_fails_ends_no_training(
    tiny: Any, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(wandb, call, broken)
    with caplog.at_level(logging.WARNING, "lungkit"):
        run = Trainer(tiny(epochs=2, logger="wandb")).fit().run_folder
    assert len(rows_of(run)) == 2
    warnings = [record.getMessage() for record in caplog.records if "wandb" in record.getMessage()]
    assert warnings == [
        "the wandb logger failed and is left out from here on (ConnectionError: no network); metrics.csv has everything"
    ]


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_without_its_package_a_logger_is_refused_before_any_work(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = tiny()
    with pytest.raises(UsageError, match=rf"logger {name} needs {name} .*pip install 'lungkit\[{name}\]'"):
        Trainer(replace(config, logger=name))
    assert main(["--logger", name, "--runs", config.runs, "--data", str(config.data.root)]) == 2
    assert f"lungkit[{name}]" in capsys.readouterr().err
    assert not Path(config.runs).exists()


def test_the_local_store_of_mlflow_needs_its_database_and_a_server_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:1")
    check_logger("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(UsageError, match=r"logger mlflow needs sqlalchemy .*lungkit\[mlflow\]"):
        check_logger("mlflow")


def test_no_logger_needs_nothing() -> None:
    check_logger(None)
    logger = RunLogger(None)
    logger.begin({})
    logger.epoch({"step": 1})
    logger.end("finished")


def test_an_unknown_logger_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--logger", "tensorbord"]) == 2
    assert "tensorboard, mlflow, wandb" in capsys.readouterr().err
