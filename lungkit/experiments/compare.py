"""The whole experiment: train what is missing, measure the held-out cases, write tables and figures."""

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
from lungkit.checkpoint import LAST
from lungkit.data import open_dataset
from lungkit.errors import UsageError
from lungkit.experiments.arms import PAPER_FIGURES, Arm, budget_differences, check_arms
from lungkit.experiments.figures import draw_comparison
from lungkit.experiments.results import ComparisonRow, compare_tables, format_comparison
from lungkit.experiments.runs import FinishedRun, check_same_labels, epoch_rows, finished_run, train_or_resume
from lungkit.metrics import CaseTable, MetricOptions
from lungkit.pipeline.labelled import measure_scans, readers_ceiling
from lungkit.report.evaluation import headline_metrics, write_measured
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
        arms: at least two; the last is compared with the first.
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


def compare(experiment: Experiment, output: Path, *, progress: Progress | None = None) -> list[ComparisonRow]:
    """Train every arm on every fold with every seed, measure, and write the comparison to ``output``.

    Finished runs in ``output`` are taken as they are and an interrupted one is continued, so that the same call goes
    on where it was stopped.

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
    paths: dict[str, list[Path]] = {arm.name: [] for arm in experiment.arms}
    total = len(experiment.arms) * len(experiment.folds) * len(experiment.seeds)
    for fold in experiment.folds:
        for seed in experiment.seeds:
            for arm in experiment.arms:
                done = sum(map(len, paths.values()))
                _LOG.info("run %d of %d: %s, fold %d, seed %d", done + 1, total, arm.name, fold, seed)
                paths[arm.name].append(train_or_resume(arm, output / "runs", fold, seed))
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
    runs = {
        name: [
            FinishedRun.open(
                path, checkpoint=experiment.checkpoint, test=experiment.test, device=experiment.device
            )
            for path in found
        ]
        for name, found in paths.items()
    }
    _check_same_cases(runs)
    cases = output / "cases"
    cases.mkdir(exist_ok=True)
    file_names = _file_names([run.path for loaded in runs.values() for run in loaded])
    tables: dict[str, list[CaseTable]] = {}
    for name, loaded in runs.items():
        tables[name] = []
        for run in loaded:
            step = None if progress is None else functools.partial(progress, run.path.name)
            table = measure_scans(run.predictor, run.scans, options=experiment.options, progress=step)
            tables[name].append(table)
            write_measured(cases, table, experiment.options, name=file_names[run.path])
    rows = compare_tables(tables, experiment.metrics, paper=PAPER_FIGURES if experiment.published else None)
    for style, suffix in (("text", "txt"), ("csv", "csv"), ("latex", "tex")):
        write_text_atomic(output / f"table.{suffix}", format_comparison(rows, style=style) + "\n")
    of_first_arm = next(iter(runs.values()))
    ceiling = readers_ceiling([run.scans for run in of_first_arm], readers=of_first_arm[0].readers)
    notes = _notes(experiment, runs, tables) + ceiling
    markdown = [format_comparison(rows, style="markdown"), "", *(f"- {note}" for note in notes)]
    write_text_atomic(output / "table.md", "\n".join(markdown) + "\n")
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
    draw_comparison(output, runs, tables, experiment.metrics, report=experiment.report)
    return rows


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
) -> list[str]:
    """What a reader must know to judge the table."""
    runs_of_first_arm = next(iter(runs.values()))
    dataset = runs_of_first_arm[0].scans.dataset
    cases = len({case_id for run in runs_of_first_arm for case_id in run.scans.case_ids})
    first, *_, last = runs
    chosen = {
        True: "Weights: those at the end of the budget; nothing was chosen on the held-out cases.",
        False: "Weights: those of the best validation Dice, which was measured on the same held-out cases.",
    }
    notes = [
        f"Cells: mean over {cases} cases of {dataset.name}, with the 95 % BCa bootstrap interval.",
        f"Difference: {last} minus {first}, paired by case; p: Wilcoxon signed-rank test, two-sided.",
        chosen[experiment.checkpoint == LAST],
    ]
    for name, loaded in runs.items():
        plan = loaded[0].plan
        seconds = [_training_seconds(run.path) for run in loaded]
        notes.append(
            f"{name}: {len(loaded)} run{'s' if len(loaded) > 1 else ''} of {plan.epochs} epochs x "
            f"{plan.steps_per_epoch} steps, batch {plan.batch_size}, patch {' x '.join(map(str, plan.patch_size))}, "
            f"{loaded[0].parameters:,} weights, {np.mean(seconds) / 60:.1f} min of training each."
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


def _training_seconds(run: Path) -> float:
    return sum(
        float(row[column] or 0)
        for row in epoch_rows(run)
        for column in ("seconds_waiting_for_data", "seconds_computing")
    )
