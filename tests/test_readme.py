"""The README's Python examples run as they stand, one after another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from lungkit.data import read_volume, write_nifti

README = Path(__file__).resolve().parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_examples_run_one_after_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_nifti("scan.nii.gz", np.full((40, 30, 4), -700, np.int16), np.diag([2.5, 2.5, 5.0, 1.0]))
    names: dict[str, Any] = {}
    for number, example in enumerate(EXAMPLES, start=1):
        exec(compile(example, f"README example {number}", "exec"), names)
    assert read_volume("mask.nii.gz").array.shape == (40, 30, 4)


def test_training_prediction_and_the_parts_are_among_them():
    for call in ("Trainer(config).fit()", "Predictor.from_run(", "DiceCELoss("):
        assert any(call in example for example in EXAMPLES)
