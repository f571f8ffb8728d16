"""The way from a dataset to measured masks, on a simulated Windows; see as_on_windows.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lungkit
from lungkit.data import write_phantom_dataset

PROGRAM = Path(__file__).with_name("as_on_windows.py")
BUDGET = [
    "--data.patch_size=[16,16]",
    "--model=unet",
    "--model.features=[4,8]",
    "--steps_per_epoch=2",
    "--batch_size=2",
    "--device=cpu",
]

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the simulation reads /proc of Linux"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and a copy of the package without native libraries."""
    folder = tmp_path_factory.mktemp("windows")
    package = Path(lungkit.__file__).parent
    shutil.copytree(package, folder / "lungkit", ignore=shutil.ignore_patterns("_native", "__pycache__"))
    write_phantom_dataset(folder / "dataset", cases=5, shape=(1, 48, 48), dims=2)
    return folder


def run(place: Path, command: str, *arguments: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(place),
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(place / "cache"),
        "PYTHONWARNINGS": "ignore::RuntimeWarning",
    }
    done = subprocess.run(
        [sys.executable, str(PROGRAM), command, *arguments],
        capture_output=True,
        text=True,
        cwd=place,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_training_resuming_prediction_and_evaluation_go_through(place: Path):
    run(place, "train", "--data=dataset", "--name=run", "--epochs=2", *BUDGET)
    text = run(place, "train", "--resume=runs/run", "--epochs=3")
    assert "epoch 3/3" in text
    kept = {path.name for path in (place / "runs" / "run" / "checkpoints").iterdir()}
    assert kept == {"last", "previous", "best"}
    assert (place / "runs" / "run" / "report.html").is_file()
    arguments = ["-i", "dataset/imagesTr", "-o", "masks", "--model", "runs/run", "--device", "cpu"]
    run(place, "predict", *arguments, "--overwrite")
    run(place, "evaluate", "masks", "dataset/labelsTr", "-o", "evaluation")
    assert (place / "evaluation" / "metrics.csv").is_file()


def test_what_is_not_native_is_said_with_its_reason(place: Path):
    text = run(place, "info")
    assert "NOT NATIVE, everything runs in plain PyTorch" in text


def test_the_simulation_refuses_what_windows_refuses(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "open.txt").touch()
    script = f"""
import os, sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
import as_on_windows
as_on_windows.pretend()
from lungkit import _atomic, checkpoint
refused = []
def check(call, *arguments):
    try:
        call(*arguments)
    except (OSError, AttributeError) as error:
        refused.append(type(error).__name__)
with open("folder/open.txt") as file:
    check(os.rename, "folder", "other")
    check(os.unlink, "folder/open.txt")
check(_atomic.os.open, "folder", os.O_RDONLY)
check(lambda: _atomic.os.getuid())
os.mkdir("other")
check(os.rename, "folder", "other")
print(refused)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    names = ["PermissionError"] * 3 + ["AttributeError", "FileExistsError"]
    assert done.stdout.strip() == str(names)
