"""Standard output and error that are closed, full or without a reader end no command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, /dev/full and /proc of Linux")

WRONG = ("closed", "full", "pipe")


@pytest.mark.parametrize("wrong", WRONG)
def test_training_goes_on_in_silence_with_its_log(commands, training, folder, wrong):
    place = folder("work")
    done = commands.run("train", *training(), folder=place, streams={"1": wrong, "2": wrong})
    assert done.code == 0, done.text
    run = place / "runs" / "run"
    assert json.loads((run / "status.json").read_bytes())["state"] == "finished"
    assert "epoch 2/2" in (run / "train.log").read_text()


@pytest.mark.parametrize("wrong", WRONG)
def test_prediction_and_evaluation_go_on_in_silence(commands, finished, phantoms, folder, wrong):
    place = folder("work")
    scan = phantoms / "imagesTr" / "phantom_0000_0000.nii.gz"
    done = commands.run(
        "predict",
        "-i",
        scan,
        "-o",
        "masks",
        "--model",
        finished,
        "--device",
        "cpu",
        folder=place,
        streams={"2": wrong},
    )
    assert done.code == 0, done.text
    labels = phantoms / "labelsTr"
    done = commands.run(
        "evaluate", labels, labels, "-o", "out", "--no-report", folder=place, streams={"2": wrong}
    )
    assert done.code == 0, done.text
    assert (place / "masks" / "results.csv").is_file() and (place / "out" / "metrics.json").is_file()


@pytest.mark.parametrize("wrong", ["closed", "full"])
def test_a_result_that_does_not_arrive_is_an_error_of_one_sentence(commands, training, folder, wrong):
    done = commands.run("train", *training("--print-config"), folder=folder("work"), streams={"1": wrong})
    assert done.code == 5
    assert done.text.startswith("error: standard output cannot be written") and done.text.count("\n") == 1


def test_a_reader_that_has_read_enough_is_no_error(commands, training, folder):
    done = commands.run("train", *training("--print-config"), folder=folder("work"), streams={"1": "pipe"})
    assert (done.code, done.text) == (0, "")


def test_a_file_does_not_take_the_place_of_a_closed_stream(commands, phantoms, folder):
    place: Path = folder("work")
    labels = phantoms / "labelsTr"
    wrong = {"1": "closed", "2": "closed"}
    commands.run("evaluate", labels, labels, "-o", "out", "--no-report", folder=place, streams=wrong)
    assert json.loads((place / "out" / "metrics.json").read_bytes())["failed"] == {}
