"""What a run of lungkit-train leaves in its folder, and what --resume makes of a folder that is damaged."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pictures import has_colour

from lungkit.cli.train import main
from lungkit.training import load_checkpoint

Options = Callable[..., list[str]]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def finished(
    phantoms: Path, session_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """Folder of a run of two epochs that has ended, and the options it was given; not to be changed."""
    runs = tmp_path_factory.mktemp("finished")
    options = [
        *("--data", str(phantoms), "--data.cache", str(session_cache), "--data.patch_size", "16", "16"),
        *("--runs", str(runs), "--name", "run", "--model.features", "4", "8", "--epochs", "2"),
        *("--steps_per_epoch", "2", "--batch_size", "2", "--engine.accelerator", "cpu"),
    ]
    assert main(options) == 0
    return runs / "run", options


@pytest.fixture
def run_copy(finished: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """A copy of the finished run to change."""
    return Path(shutil.copytree(finished[0], tmp_path / "copy"))


def test_a_run_leaves_everything_in_its_folder(finished: tuple[Path, list[str]]) -> None:
    expected = {
        "config.yaml",
        "env.json",
        "dataset.json",
        "splits_final.json",
        "metrics.csv",
        "metrics.jsonl",
        "train.log",
        "progress.png",
        "status.json",
        "validation.csv",
        "validation.json",
        "validation.txt",
        *(
            f"checkpoints/{name}/{file}"
            for name in ("last", "best")
            for file in ("model.safetensors", "trainer.pt", "manifest.json")
        ),
    }
    found = files(finished[0])
    assert expected <= found
    overlays = [name for name in found if name.startswith("overlays/") and name.endswith(".png")]
    assert overlays and all(
        has_colour(finished[0] / name, "#3ddc84") for name in overlays
    )  # the truth's outline
    assert has_colour(finished[0] / "progress.png", "#1f6fb4")  # the first curve of a panel
    assert not [name for name in found if Path(name).name.startswith(".")]


def test_status_says_finished(finished: tuple[Path, list[str]]) -> None:
    status = json.loads((finished[0] / "status.json").read_text())
    assert status["state"] == "finished"
    assert status["epoch"] == status["epochs"] == 2
    assert 0 <= status["best_dice"] <= 1


def test_metrics_have_a_row_an_epoch(finished: tuple[Path, list[str]]) -> None:
    with (finished[0] / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("epoch", "step", "train_loss", "learning_rate"),
        *("val_dice", "val_iou", "val_ppv", "val_sensitivity"),
        *("seconds_waiting_for_data", "seconds_computing", "seconds_validating"),
    ]
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "2"), ("2", "4")]
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["train_loss"] for line in lines] == [float(row["train_loss"]) for row in rows]


def test_the_log_tells_the_plan_the_epochs_and_the_final_table(finished: tuple[Path, list[str]]) -> None:
    log = (finished[0] / "train.log").read_text()
    for words in ("5 cases", "2D, patch 16 x 16", "epoch 1/2", "epoch 2/2", "Sensitivity", "phantom_000"):
        assert words in log


def test_versions_and_the_command_are_kept(finished: tuple[Path, list[str]]) -> None:
    environment = json.loads((finished[0] / "env.json").read_text())
    assert {"torch", "lungkit", "numpy"} <= set(environment["versions"])
    assert environment["command"]


def test_the_table_has_the_validation_cases(finished: tuple[Path, list[str]]) -> None:
    split = json.loads((finished[0] / "dataset.json").read_text())["split"]
    with (finished[0] / "validation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == split["val"]
    assert {"dice", "iou", "ppv", "sensitivity"} <= set(rows[0])


def test_the_end_is_told_on_the_terminal(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options()) == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert str(tmp_path / "runs" / "run") in output.err
    assert "epoch 1/1" in output.err
    assert "mean" in output.err


def test_the_configuration_of_a_run_is_resolved(finished: tuple[Path, list[str]]) -> None:
    values = yaml.safe_load((finished[0] / "config.yaml").read_text())
    assert values["model"]["strides"] == [[2, 2]]
    assert values["data"]["dims"] == 2
    assert values["optimiser"]["learning_rate"] == pytest.approx(2e-3)
    assert Path(values["data"]["root"]).is_absolute()


def test_the_configuration_of_a_run_starts_the_same_run(
    finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    again = ["--config", str(finished[0] / "config.yaml"), "--runs", str(tmp_path / "runs")]
    assert main(again) == 0
    first, second = (
        load_checkpoint(folder / "checkpoints/last").weights
        for folder in (finished[0], tmp_path / "runs/run")
    )
    assert all(bool((first[name] == second[name]).all()) for name in first)


def test_dry_run_leaves_nothing(
    options: Options, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(dataset)
    assert main(options("--dry-run", data=dataset)) == 0
    assert not (tmp_path / "runs").exists()
    assert files(dataset) == before
    assert "2D, patch 16 x 16" in capsys.readouterr().err


def test_preview_has_a_name_of_its_own(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(options("--preview-augmentation")) == 0
    assert has_colour(tmp_path / "augmentation.png", "#ffb000")  # the outline of the foreground


def test_preview_of_another_format_is_refused_before_the_data_are_read(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options("--preview-augmentation", "aug.jpg", data=tmp_path / "absent")) == 2
    assert "aug.jpg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--optimiser.momentum", "0.5"], ["optimiser.momentum is 0.99 in the run, 0.5 asked for"]),
        (
            ["--model.features", "8", "16", "--seed", "3"],
            ["model.features is [4, 8] in the run, [8, 16] asked for", "seed is 0 in the run, 3 asked for"],
        ),
    ],
)
def test_resume_lists_options_that_differ(
    run_copy: Path, capsys: pytest.CaptureFixture[str], change: list[str], words: list[str]
) -> None:
    assert main(["--resume", str(run_copy), *change]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_resume_takes_the_options_that_started_the_run(
    finished: tuple[Path, list[str]], run_copy: Path
) -> None:
    assert main(["--resume", str(run_copy), *finished[1]]) == 0


def test_resume_of_a_finished_run_gives_the_same_table(run_copy: Path) -> None:
    before = (run_copy / "validation.csv").read_bytes()
    assert main(["--resume", str(run_copy)]) == 0
    assert (run_copy / "validation.csv").read_bytes() == before
    assert json.loads((run_copy / "status.json").read_text())["state"] == "finished"


def test_a_finished_run_stays_finished_where_a_checkpoint_cannot_be_continued(run_copy: Path) -> None:
    shutil.rmtree(run_copy / "checkpoints/previous", ignore_errors=True)
    assert main(["--resume", str(run_copy), "--checkpoint", "previous"]) == 4
    assert json.loads((run_copy / "status.json").read_text())["state"] == "finished"


def test_a_damaged_best_checkpoint_is_named(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_copy / "checkpoints/best/model.safetensors").write_bytes(b"damaged")
    assert main(["--resume", str(run_copy)]) == 4
    message = capsys.readouterr().err
    assert str(run_copy / "checkpoints/best") in message
    assert "--checkpoint" not in message  # the previous one is no better best


def test_a_run_without_checkpoints_is_an_error_of_its_own(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run_copy / "checkpoints")
    assert main(["--resume", str(run_copy)]) == 4
    message = capsys.readouterr().err
    assert "last" in message
    assert "previous" not in message


@pytest.mark.parametrize("name", ["config.yaml", "dataset.json"])
def test_a_folder_that_is_no_run_is_an_error(
    run_copy: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (run_copy / name).unlink()
    assert main(["--resume", str(run_copy)]) == 4
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"plan": 3, "split": [], "labels": 1}'])
def test_a_damaged_description_of_the_dataset_is_a_checkpoint_error(
    run_copy: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (run_copy / "dataset.json").write_text(content)
    assert main(["--resume", str(run_copy)]) == 4
    assert "dataset.json" in capsys.readouterr().err


def test_ctrl_c_while_the_data_are_prepared_ends_with_130(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lungkit.training.planning.fingerprint_dataset", interrupted)
    assert main(options()) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for argument, words in (("--version", ""), ("--help", "Exit codes")):
        with pytest.raises(SystemExit) as ended:
            main([argument])
        assert ended.value.code == 0
        assert words in capsys.readouterr().out


def test_logging_of_the_library_is_left_as_it_was(options: Options) -> None:
    logger = logging.getLogger("lungkit")
    handlers = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
    assert main(options()) == 0
    assert [h for h in logger.handlers if isinstance(h, logging.FileHandler)] == handlers
