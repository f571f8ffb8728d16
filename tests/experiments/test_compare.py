"""The experiment as a whole on a tiny phantom: what it writes, that it goes on, what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from pictures import has_colour
from safetensors.torch import load_file

from lungkit.cli.compare import main
from lungkit.errors import Interrupted, UsageError
from lungkit.experiments import Arm, paper_arms, runs
from lungkit.experiments.ablations import ABLATIONS
from lungkit.experiments.arms import budget_differences, check_arms, parse_arm, with_budget
from lungkit.experiments.runs import FinishedRun, train_or_resume
from lungkit.metrics import MetricOptions
from lungkit.pipeline.labelled import measure_scans
from lungkit.training import TrainConfig

TINY = ["--epochs", "1", "--steps_per_epoch", "2", "--batch_size", "2", "--model.features", "4", "8"]
RUNS = {"u-net-ce-fold0-seed0", "attention-u-net-dice-ce-fold0-seed0"}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    cache = tmp_path_factory.mktemp("cache")
    return [*TINY, "--data.phantom_cases", "10", "--data.cache", str(cache)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, options: list[str]) -> Path:
    output = tmp_path_factory.mktemp("experiment") / "out"
    assert main(["-o", str(output), *options]) == 0
    return output


def test_tables_and_figures_are_written(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"table.md", "table.csv", "table.tex", "table.txt", "distributions.png", "curves.png"} <= names
    assert {path.name for path in (finished / "runs").iterdir()} == RUNS
    assert {path.name for path in (finished / "cases").glob("*.csv")} >= {f"{name}.csv" for name in RUNS}


def test_overlays_are_those_of_the_chosen_cases(finished: Path) -> None:
    ranks = {path.name.split("-")[0] for path in (finished / "overlays").iterdir()}
    assert ranks == {"worst", "median", "best"}
    assert all(
        has_colour(path, "#3ddc84") for path in (finished / "overlays").iterdir()
    )  # the truth's outline


def test_figures_have_a_colour_for_each_arm(finished: Path) -> None:
    for name in ("curves.png", "distributions.png"):
        assert has_colour(finished / name, "#1f6fb4") and has_colour(finished / name, "#e8612c")


def test_table_says_what_a_reader_must_know(finished: Path) -> None:
    text = (finished / "table.md").read_text()
    for expected in ("Wilcoxon", "end of the budget", "weights", "HD95 directed (mm)", "0.908 / 0.952"):
        assert expected in text


def test_same_command_again_trains_nothing(
    finished: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs.Trainer, "fit", lambda self: pytest.fail("trained again"))
    table = (finished / "table.csv").read_text()
    assert main(["-o", str(finished), *options]) == 0
    assert (finished / "table.csv").read_text() == table


def test_json_is_that_of_the_folder(
    finished: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-o", str(finished), "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((finished / "comparison.json").read_text())


def test_other_experiment_does_not_overwrite(
    finished: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-o", str(finished), "--seeds", "1", *options]) == 2
    assert "holds comparisons made with other" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["one for all", "one an arm"])
def test_finished_runs_are_compared(finished: Path, tmp_path: Path, flags: str) -> None:
    first, other = (str(finished / "runs" / name) for name in sorted(RUNS, reverse=True))
    given = ["--runs", first, other] if flags == "one for all" else ["--runs", first, "--runs", other]
    assert main(["-o", str(tmp_path / "out"), *given]) == 0
    assert "u-net-ce-fold0-seed0" in (tmp_path / "out" / "table.txt").read_text()
    assert "0.952" not in (tmp_path / "out" / "table.txt").read_text()


def test_runs_of_one_name_keep_apart(finished: Path, tmp_path: Path) -> None:
    paths = [tmp_path / part / "run" for part in ("a", "b")]
    for path, name in zip(paths, sorted(RUNS), strict=True):
        shutil.copytree(finished / "runs" / name, path)
    assert main(["-o", str(tmp_path / "out"), "--runs", *map(str, paths)]) == 0
    tables = {path.name for path in (tmp_path / "out" / "cases").glob("*run.csv")}
    assert tables == {"1-run.csv", "2-run.csv"}
    assert str(paths[1]) in (tmp_path / "out" / "table.txt").read_text()


def test_run_predicts_with_its_last_weights_as_lungkit_predict_does(finished: Path) -> None:
    path = finished / "runs" / "u-net-ce-fold0-seed0"
    run = FinishedRun.open(path)
    assert run.predictor.models[0].path == path / "checkpoints" / "last"
    assert FinishedRun.open(path, checkpoint="best").predictor.models[0].path.name == "best"
    split = json.loads((path / "dataset.json").read_text())["split"]
    assert list(run.scans.case_ids) == split["val"]
    assert run.parameters == sum(
        value.numel() for value in load_file(path / "checkpoints" / "last" / "model.safetensors").values()
    )


def test_cases_have_every_metric_of_lungkit_evaluate(finished: Path) -> None:
    header = (finished / "cases" / "u-net-ce-fold0-seed0.csv").read_text().splitlines()[0]
    assert header.split(",") == ["case", "label", *MetricOptions().definitions(), "decided_by_policy"]


def test_other_dataset_is_measured_whole(finished: Path) -> None:
    run = FinishedRun.open(finished / "runs" / "u-net-ce-fold0-seed0")
    other = FinishedRun.open(run.path, test=run.scans.dataset.root)
    assert len(other.scans.case_ids) == 10
    seen: list[tuple[int, int]] = []
    table = measure_scans(other.predictor, other.scans, progress=lambda *counts: seen.append(counts))
    assert table.case_ids == other.scans.case_ids and set(run.scans.case_ids) < set(table.case_ids)
    assert seen == [(done, 10) for done in range(1, 11)]


class FakeTrainer:
    """Records how it was made."""

    made: ClassVar[list[str]] = []

    def __init__(self, config: TrainConfig) -> None:
        self.made.append(f"new {config.name}")

    @classmethod
    def from_run(cls, path: Path) -> FakeTrainer:
        trainer = cls.__new__(cls)
        cls.made.append(f"continued {path.name}")
        return trainer

    def fit(self) -> object:
        return type("Result", (), {"run_folder": Path("done")})()


@pytest.mark.parametrize(
    ("state", "is_described", "expected"),
    [
        (None, False, ["new unet-fold0-seed0"]),
        ("interrupted", True, ["continued unet-fold0-seed0"]),
        ("running", True, ["continued unet-fold0-seed0"]),
        ("failed", False, ["new unet-fold0-seed0"]),
        ("failed", True, ["continued unet-fold0-seed0"]),
        ("finished", True, []),
    ],
)
def test_run_is_found_continued_or_started(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: str | None,
    is_described: bool,
    expected: list[str],
) -> None:
    monkeypatch.setattr(runs, "Trainer", FakeTrainer)
    monkeypatch.setattr(FakeTrainer, "made", [])
    folder = tmp_path / "unet-fold0-seed0"
    if state is not None:
        folder.mkdir()
        (folder / "config.yaml").write_text("epochs: 1\n")
        (folder / "status.json").write_text(json.dumps({"state": state}))
        if is_described:
            (folder / "dataset.json").write_text("{}")
    train_or_resume(Arm("UNet", TrainConfig()), tmp_path, 0, 0)
    assert FakeTrainer.made == expected


def test_interruption_ends_with_75_and_says_how_to_go_on(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(self: object) -> None:
        raise Interrupted("stopped and saved")

    monkeypatch.setattr(runs.Trainer, "fit", stopped)
    assert main(["-o", str(tmp_path / "out"), *options]) == 75
    assert "the same command again" in capsys.readouterr().err


def test_latest_of_repeated_runs_counts(tmp_path: Path) -> None:
    for name in ("unet-fold0-seed0", "unet-fold0-seed0-2", "unet-fold0-seed0-10", "unet-fold0-seed01"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("")
    assert runs._latest(tmp_path, "unet-fold0-seed0") == tmp_path / "unet-fold0-seed0-10"


def test_arms_share_options_and_differ_in_model_and_loss() -> None:
    baseline, candidate = paper_arms(["--epochs", "7"])
    assert (baseline.config.model.name, candidate.config.model.name) == ("unet", "attention-unet")
    assert (baseline.config.loss.dice_weight, candidate.config.loss.dice_weight) == (0, 1)
    assert baseline.config.epochs == candidate.config.epochs == 7


def test_run_has_its_own_fold_and_seed() -> None:
    arm = Arm("A", TrainConfig())
    config = arm.run_config(Path("out"), 3, 4)
    assert (config.data.fold, config.seed, config.runs, config.name) == (3, 4, "out", "a-fold3-seed4")
    assert arm.config.seed == 0


def test_arm_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("epochs: 3\n")
    arm = parse_arm([f"mine={tmp_path / 'a.yaml'}"], ["--batch_size", "2"])
    assert (arm.name, arm.config.epochs, arm.config.batch_size) == ("mine", 3, 2)


def test_different_budgets_are_said() -> None:
    arms = [Arm("A", TrainConfig(epochs=3)), Arm("B", TrainConfig(epochs=4))]
    assert budget_differences(arms) == ["epochs: 3 (A), 4 (B)"]


def test_arms_on_different_data_are_refused() -> None:
    other = TrainConfig()
    other.data.root = "elsewhere"
    with pytest.raises(UsageError, match=r"data\.root"):
        check_arms([Arm("A", TrainConfig()), Arm("B", other)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "unet"], "what the arms differ in"),
        (["--arm", "A"], "NAME=FILE"),
        (["--runs", "a"], "the runs of two arms"),
        (["--runs", "a", "b", "a"], "comes twice"),
        (["--seeds", "0", "1", "0"], "seeds must differ, got 0, 1, 0"),
        (["--epochs", "0"], "epochs is 0"),
        (["--runs", "a", "--runs", "b", "--epochs", "3"], "--epochs has no meaning"),
        (["--runs", "a", "b", "--seeds", "3"], "--seeds has no meaning"),
        (["--modle.features", "8"], "model.features"),
    ],
)
def test_bad_option_ends_with_2(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-o", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_absent_fold_is_refused_before_the_first_run(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-o", str(tmp_path / "out"), "--folds", "0", "9", *options]) == 2
    assert "the dataset has folds 0 to 4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_absent_test_dataset_is_refused_before_the_first_run(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-o", str(tmp_path / "out"), "--test", str(tmp_path / "absent"), *options]) == 3
    assert "absent: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unfinished_run_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-o", str(tmp_path / "out"), "--runs", str(finished), "--runs", str(tmp_path)]) == 4
    assert "not a run folder" in capsys.readouterr().err


def test_finished_runs_are_measured_on_the_device_that_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(path) for path in sorted((finished / "runs").iterdir())[:2]]
    assert main(["-o", str(tmp_path / "out"), "--runs", *runs, "--device", "abacus"]) == 2
    assert "device 'abacus' cannot be used" in capsys.readouterr().err


def test_five_arms_in_two_shares_are_compared_with_the_first_by_the_last_to_end(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The module, whose name in the package is that of its function.
    monkeypatch.setattr(sys.modules["lungkit.experiments.compare"], "draw_comparison", lambda *a, **o: None)
    monkeypatch.setattr("lungkit.training.finishing.draw_overlays", lambda *a, **o: None)
    output = tmp_path / "out"
    command = ["-o", str(output), "--ablation", "paper", *options]
    assert main([*command, "--shard", "1/2"]) == 0
    assert "3 runs of others are not" in capsys.readouterr().err
    assert not (output / "table.csv").exists()
    assert main([*command, "--shard", "0/2"]) == 0
    lines = (output / "table.csv").read_text().splitlines()
    assert [line.split(",")[2] for line in lines[1:6]] == [*ABLATIONS["paper"]]
    assert "adjusted for 4 comparisons" in (output / "table.md").read_text()
    # Nothing is trained or measured a second time.
    monkeypatch.setattr(runs.Trainer, "fit", lambda self: pytest.fail("trained again"))
    monkeypatch.setattr(
        "lungkit.experiments.measured.measure_scans", lambda *a, **o: pytest.fail("measured again")
    )
    assert main(command) == 0
    assert (output / "table.csv").read_text().splitlines() == lines


def test_effects_are_drawn(finished: Path) -> None:
    assert (finished / "forest.png").stat().st_size > 1000


def test_arm_of_options(tmp_path: Path) -> None:
    arm = parse_arm(["mine", "model=unet", "loss.ce_weight=0"], ["--epochs", "3"])
    assert (arm.name, arm.config.model.name, arm.config.loss.ce_weight, arm.config.epochs) == (
        "mine",
        "unet",
        0,
        3,
    )


def test_minutes_are_the_same_for_every_arm_and_leave_the_epochs_open() -> None:
    arms = with_budget([Arm("A", TrainConfig(epochs=3)), Arm("B", TrainConfig())], "minutes=20")
    assert [(arm.config.max_minutes, arm.config.epochs) for arm in arms] == [(20, None)] * 2


def test_steps_are_whole_epochs() -> None:
    arms = with_budget([Arm("A", TrainConfig(steps_per_epoch=50)), Arm("B", TrainConfig())], "steps=300")
    assert [(arm.config.epochs, arm.config.steps_per_epoch) for arm in arms] == [(6, 50), (3, 100)]
    with pytest.raises(UsageError, match="no whole number of epochs of 100"):
        with_budget(arms[1:], "steps=250")


@pytest.mark.parametrize("budget", ["minutes", "minutes=0", "hours=2", "steps=1.5", "minutes=nan"])
def test_a_budget_of_another_form_is_refused(budget: str) -> None:
    with pytest.raises(UsageError, match="minutes=M or steps=N"):
        with_budget([], budget)
