"""lungkit-train as a user meets it: exit codes, messages, files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from pictures import has_colour
from safetensors.torch import load_file

from lungkit.cli.train import main

Options = Callable[..., list[str]]


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    """Command that runs lungkit-train in a process of its own; a file, since Fabric starts it again."""
    script = tmp_path / "lungkit_train.py"
    script.write_text("import sys\nfrom lungkit.cli.train import main\nsys.exit(main())\n")
    return [sys.executable, str(script)]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures take most of the time of a tiny run, and have tests of their own."""
    monkeypatch.setattr("lungkit.training.run.save_curves", lambda *args, **options: None)
    monkeypatch.setattr("lungkit.training.finishing.draw_overlays", lambda *args, **options: None)


def environment() -> dict[str, str]:
    root = str(Path(sys.modules["lungkit"].__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def status(run: Path) -> dict[str, object]:
    return json.loads((run / "status.json").read_text())


def test_a_run_ends_with_0_and_a_table(options: Options, tmp_path: Path, capsys):
    assert main(options()) == 0
    text = capsys.readouterr().err
    assert "epoch 1/1" in text and "waiting for data" in text
    for word in ("Dice", "IoU", "PPV", "Sensitivity", "phantom_", "mean", 'policy "nan"'):
        assert word in text
    assert status(tmp_path / "runs" / "run")["state"] == "finished"


def test_json_is_the_result_on_standard_output(options: Options, tmp_path: Path, capsys):
    assert main([*options(), "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    content = json.loads(out)
    run = tmp_path / "runs" / "run"
    assert content["run"] == str(run) and content["epochs"] == content["best_epoch"] == 1
    assert 0 <= content["validation"]["dice"] <= 1
    assert "epoch 1/1" not in err and "epoch 1/1" in (run / "train.log").read_text()


def test_a_second_run_gets_a_folder_of_its_own(options: Options, tmp_path: Path):
    assert main(options()) == main(options()) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["run", "run-2"]


def test_prints_a_configuration_that_it_takes_back(options: Options, tmp_path: Path, capsys):
    assert main(options("--print-config", "--epochs=7")) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "run.yaml"
    path.write_text(printed)
    assert main(["--config", str(path), "--print-config"]) == 0
    assert capsys.readouterr().out == printed
    assert yaml.safe_load(printed)["epochs"] == 7
    assert not (tmp_path / "runs").exists()


def test_every_option_is_explained(capsys):
    assert main(["--help-options"]) == 0
    lines = capsys.readouterr().out.splitlines()
    explained = dict(zip(lines[::2], lines[1::2], strict=True))
    assert any(name.startswith("--model.features ") for name in explained)
    assert [name for name, meaning in explained.items() if not meaning.strip()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modle", "unet"], "did you mean 'model"),
        (["--engine.devics=2"], "did you mean 'engine.devices'"),
        (["--model", "unett"], "did you mean 'unet'"),
        (["--epochs=0"], "epochs is 0"),
        (["--epochs=many"], "epochs"),
        (["stray"], "unexpected argument 'stray'"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--checkpoint", "previous"], "--resume"),
        (["--name", "../out"], "name is '../out'"),
        (["--data.fold", "7"], "folds 0 to 4"),
        (["--engine.accelerator=abacus"], "engine.accelerator 'abacus'"),
    ],
)
def test_wrong_usage_ends_with_2(options: Options, capsys, arguments, message):
    fixed = [] if arguments == ["stray"] else options()
    assert main([*fixed, *arguments]) == 2
    text = capsys.readouterr().err
    assert message in text and "Traceback" not in text


def test_an_unknown_key_in_a_file_ends_with_2(tmp_path: Path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {name: sgd}\n")
    assert main(["--config", str(path)]) == 2
    text = capsys.readouterr().err
    assert str(path) in text and "did you mean 'optimiser'" in text


def test_a_folder_without_a_run_ends_with_4(tmp_path: Path, capsys):
    assert main(["--resume", str(tmp_path)]) == 4
    assert "not a run folder" in capsys.readouterr().err


def test_a_damaged_checkpoint_ends_with_4_and_the_previous_one_is_offered(options: Options, tmp_path, capsys):
    assert main(options("--epochs=2")) == 0
    run = tmp_path / "runs" / "run"
    path = run / "checkpoints" / "last" / "trainer.pt"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["--resume", str(run)]) == 4
    text = capsys.readouterr().err
    assert "trainer.pt is damaged" in text and "--checkpoint previous" in text
    assert main(["--resume", str(run), "--checkpoint", "previous"]) == 0


def test_resuming_with_other_options_lists_them(options: Options, tmp_path: Path, capsys):
    assert main(options()) == 0
    run = str(tmp_path / "runs" / "run")
    assert main(["--resume", run, "--batch_size=9", "--model.dropout=0.5"]) == 2
    text = capsys.readouterr().err
    assert "batch_size is 2 in the run, 9 asked for" in text
    assert "model.dropout is 0.0 in the run, 0.5 asked for" in text


def test_a_run_goes_on_where_its_scans_were_moved_to(options: Options, dataset: Path, tmp_path: Path, capsys):
    assert main(options(data=dataset)) == 0
    moved = dataset.rename(tmp_path / "moved")
    assert main(["--resume", str(tmp_path / "runs" / "run"), "--data", str(moved)]) == 0
    assert "data.root is" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["--print-config", "--dry-run", "--preview-augmentation"])
def test_resuming_does_nothing_else(options: Options, tmp_path: Path, capsys, other):
    assert main(options()) == 0
    assert main(["--resume", str(tmp_path / "runs" / "run"), other]) == 2
    assert other in capsys.readouterr().err


def test_a_full_disk_ends_with_5(options: Options, tmp_path: Path, monkeypatch, capsys):
    def full(weights, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("lungkit.checkpoint.save_file", full)
    assert main(options()) == 5
    assert "disk or quota is full" in capsys.readouterr().err
    assert status(tmp_path / "runs" / "run")["state"] == "failed"


def test_no_memory_ends_with_5(options: Options, monkeypatch, capsys):
    def greedy(self, step, images, labels):
        raise MemoryError("1 EiB")

    monkeypatch.setattr("lungkit.training.session.Session.train_step", greedy)
    assert main(options()) == 5
    assert "out of memory" in capsys.readouterr().err


def test_a_dry_run_says_what_it_did_and_leaves_no_run(options: Options, tmp_path: Path, capsys):
    assert main(options("--dry-run")) == 0
    text = capsys.readouterr().err
    assert "one step trained" in text and "patch 16 x 16" in text
    assert not (tmp_path / "runs").exists()


def test_the_preview_of_the_augmentation_is_a_picture(options: Options, tmp_path: Path):
    path = tmp_path / "preview.png"
    assert main(options("--preview-augmentation", path)) == 0
    assert has_colour(path, "#ffb000")  # the outline of the foreground
    path.write_bytes(b"mine")
    assert main(options("--preview-augmentation", path)) == 2
    assert path.read_bytes() == b"mine"
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_with_75(program, options: Options, tmp_path: Path, number):
    run = tmp_path / "runs" / "run"
    process = subprocess.Popen(
        [*program, *options("--epochs=100000")], env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 300
        while not (run / "metrics.csv").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        _, text = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 75, text
    assert f"continue with --resume {run}" in text
    assert status(run)["state"] == "interrupted"
    assert (run / "checkpoints" / "last" / "manifest.json").is_file()


def test_two_processes_train_one_network(program, options: Options, tmp_path: Path):
    # Two processes with one patch each see the batches of one process with two. Without augmentation, which draws
    # for each process, loss and gradients are then those of one process, up to rounding.
    same = ("--epochs=2", "--augment.enabled=false", "--engine.precision=fp32")
    done = subprocess.run(
        [*program, *options(*same, "--batch_size=1", "--engine.devices=2")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("epoch 2/2") == done.stderr.count("best validation Dice") == 1
    assert main(options(*same, "--batch_size=2", "--name=alone")) == 0
    runs = [tmp_path / "runs" / name for name in ("run", "alone")]
    weights = [load_file(run / "checkpoints" / "last" / "model.safetensors") for run in runs]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0.0, atol=5e-7)
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert [row["train_loss"] for row in rows[0]] == pytest.approx(
        [row["train_loss"] for row in rows[1]], rel=5e-7
    )


def test_two_processes_end_together_where_data_are_bad(program, options: Options, dataset: Path):
    image = next((dataset / "imagesTr").iterdir())
    image.write_bytes(image.read_bytes()[:-20])
    done = subprocess.run(
        [*program, *options("--engine.devices=2", data=dataset)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 3, done.stderr
    assert image.name in done.stderr


def test_a_folder_that_cannot_hold_runs_is_said_before_any_work(options: Options, tmp_path: Path, caplog):
    (tmp_path / "file").touch()
    assert main(options(f"--runs={tmp_path / 'file' / 'runs'}", f"--data={tmp_path / 'absent'}")) == 2
    assert f"{tmp_path / 'file'} cannot be written (Not a directory); name another folder with" in caplog.text
    assert "absent" not in caplog.text


def test_the_log_says_where_on_what_and_how_a_run_computes(options: Options, tmp_path: Path, phantoms: Path):
    assert main(options("--device=cpu", "--engine.precision=fp32")) == 0
    log = (tmp_path / "runs" / "run" / "train.log").read_text()
    assert f"on cpu, fp32, 1 thread; data: {phantoms}" in log


def test_help_shows_the_options_that_are_used_most(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for name in ("--data DIR", "--model NAME", "--epochs N", "--device", "--seed N", "--runs DIR"):
        assert name in text


def test_a_finished_run_is_trained_on_with_more_epochs(options: Options, tmp_path: Path, capsys):
    assert main(options("--no-report")) == 0
    run = tmp_path / "runs" / "run"
    assert main(["--resume", str(run), "--epochs", "2", "--no-report"]) == 0
    text = capsys.readouterr().err
    assert "epochs is 1 in the run, 2 asked for" in text and "epoch 2/2" in text
    assert main(["--resume", str(run), "--epochs", "1"]) == 2
    assert "has trained 2 already" in capsys.readouterr().err


def test_a_run_begins_with_the_weights_of_another(options: Options, tmp_path: Path, capsys):
    assert main(options("--no-report")) == 0
    arguments = [
        word for word in options("--no-report", "--init", tmp_path / "runs" / "run") if "model" not in word
    ]
    assert main(arguments) == 0
    assert "initialised from run" in capsys.readouterr().err
    # Named, though it is the default: the run's network is another.
    assert main([*arguments, "--model", "attention-unet"]) == 2
    assert "model.name is 'attention-unet'" in capsys.readouterr().err


def test_the_same_command_begins_goes_on_and_ends(options: Options, tmp_path: Path, capsys):
    command = options("--no-report", "--resume=auto")
    assert main(command) == 0  # begins
    run = tmp_path / "runs" / "run"
    assert main(command) == 0
    assert f"{run} is finished; nothing is left to do" in capsys.readouterr().err
    (run / "status.json").write_text(json.dumps({"state": "running"}))  # as a killed process leaves it
    assert main(command) == 0
    assert "continuing after step 2" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run"]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(options: Options, tmp_path: Path):
    (tmp_path / "runs" / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "config.yaml").touch()
    assert main(options("--no-report", "--resume=auto")) == 0
    assert status(tmp_path / "runs" / "run-2")["state"] == "finished"
