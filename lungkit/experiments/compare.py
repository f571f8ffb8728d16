"""The whole experiment: train and measure what is missing, compare the arms, write tables and figures."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lungkit
from lungkit._atomic import claim_folder, write_json_atomic, write_text_atomic
from lungkit._text import markdown
from lungkit.checkpoint import LAST
from lungkit.data import open_dataset
from lungkit.errors import UsageError
from lungkit.experiments.arms import PAPER_FIGURES, Arm, budget_differences, check_arms
from lungkit.experiments.figures import draw_comparison
from lungkit.experiments.measured import is_measured, measure_run
from lungkit.experiments.results import ComparisonRow, compare_tables, format_comparison
from lungkit.experiments.runs import (
    FinishedRun,
    check_same_labels,
    epoch_rows,
    finished_run,
    found_finished,
    train_or_resume,
)
from lungkit.metrics import CaseTable, MetricOptions
from lungkit.pipeline.labelled import readers_ceiling
from lungkit.report.evaluation import headline_metrics
from lungkit.training.config_io import config_to_dict
from lungkit.training.planning import open_folds

_LOG = logging.getLogger("lungkit")

_EXPERIMENT = "experiment.json"
_ADVICE = "name another folder with --output"
_OVERLAP = ("dice", "iou", "ppv", "sensitivity")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Experiment:
    """What is compared, and how.

    Args:
        arms: at least two; the others are compared with the first.
        folds: folds to train and hold out, the same for every arm.
        seeds: seeds to train with, the same for every arm.
        test: dataset whose labelled cases are measured instead of the held-out folds.
        checkpoint: "last", the weights at the end of the budget, or "best", those that did best on the held-out fold.
            "last" is the fair one: nothing is then chosen on the cases that are measured.
        options: definitions of the metrics.
        published: show the paper's figures beside the results.
        report: write pages for the browser.
        device: where the models are measured, "cpu", "cuda:1" ...; None is the GPU where there is one.
    """

    arms: tuple[Arm, ...]
    folds: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (0,)
    test: Path | None = None
    checkpoint: str = LAST
    options: MetricOptions = field(default_factory=MetricOptions)
    published: bool = False
    report: bool = True
    device: str | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics of the table of the comparison; those of the cases hold all of :attr:`options`."""
        return headline_metrics(self.options)

    def to_dict(self) -> dict[str, Any]:
        """What makes it this experiment and no other."""
        configs = {arm.name: config_to_dict(arm.config) for arm in self.arms}
        for config in configs.values():
            del config["report"]  # pages may be asked for later
        return {
            "arms": configs,
            "folds": list(self.folds),
            "seeds": list(self.seeds),
        }


