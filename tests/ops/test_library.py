"""The op libraries: what they need from torch, and what happens where they are absent."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_kernels import on_the_cpu, on_the_emulator

from lungkit.ops import _library, confusion_counts

LIBRARIES = sorted(_library._NATIVE_FOLDER.glob("lungkit_*.so"))
# What libtorch exports in C: the stable shims. All else that is allowed comes from the C and C++ run-time libraries.
C_SHIM = re.compile(r"(aoti_)?torch_[a-z0-9_]+$")
RUN_TIME = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$|_ITM_\w+|__gmon_start__$|__cxa_finalize")


def run(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_only_c_shims_are_needed_from_torch(library):
    needed = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", str(library)).splitlines()]
    others = [name for name in needed if not C_SHIM.match(name) and not RUN_TIME.match(name)]
    assert any(C_SHIM.match(name) for name in needed)
    assert others == []


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_libraries_name_libtorch_and_no_folder(library):
    dynamic = run("readelf", "-d", str(library))
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    assert "libtorch.so" in needed
    assert not [name for name in needed if name.startswith(("libtorch_", "libc10", "libpython", "libcuda"))]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@pytest.mark.skipif(not _library.CPU_LIBRARY.loaded, reason=f"no CPU library: {_library.CPU_LIBRARY.reason}")
@pytest.mark.parametrize(("name", "schema"), sorted(_library.defined_ops().items()))
def test_native_schema_is_the_one_that_python_falls_back_to(name, schema):
    native = getattr(torch.ops.lungkit, name).default._schema
    assert native == torch._C.parse_schema(f"lungkit::{schema}")


@pytest.mark.skipif(not _library.CPU_LIBRARY.loaded, reason=f"no CPU library: {_library.CPU_LIBRARY.reason}")
def test_use_isa_restores_what_was_in_use():
    before = _library.cpu_isa()
    with _library.use_isa("baseline"):
        assert _library.cpu_isa() == "baseline"
    assert _library.cpu_isa() == before


def test_an_instruction_set_that_is_absent_is_refused():
    with pytest.raises(ValueError, match="'avx1024' is not available"), _library.use_isa("avx1024"):
        pass


@on_the_cpu
def test_the_fixture_runs_the_instruction_set_that_it_names(kernels):
    assert _library.cpu_isa() == kernels


@on_the_emulator
def test_the_fixture_sends_ops_to_the_emulator(kernels, emulator):
    labels = torch.zeros(1, 4, dtype=torch.uint8)
    with emulator.counted() as counts:
        confusion_counts(labels, labels, 2)
    assert counts.launches > 0


def test_without_the_fixture_nothing_reaches_the_emulator(emulator):
    labels = torch.zeros(1, 4, dtype=torch.uint8)
    with emulator.counted() as counts:
        confusion_counts(labels, labels, 2)
    assert counts.launches == 0


TWINS_ONLY = """
import sys, torch
# The finder of an editable installation would lead back to the checkout and its libraries.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path.insert(0, {folder!r})
import lungkit.ops
from lungkit.ops import _library, confusion_counts
assert not _library.CPU_LIBRARY.loaded
print(_library.CPU_LIBRARY.reason)
counts, _ = torch.compile(confusion_counts, fullgraph=True, backend="aot_eager")(
    torch.tensor([[0, 1]]), torch.tensor([[1, 1]]), 2
)
print(counts.tolist())
"""


def test_without_native_libraries_every_op_runs_on_its_twin(tmp_path: Path):
    package = _library._NATIVE_FOLDER.parent
    shutil.copytree(package, tmp_path / "lungkit", ignore=shutil.ignore_patterns("_native", "__pycache__"))
    script = TWINS_ONLY.format(folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "not built" in done.stdout
    assert "[[[0, 1, 0], [1, 0, 1]]]" in done.stdout


@pytest.mark.parametrize(
    ("library", "platform", "checkout", "reason"),
    [
        ("lungkit_cpu.so", "linux", False, "no C++20 compiler was found when lungkit was installed"),
        ("lungkit_cuda.so", "linux", False, "no nvcc was found when lungkit was installed"),
        ("lungkit_cpu.so", "darwin", False, "native libraries for Linux only, this is darwin"),
        ("lungkit_cpu.so", "linux", True, "not built in the checkout"),
    ],
)
def test_an_absent_library_has_a_true_reason(monkeypatch, tmp_path, library, platform, checkout, reason):
    if checkout:
        (tmp_path / "csrc").mkdir()
        (tmp_path / "CMakeLists.txt").touch()
    monkeypatch.setattr(_library, "_NATIVE_FOLDER", tmp_path / "lungkit" / "_native")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "platform", platform)
    assert reason in _library._why_absent(tmp_path / "lungkit" / "_native" / library)


def copy_without_libraries(folder: Path) -> Path:
    package = _library._NATIVE_FOLDER.parent
    shutil.copytree(package, folder / "lungkit", ignore=shutil.ignore_patterns("_native", "__pycache__"))
    return folder


def run_with(paths: list[Path], *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )


def test_a_checkout_that_hides_an_installed_copy_with_kernels_says_so(tmp_path: Path):
    copy = copy_without_libraries(tmp_path / "checkout")
    (copy / "csrc").mkdir()
    (copy / "CMakeLists.txt").touch()
    installed = tmp_path / "site" / "lungkit"
    (installed / "_native").mkdir(parents=True)
    (installed / "_native" / "lungkit_cpu.so").touch()
    done = run_with(
        [copy, installed.parent], "-c", "from lungkit.cli.info import main; main([])", cwd=tmp_path
    )
    first, _, loud, *_ = done.stdout.splitlines()
    assert f"from {copy / 'lungkit'} (a checkout)" in first
    assert loud.startswith("NOT NATIVE, everything runs in plain PyTorch: ")
    assert f"hides the lungkit in {installed}" in loud
    assert "no C++20 compiler" not in done.stdout
    assert done.stderr.count("EVERYTHING RUNS IN PLAIN PYTORCH") == 1
    assert f"the checkout {copy} holds no kernels and hides {installed}" in done.stderr


def test_benchmarks_do_not_time_a_fallback_as_lungkit(tmp_path: Path):
    root = Path(__file__).resolve().parents[2]
    copy = copy_without_libraries(tmp_path)
    arguments = ("-m", "pytest", str(root / "benchmarks"), "--smoke", "-k", "hd95 and smoke or held", "--co")
    refused = run_with([copy], *arguments, cwd=tmp_path)
    assert refused.returncode == 4
    assert f"lungkit from {copy / 'lungkit'} would be timed without its kernels" in refused.stderr
    allowed = run_with([copy], *arguments, "--allow-fallback", cwd=tmp_path)
    assert "benchmarks: cpu kernels NOT LOADED: " in allowed.stdout
