"""Every script in examples/ runs as it stands, and says what it should."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SAYS = {
    "monai_loss": "step 4: MONAI",
    "own_network": "wrote own_network.png",
    "training_loop": "held-out slice: Dice",
    "evaluate_anything": "lesion_f1",
    "dicom_to_seg": "read back the same",
}
NEEDS = {"monai_loss": "monai", "dicom_to_seg": "highdicom"}


def test_each_script_has_a_row_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_runs(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{name}.py"])
    state = torch.random.get_rng_state()
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        torch.random.set_rng_state(state)
    told = capsys.readouterr().out
    assert SAYS[name] in told
    for line in told.splitlines():
        if line.startswith("wrote "):
            assert Path(line.removeprefix("wrote ")).stat().st_size > 10_000
