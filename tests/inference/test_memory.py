"""Peak memory of predicting a long scan: the scan, its mask and one slab, not float volumes of every class."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from model_cases import save_model, threshold_network

# A process of its own: its peak is then that of this prediction, whatever other tests did before.
_CHILD = """
import json
import sys
from pathlib import Path

import numpy as np
import torch

import lungkit
from lungkit.data import Volume


def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


torch.set_num_threads(1)
predictor = lungkit.Predictor.from_run(sys.argv[1], device="cpu", precision="fp32", overlap=0.25)
affine = np.diag([0.7, 0.7, 0.7, 1.0])
predictor(Volume(np.full((64, 64, 40), -1000, np.int16), affine))  # whatever is imported and set up at first use
before = memory("VmRSS")
scan = np.full((512, 512, 600), -1000, np.int16, order="F")
scan[100:200, 150:250, 300:500] = 40
mask = predictor(Volume(scan, affine)).mask
print(json.dumps({"peak": memory("VmHWM") - before, "scan": scan.nbytes, "tumour": int(mask.sum())}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc, which only Linux has")
def test_a_scan_of_600_slices_takes_less_than_two_and_a_half_times_its_own_size(tmp_path):
    model = save_model(tmp_path / "m", threshold_network(), patch_size=(32, 128, 128))
    done = subprocess.run([sys.executable, "-c", _CHILD, str(model)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tumour"] == 100 * 100 * 200
    assert found["peak"] < 2.5 * found["scan"]
