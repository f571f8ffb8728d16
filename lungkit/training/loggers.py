"""Where else a run is logged: TensorBoard, MLflow or Weights & Biases, beside ``metrics.csv`` and never in its way."""

from __future__ import annotations

import functools
import importlib
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lungkit._atomic import write_json_atomic
from lungkit._reading import read_json
from lungkit.checkpoint import BEST
from lungkit.errors import UsageError
from lungkit.training.run_folder import RunFolder

_LOG = logging.getLogger("lungkit")

LOGGERS = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
"""Name of a logger, which is that of its extra as well: the module that it needs."""

_STATES = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
_LONGEST_PARAMETER = 500
_RECORD = "logger.json"


def check_logger(name: str | None) -> None:
    """Refuse a logger whose package is not installed.

    Raises:
        UsageError: names the extra.

    Example:
        >>> check_logger(None)
    """
    if name is None:
        return
    modules = [LOGGERS[name]]
    if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
        modules += ["sqlalchemy", "alembic"]  # of the local store
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UsageError(
                f"logger {name} needs {module} ({error}): pip install 'lungkit[{name}]', or leave --logger out"
            ) from error


class Client(Protocol):
    """What a logger is asked to keep."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at a step."""

    def image(self, name: str, path: Path, step: int) -> None:
        """A picture (PNG)."""

    def configuration(self, options: Mapping[str, Any]) -> None:
        """Options of the run by their dotted names."""

    def model(self, checkpoint: Path) -> None:
        """The folder of the checkpoint that ships."""

    def close(self, state: str) -> None:
        """The run is "finished", "interrupted" or "failed"."""


