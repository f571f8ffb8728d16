"""The build backend: which torch it builds against, and that what was compiled is kept."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "build_backend" / "lungkit_build.py"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The backend in a folder of its own, with scikit-build-core at the path that an isolated environment has now."""
    installed = tmp_path / "environment" / "scikit_build_core"
    fake = ModuleType("scikit_build_core")
    fake.__file__ = str(installed / "__init__.py")
    names = [
        "get_requires_for_build_sdist",
        "build_sdist",
        "prepare_metadata_for_build_wheel",
        "prepare_metadata_for_build_editable",
        "get_requires_for_build_wheel",
        "get_requires_for_build_editable",
        "build_wheel",
        "build_editable",
    ]
    fake.build = SimpleNamespace(**{name: lambda *_: [] for name in names})
    monkeypatch.setitem(sys.modules, "scikit_build_core", fake)
    spec = importlib.util.spec_from_file_location("lungkit_build", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def record(folder: Path, text: str) -> Path:
    path = folder / "build" / "cp311" / ".skbuild-info.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def test_a_build_in_another_isolated_environment_goes_on_in_the_same_folder(backend, tmp_path):
    path = record(tmp_path, json.dumps({"skbuild_path": "/gone/scikit_build_core", "source_dir": "/source"}))
    backend.build_wheel("wheels")
    expected = str((tmp_path / "environment" / "scikit_build_core").resolve())
    assert json.loads(path.read_text()) == {"skbuild_path": expected, "source_dir": "/source"}


@pytest.mark.parametrize("text", ["", "[1]", "{}", "null"])
def test_a_damaged_record_is_left_to_scikit_build_core(backend, tmp_path, text):
    path = record(tmp_path, text)
    backend.build_wheel("wheels")
    assert path.read_text() == text


def torch_of(folder: Path, version: str) -> None:
    header = folder / "torch" / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    major, minor = version.split(".")
    header.write_text(f"#define TORCH_VERSION_MAJOR {major}\n#define TORCH_VERSION_MINOR {minor}\n")


@pytest.mark.parametrize(
    ("version", "asks"), [("2.10", []), ("2.9", ["torch==2.13.0"]), (None, ["torch==2.13.0"])]
)
def test_torch_is_asked_for_only_where_there_is_none_new_enough(
    backend, tmp_path, monkeypatch, version, asks
):
    monkeypatch.delenv("LUNGKIT_TORCH_DIR", raising=False)
    monkeypatch.setattr(
        backend.sysconfig, "get_paths", lambda: dict.fromkeys(("purelib", "platlib"), str(tmp_path))
    )
    if version:
        torch_of(tmp_path, version)
    assert backend.get_requires_for_build_wheel() == asks
