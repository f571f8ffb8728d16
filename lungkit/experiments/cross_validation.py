"""All folds of a dataset: a run for each, and every labelled case measured by the run that did not see it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import lungkit
from lungkit._atomic import claim_folder
from lungkit.checkpoint import LAST
from lungkit.errors import UsageError
from lungkit.experiments.arms import Arm
from lungkit.experiments.measured import is_measured, measure_run
from lungkit.experiments.runs import FinishedRun, found_finished, train_or_resume
from lungkit.inference.trained_model import FOLDS
from lungkit.metrics import CaseTable, MetricOptions
from lungkit.report.evaluation import write_measured
from lungkit.training.config import TrainConfig
from lungkit.training.config_io import config_to_dict
from lungkit.training.planning import open_folds

_LOG = logging.getLogger("lungkit")

_NOTE = (
    "Every case was measured by the run of the fold that held it out, with the weights at the end of its training: "
    "nothing was chosen on the cases that are measured."
)


def cross_validate(config: TrainConfig, *, shard: tuple[int, int] = (0, 1)) -> CaseTable | None:
    """Train a run on every fold and write the out-of-fold table, ``out_of_fold.*``, beside them.

    The runs lie in ``RUNS/NAME/fold-K``; finished ones are taken as they are and an interrupted one is continued, so
    that the same call goes on where it was stopped. Share I of N trains every N-th fold from the I-th on; the share
    that finds all folds measured writes the table, the others return None. ``lungkit-predict --model RUNS/NAME``
    predicts with the folds as an ensemble, with the weights that were measured.

    Raises:
        Interrupted: stopped and saved.
        UsageError: ``config`` has no name, chooses postprocessing on the cases that are to be measured, or the folder
            holds something else.
    """
    if config.name is None:
        raise UsageError("all folds need a folder that the same command finds again; name it with --name")
    if config.choose_postprocessing:
        raise UsageError(
            "choose_postprocessing chooses on the cases that the out-of-fold table measures; leave it out"
        )
    config.validate()
    _, splits = open_folds(replace(config, data=replace(config.data, fold=0)))
    folder, count = Path(config.runs) / config.name, len(splits)
    claim_folder(
        folder,
        FOLDS,
        {
            "folds": [f"fold-{fold}" for fold in range(count)],
            "checkpoint": LAST,
            "config": config_to_dict(config),
        },
        holds="folds",
        advice="name another with --name",
    )
    arm, options = Arm(config.name, config), MetricOptions()
    cases = folder / "cases"
    cases.mkdir(exist_ok=True)
    for fold in range(count)[shard[0] :: shard[1]]:
        _LOG.info("fold %d of %d", fold, count)
        path = train_or_resume(arm, folder, fold, config.seed, name=f"fold-{fold}")
        measure_run(FinishedRun.open(path, device=_device(config)), cases, f"fold-{fold}", options)
    runs = [found_finished(folder, f"fold-{fold}") for fold in range(count)]
    opened = [FinishedRun.open(run, device=_device(config)) for run in runs if run is not None]
    done = [run for run in opened if is_measured(run, cases, run.path.name, options)]
    if len(done) < count:
        _LOG.info("%d of %d folds are done; the last share writes the table", len(done), count)
        return None
    table = CaseTable(empty=options.empty)
    for run in done:
        for row in measure_run(run, cases, run.path.name, options).rows:
            table.add_row(row.case_id, row.label, row.values, row.decided_by_policy)
    extra = {"lungkit": lungkit.__version__, "weights": LAST}
    text = write_measured(folder, table, options, name="out_of_fold", notes=[_NOTE], extra=extra)
    _LOG.info("out of fold\n%s\neverything is in %s", text, folder)
    return table


def _device(config: TrainConfig) -> str | None:
    return None if config.engine.accelerator == "auto" else config.engine.accelerator.replace("gpu", "cuda")
