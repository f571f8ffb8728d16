"""lungkit-export: what it writes and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_cases import save_model

from lungkit.cli.export import main
from lungkit.nn import build_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a best checkpoint."""
    network = build_model("unet", dims=2, features=(2, 2), seed=0)
    save_model(tmp_path / "run" / "checkpoints" / "best", network, patch_size=(8, 8))
    return tmp_path / "run"


def test_a_run_becomes_a_file_that_says_what_it_is(run, tmp_path, capsys):
    assert main(["--model", str(run), "-o", str(tmp_path / "m.pt2")]) == 0
    assert "image (batch, 1, y, x), free sizes in multiples of 2 x 2" in capsys.readouterr().err
    files = {"lungkit.json": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=files)
    assert json.loads(files["lungkit.json"])["model"]["name"] == "run"


def test_format_and_suffix_must_fit(run, tmp_path, capsys):
    assert main(["--model", str(run), "-o", str(tmp_path / "m.pt2"), "--format", "onnx"]) == 2
    assert "must end with .onnx" in capsys.readouterr().err
    assert not (tmp_path / "m.pt2").exists()


def test_what_is_not_a_checkpoint_is_exit_code_4(tmp_path, capsys):
    pickled = tmp_path / "weights.pth"
    torch.save({}, pickled)
    assert main(["--model", str(pickled), "-o", str(tmp_path / "m.pt2")]) == 4
    assert "not a checkpoint" in capsys.readouterr().err


def test_a_folder_that_does_not_exist_is_a_usage_error(run, tmp_path, capsys):
    assert main(["--model", str(run), "-o", str(tmp_path / "none" / "m.pt2")]) == 2
    assert "a folder that exists" in capsys.readouterr().err


def test_the_native_gate_needs_a_network_with_gates(run, tmp_path, capsys):
    assert main(["--model", str(run), "-o", str(tmp_path / "m.pt2"), "--native-gate"]) == 2
    assert "no attention gates" in capsys.readouterr().err


def test_a_device_that_is_not_here_is_a_usage_error(run, tmp_path, capsys):
    assert main(["--model", str(run), "-o", str(tmp_path / "model.pt2"), "--device", "abacus"]) == 2
    assert "device 'abacus' cannot be used" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.pt2"))


def test_a_file_is_replaced_on_request_only(run, tmp_path, capsys):
    (tmp_path / "m.pt2").write_text("mine")
    assert main(["--model", str(run), "-o", str(tmp_path / "m.pt2")]) == 2
    assert "--overwrite" in capsys.readouterr().err and (tmp_path / "m.pt2").read_text() == "mine"
    assert main(["--model", str(run), "-o", str(tmp_path / "m.pt2"), "--overwrite"]) == 0
    torch.export.load(tmp_path / "m.pt2")
