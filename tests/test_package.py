from __future__ import annotations

import subprocess
import sys

import pytest

import lungkit

HEAVY = (
    "lightning",
    "lightning_fabric",
    "matplotlib",
    "monai",
    "nibabel",
    "yaml",
    "rich",
    "lungkit.cli",
)


def test_import_is_light():
    script = f"import sys, lungkit; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'segment'"):
        _ = lungkit.segment