def compare(
    experiment: Experiment,
    output: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> list[ComparisonRow] | None:
    """Train every arm on every fold with every seed, measure, and write the comparison to ``output``.

    Finished runs in ``output`` and their measurements are taken as they are and an interrupted run is continued, so
    that the same call goes on where it was stopped. Share I of N (``shard``) trains and measures every N-th run from
    the I-th on; the share that finds all runs measured writes the comparison, the others return None.

    Raises:
        Interrupted: stopped and saved.
        UsageError: the arms do not fit each other, a fold or an option is out of range, or ``output`` holds another
            experiment. Nothing is trained then.
        DataError: a dataset cannot be used.
    """
    check_arms(experiment.arms)
    _check_runs(experiment, output)
    for difference in budget_differences(experiment.arms):
        _LOG.warning("the arms have different budgets: %s", difference)
    claim_folder(output, _EXPERIMENT, experiment.to_dict(), holds="comparisons", advice=_ADVICE)
    jobs = [
        (arm, fold, seed) for fold in experiment.folds for seed in experiment.seeds for arm in experiment.arms
    ]
    runs, cases = output / "runs", output / "cases"
    cases.mkdir(exist_ok=True)
    index, count = shard
    for number, (arm, fold, seed) in list(enumerate(jobs, start=1))[index::count]:
        _LOG.info("run %d of %d: %s, fold %d, seed %d", number, len(jobs), arm.name, fold, seed)
        path = train_or_resume(arm, runs, fold, seed)
        _measure(experiment, _opened(experiment, path), cases, path.name, progress)
    missing = 0
    paths: dict[str, list[Path]] = {arm.name: [] for arm in experiment.arms}
    for arm, fold, seed in jobs:
        there = found_finished(runs, arm.run_name(fold, seed))
        if there is not None and is_measured(
            _opened(experiment, there), cases, there.name, experiment.options
        ):
            paths[arm.name].append(there)
        else:
            missing += 1
    if missing:
        _LOG.info(
            "share %d of %d is done; %d runs of others are not, and the last share writes the tables",
            *shard,
            missing,
        )
        return None
    return _measure_and_write(experiment, paths, output, progress)


def compare_runs(
    experiment: Experiment,
    runs: Mapping[str, Sequence[Path]],
    output: Path,
    *,
    progress: Progress | None = None,
) -> list[ComparisonRow]:
    """As :func:`compare`, with finished runs by the name of the arm; run i of every arm must hold out the same cases.

    Raises:
        CheckpointError: a folder is not that of a finished run.
        UsageError: arms with different numbers of runs or different cases.
    """
    if len({len(paths) for paths in runs.values()}) > 1:
        raise UsageError("every arm must have the same number of runs, one for each fold and seed")
    paths = {name: [finished_run(path) for path in found] for name, found in runs.items()}
    described = {name: [str(path) for path in found] for name, found in paths.items()}
    claim_folder(output, _EXPERIMENT, {"runs": described}, holds="comparisons", advice=_ADVICE)
    return _measure_and_write(experiment, paths, output, progress)


def _check_runs(experiment: Experiment, output: Path) -> None:
    """Find what would end the last run before the first one has trained for hours."""
    for name, numbers in (("folds", experiment.folds), ("seeds", experiment.seeds)):
        if len(set(numbers)) < len(numbers):
            raise UsageError(f"{name} must differ, got {', '.join(map(str, numbers))}")
    for fold in experiment.folds:
        configs = [
            arm.run_config(output / "runs", fold, seed)
            for arm in experiment.arms
            for seed in experiment.seeds
        ]
        for config in configs:
            config.validate()
        dataset, _ = open_folds(configs[0])  # arms share their data
    if experiment.test is not None:
        check_same_labels(open_dataset(experiment.test), dataset.label_map, dataset.labels)


def _measure_and_write(
    experiment: Experiment, paths: Mapping[str, Sequence[Path]], output: Path, progress: Progress | None
) -> list[ComparisonRow]:
    runs = {name: [_opened(experiment, path) for path in found] for name, found in paths.items()}
    _check_same_cases(runs)
    cases = output / "cases"
    cases.mkdir(exist_ok=True)
    file_names = _file_names([run.path for loaded in runs.values() for run in loaded])
    tables = {
        name: [_measure(experiment, run, cases, file_names[run.path], progress) for run in loaded]
        for name, loaded in runs.items()
    }
    patients = {case: patient for run in next(iter(runs.values())) for case, patient in run.patients.items()}
    paper = PAPER_FIGURES if experiment.published else None
    rows = compare_tables(tables, experiment.metrics, paper=paper, patients=patients)
    for style, suffix in (("text", "txt"), ("csv", "csv"), ("latex", "tex")):
        write_text_atomic(output / f"table.{suffix}", format_comparison(rows, style=style) + "\n")
    of_first_arm = next(iter(runs.values()))
    ceiling = readers_ceiling([run.scans for run in of_first_arm], readers=of_first_arm[0].readers)
    notes = _notes(experiment, runs, tables, patients) + ceiling
    page = [format_comparison(rows, style="markdown"), "", *(f"- {markdown(note)}" for note in notes)]
    write_text_atomic(output / "table.md", "\n".join(page) + "\n")
    write_json_atomic(
        output / "comparison.json",
        {
            "lungkit": lungkit.__version__,
            "torch": torch.__version__,
            "runs": {name: [str(run.path) for run in loaded] for name, loaded in runs.items()},
            "notes": notes,
            "definitions": experiment.options.definitions(),
        },
    )
    draw_comparison(output, runs, tables, rows, report=experiment.report)
    return rows


def _opened(experiment: Experiment, path: Path) -> FinishedRun:
    return FinishedRun.open(
        path, checkpoint=experiment.checkpoint, test=experiment.test, device=experiment.device
    )


def _measure(
    experiment: Experiment, run: FinishedRun, cases: Path, name: str, progress: Progress | None
) -> CaseTable:
    step = None if progress is None else functools.partial(progress, run.path.name)
    return measure_run(run, cases, name, experiment.options, progress=step)


def _file_names(runs: Sequence[Path]) -> dict[Path, str]:
    """What the tables of the runs are called: the run's name, numbered where several folders have the same one."""
    count = Counter(path.name for path in runs)
    return {
        path: path.name if count[path.name] == 1 else f"{number}-{path.name}"
        for number, path in enumerate(runs, start=1)
    }


def _check_same_cases(runs: Mapping[str, Sequence[FinishedRun]]) -> None:
    (first_name, first), *others = runs.items()
    for name, loaded in others:
        for one, other in zip(first, loaded, strict=True):
            if (
                one.scans.case_ids != other.scans.case_ids
                or one.scans.dataset.root != other.scans.dataset.root
            ):
                raise UsageError(
                    f"{one.path} ({first_name}) and {other.path} ({name}) do not hold out the same cases; "
                    "compare runs of the same data and fold"
                )


def _notes(
    experiment: Experiment,
    runs: Mapping[str, Sequence[FinishedRun]],
    tables: Mapping[str, Sequence[CaseTable]],
    patients: Mapping[str, str],
) -> list[str]:
    """What a reader must know to judge the table."""
    runs_of_first_arm = next(iter(runs.values()))
    dataset = runs_of_first_arm[0].scans.dataset
    cases = len({case_id for run in runs_of_first_arm for case_id in run.scans.case_ids})
    first, *_, last = runs
    other = last if len(runs) == 2 else "arm"
    chosen = {
        True: "Weights: those at the end of the budget; nothing was chosen on the held-out cases.",
        False: "Weights: those of the best validation Dice, which was measured on the same held-out cases.",
    }
    notes = [
        f"Cells: mean over {cases} cases of {dataset.name}, with the 95 % BCa bootstrap interval.",
        f"Difference: {other} minus {first}, paired by case; p: Wilcoxon signed-rank test, two-sided.",
        *_further_statistics(runs, patients),
        chosen[experiment.checkpoint == LAST],
    ]
    for name, loaded in runs.items():
        plan = loaded[0].plan
        seconds = [_training_seconds(run.path) for run in loaded]
        count = f"{len(loaded)} run{'s' if len(loaded) > 1 else ''}"
        notes.append(
            f"{name}: {count} of {_trained(loaded)}, batch {plan.batch_size}, "
            f"patch {' x '.join(map(str, plan.patch_size))}, {loaded[0].parameters:,} weights, "
            f"{np.mean(seconds) / 60:.1f} min of training each."
        )
    shown = set(experiment.metrics)
    decided = {
        name: len({row.case_id for table in found for row in table.rows if row.decided_by_policy & shown})
        for name, found in tables.items()
    }
    counts = ", ".join(f"{count} for {name}" for name, count in decided.items())
    notes.append(
        f'Empty masks: policy "{experiment.options.empty.value}"; cases with a metric that it decided: {counts}. '
        "A case whose metric is undefined for one arm is left out of the paired difference."
    )
    definitions = experiment.options.definitions()
    notes += [f"{name}: {definitions[name]}." for name in experiment.metrics if name not in _OVERLAP]
    if experiment.published:
        notes.append("Paper: what the paper reports for its two models on its own data, which are not these.")
    return notes


def _further_statistics(runs: Mapping[str, Sequence[FinishedRun]], patients: Mapping[str, str]) -> list[str]:
    """What is done about several arms, runs and cases of a patient, where there are such."""
    notes = []
    people = len(set(patients.values()))
    if people < len(patients):
        notes.append(
            f"The cases are of {people} patients: the bootstrap draws patients with all their cases, and the signs of "
            "a patient's cases change together in the test (Rosner, Glynn and Lee 2006)."
        )
    if len(next(iter(runs.values()))) > 1:
        notes.append(
            "A case's value is its mean over the runs that held it out; the spread is that of the means of the runs."
        )
    if len(runs) > 2:
        notes.append(
            f"p (Holm): adjusted for {len(runs) - 1} comparisons with one arm, for each metric by itself."
        )
    return notes


def _trained(runs: Sequence[FinishedRun]) -> str:
    """How long runs were trained; of a limited time the steps that they took."""
    plan = runs[0].plan
    if plan.max_minutes is None:
        return f"{plan.epochs} epochs x {plan.steps_per_epoch} steps"
    steps = ", ".join(epoch_rows(run.path)[-1]["step"] for run in runs)
    return f"{plan.max_minutes:g} minutes ({steps} steps)"


def _training_seconds(run: Path) -> float:
    return sum(
        float(row[column] or 0)
        for row in epoch_rows(run)
        for column in ("seconds_waiting_for_data", "seconds_computing")
    )