class RunLogger:
    """Tells a :class:`Client` what happens in a run; one that fails is dropped with a warning, and the run goes on.

    Args:
        start: opens the client; None logs nothing.
        name: of the client in the warning.
    """

    def __init__(self, start: Callable[[], Client] | None, name: str = "") -> None:
        self._name = name
        self._client: Client | None = None
        if start is not None:
            try:
                self._client = start()
            except Exception as error:
                self._dropped(error)

    def begin(self, options: Mapping[str, Any]) -> None:
        """The run starts, or goes on."""
        self._tell(lambda client: client.configuration(options))

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is over: its row of ``metrics.csv``, at its step."""
        values = {_grouped(key): value for key, value in row.items() if key != "step" and value is not None}
        self._tell(lambda client: client.scalars(values, int(row["step"])))

    def measured(self, means: Mapping[str, float], folder: RunFolder, step: int) -> None:
        """The final validation: mean of every metric that has one, pictures, the model."""
        finite = {f"final/{name}": value for name, value in means.items() if math.isfinite(value)}
        pictures = {f"overlays/{path.stem}": path for path in sorted(folder.overlays.glob("*.png"))}
        if (curves := folder.path / "progress.png").is_file():
            pictures["progress"] = curves
        self._tell(lambda client: client.scalars(finite, step))
        for name, path in pictures.items():
            self._tell(functools.partial(_show, name, path, step))
        self._tell(lambda client: client.model(folder.checkpoints / BEST))

    def end(self, state: str) -> None:
        """The run is over."""
        self._tell(lambda client: client.close(state))

    def _tell(self, what: Callable[[Client], None]) -> None:
        if self._client is None:
            return
        try:
            what(self._client)
        except Exception as error:
            self._dropped(error)

    def _dropped(self, error: Exception) -> None:
        self._client = None
        _LOG.warning(
            "the %s logger failed and is left out from here on (%s: %s); metrics.csv has everything",
            self._name,
            type(error).__name__,
            " ".join(str(error).split())[:300],
        )


def open_logger(name: str | None, folder: RunFolder, *, next_step: int = 0) -> RunLogger:
    """The logger of a run.

    TensorBoard's event files are in ``tensorboard/`` of the run's folder. MLflow goes where ``MLFLOW_TRACKING_URI``
    says, else to ``mlflow.db`` beside the runs; W&B where its own settings say, with its files in the run's folder.
    A run that is resumed goes on in the same place.

    Args:
        name: key of :data:`LOGGERS`, or None.
        folder: of the run.
        next_step: optimiser steps that a resumed run has done.

    Example:
        >>> open_logger(None, RunFolder("runs/name")).end("finished")
    """
    if name is None:
        return RunLogger(None)
    kinds: dict[str, Callable[[], Client]] = {
        "tensorboard": lambda: _TensorBoard(folder, next_step),
        "mlflow": lambda: _MLflow(folder),
        "wandb": lambda: _Wandb(folder),
    }
    return RunLogger(kinds[name], name)


def _grouped(key: str) -> str:
    """Example: ``_grouped("val_dice")`` is "val/dice": programs show what shares a prefix together."""
    head, _, rest = key.partition("_")
    return f"{head}/{rest}" if head in ("train", "val", "seconds") else key


def _show(name: str, path: Path, step: int, client: Client) -> None:
    client.image(name, path, step)


class _TensorBoard:
    def __init__(self, folder: RunFolder, next_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was logged beyond the checkpoint that a run continues is not shown any more.
        purge = next_step + 1 if next_step else None
        self._writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=purge)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def image(self, name: str, path: Path, step: int) -> None:
        from matplotlib.image import imread

        self._writer.add_image(name, imread(path)[..., :3], step, dataformats="HWC")

    def configuration(self, options: Mapping[str, Any]) -> None:
        rows = "\n".join(f"| {name} | {value} |" for name, value in options.items())
        self._writer.add_text("configuration", f"| option | value |\n|---|---|\n{rows}")

    def model(self, checkpoint: Path) -> None:
        # Event files hold no models.
        self._writer.add_text("model", f"{checkpoint}\n\n{_manifest(checkpoint)}")

    def close(self, state: str) -> None:
        self._writer.add_text("state", state)
        self._writer.close()


class _MLflow:
    def __init__(self, folder: RunFolder) -> None:
        from mlflow import MlflowClient

        runs = folder.path.absolute().parent
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{runs / 'mlflow.db'}")
        known = _known(folder, "mlflow")
        self._is_new = known is None
        if known is not None:
            self._run = known
            self._client.update_run(known, status="RUNNING")
        else:
            artefacts = None if uri else (runs / "mlartifacts").as_uri()
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "lungkit"
            experiment = self._client.get_experiment_by_name(name)
            number = (
                self._client.create_experiment(name, artifact_location=artefacts)
                if experiment is None
                else experiment.experiment_id
            )
            self._run = self._client.create_run(number, run_name=folder.path.name).info.run_id
            write_json_atomic(folder.path / _RECORD, {"mlflow": self._run})

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, float(value), step=step)

    def image(self, name: str, path: Path, step: int) -> None:
        self._client.log_artifact(self._run, str(path), name.rpartition("/")[0] or None)

    def configuration(self, options: Mapping[str, Any]) -> None:
        # A parameter cannot be changed, and a run that is resumed has the same.
        for name, value in options.items() if self._is_new else ():
            self._client.log_param(self._run, name, str(value)[:_LONGEST_PARAMETER])

    def model(self, checkpoint: Path) -> None:
        self._client.log_artifacts(self._run, str(checkpoint), "model")

    def close(self, state: str) -> None:
        self._client.set_terminated(self._run, _STATES[state])


class _Wandb:
    def __init__(self, folder: RunFolder) -> None:
        import wandb

        self._wandb = wandb
        known = _known(folder, "wandb")
        project = os.environ.get("WANDB_PROJECT") or "lungkit"
        self._run = wandb.init(
            project=project, name=folder.path.name, dir=str(folder.path), id=known, resume="allow"
        )
        write_json_atomic(folder.path / _RECORD, {"wandb": self._run.id})

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def image(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def configuration(self, options: Mapping[str, Any]) -> None:
        self._run.config.update(dict(options), allow_val_change=True)

    def model(self, checkpoint: Path) -> None:
        artefact = self._wandb.Artifact(f"model-{self._run.id}", type="model")
        artefact.add_dir(str(checkpoint))
        self._run.log_artifact(artefact)

    def close(self, state: str) -> None:
        self._run.finish(exit_code=0 if state == "finished" else 1)


def _known(folder: RunFolder, name: str) -> str | None:
    """The run of a logger that a resumed run goes on in."""
    try:
        found = read_json(folder.path / _RECORD)
    except (OSError, ValueError):
        return None
    return found.get(name) if isinstance(found, dict) else None


def _manifest(checkpoint: Path) -> str:
    path = checkpoint / "manifest.json"
    return f"```\n{path.read_text()}\n```" if path.is_file() else ""
