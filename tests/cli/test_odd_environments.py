"""Commands in odd environments: whatever the terminal, the notebook and the pictures are like."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lungkit.data import write_phantom_dataset

ODD = {
    "a notebook's backend": {"MPLBACKEND": "module://a_notebook.backend_inline"},
    "an encoding of letters without accents": {"PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C"},
    "no place for fonts and settings": {"MPLCONFIGDIR": "/dev/null/matplotlib", "HOME": "/dev/null"},
}


def run(command: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    script = f"import sys; from lungkit.cli.{command} import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    data = write_phantom_dataset(tmp_path / "data", cases=2, shape=(1, 32, 32), dims=2)
    first = min((data / "labelsTr").glob("*.nii.gz"))
    first.rename(first.with_name("Müller µ.nii.gz"))
    return data / "labelsTr"


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_evaluation_ends_well_and_draws_in_an_odd_environment(tmp_path, labels, odd):
    done = run("evaluate", labels, labels, "-o", tmp_path / "out", **ODD[odd])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "distribution.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["train", "predict", "evaluate", "compare", "export", "info"])
def test_help_is_printed_in_an_encoding_of_letters_without_accents(command):
    done = run(command, "--help", **ODD["an encoding of letters without accents"])
    assert done.returncode == 0 and "usage: lungkit-" in done.stdout
