"""How the house is built: who imports whom, and where each module is tested."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lungkit"
TESTS = Path(__file__).resolve().parent
MODULES = sorted(str(path.relative_to(PACKAGE).as_posix()) for path in PACKAGE.rglob("*.py"))

# What a folder or a module of the package may import, besides what that in turn may. Nothing imports upward.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "_text": set(),
    "errors": {"_text"},
    "_allocator": set(),
    "_leaving": set(),
    "_reading": set(),
    "_temporary": set(),
    "_atomic": {"errors", "_reading", "_temporary"},
    "_terminal": {"_text"},
    "checkpoint": {"_atomic"},
    "ops": {"errors"},
    "nn": {"ops"},
    "losses": {"ops"},
    "data": {"_atomic"},
    "metrics": {"ops"},
    "inference": {"nn", "data", "checkpoint"},
    "report": {"metrics", "data"},
    "interop": {"pipeline", "losses"},
    "pipeline": {"inference", "report"},
    "training": {"nn", "losses", "pipeline", "_terminal", "_allocator", "_leaving"},
    "experiments": {"training"},
    "cli": {"experiments", "interop", "_allocator", "_leaving"},
}

# Modules without a test file of their name, and the file that tests them: the parts of a public module or of a command
# are tested through it. A folder stands for all its modules.
TESTED_IN = {
    "cli/compare.py": "experiments/test_compare.py",
    "cli/models.py": "cli/test_points.py",
    "data/augment/": "data/test_augment.py",
    "data/dataset.py": "data/test_read_case.py",
    "data/dicom/_packages.py": "data/dicom/test_files.py",
    "data/dicom/labels.py": "data/dicom/test_segmentation.py",
    "data/normalisation.py": "data/test_preprocessing.py",
    "data/nifti_header.py": "data/test_volume.py",
    "data/phantom/": "data/test_phantom.py",
    "experiments/arms.py": "experiments/test_compare.py",
    "experiments/figures.py": "experiments/test_compare.py",
    "experiments/measured.py": "experiments/test_compare.py",
    "experiments/runs.py": "experiments/test_compare.py",
    "losses/_ranks.py": "losses/test_dice_ce_loss.py",
    "losses/dice_ce.py": "losses/test_dice_ce_loss.py",
    "losses/focal.py": "losses/test_overlap.py",
    "metrics/_surface_numpy.py": "metrics/test_surface.py",
    "interop/nnunet_trainer/": "interop/test_nnunet_package.py",
    "interop/nnunet_plans.py": "interop/test_nnunet_import.py",
    "nn/_foreign_weights.py": "nn/test_monai.py",
    "nn/_grid.py": "nn/test_unet.py",
    "nn/_options.py": "nn/test_unet.py",
    "nn/nnunet.py": "interop/test_nnunet_import.py",
    "ops/_dice_ce_tensors.py": "ops/test_dice_ce.py",
    "ops/_layout.py": "ops/test_attention_gate.py",
    "pipeline/outputs.py": "cli/test_predict.py",
    "pipeline/run.py": "cli/test_predict.py",
    "training/config_io.py": "training/test_config.py",
    "training/session.py": "training/test_trainer.py",
}


def imports(module: str) -> Iterator[str]:
    """Full names of what a module imports, at its top or in a function."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: import by the full name"
            if node.module == "lungkit":
                yield from (f"lungkit.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def within_reach(part: str) -> set[str]:
    """What a part of the package may import, directly or through what it may import."""
    reach = {part, *MAY_IMPORT[part]}
    for other in MAY_IMPORT[part]:
        reach |= within_reach(other)
    return reach


def part_of(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("part", sorted({part_of(module) for module in MODULES}))
def test_nothing_imports_upward(part: str) -> None:
    assert part in MAY_IMPORT, f"say in MAY_IMPORT what {part} may import"
    upward = {
        f"{module} imports {name}"
        for module in MODULES
        if part_of(module) == part
        for name in imports(module)
        if name.startswith("lungkit.") and name.split(".")[1] not in within_reach(part) | {"_native"}
    }
    assert not upward


def test_ops_need_torch_alone() -> None:
    standard = {
        "__future__",
        "collections",
        "contextlib",
        "ctypes",
        "dataclasses",
        "functools",
        "itertools",
        "math",
        "pathlib",
        "sys",
        "warnings",
    }
    found = {name.split(".")[0] for module in MODULES if part_of(module) == "ops" for name in imports(module)}
    assert found - standard <= {"torch", "typing", "lungkit"}


def own_test_of(module: str) -> str:
    path = Path(module)
    return (path.parent / f"test_{path.stem.lstrip('_')}.py").as_posix()


def test_every_module_has_a_test_file_of_its_name() -> None:
    without = {
        module: own_test_of(module)
        for module in MODULES
        if not module.endswith("__init__.py")
        and not (TESTS / own_test_of(module)).is_file()
        and not any(
            module == entry or (entry.endswith("/") and module.startswith(entry)) for entry in TESTED_IN
        )
    }
    assert not without, "write these test files, or say in TESTED_IN where the modules are tested"


@pytest.mark.parametrize("entry", TESTED_IN)
def test_the_table_of_exceptions_is_true(entry: str) -> None:
    assert (PACKAGE / entry).exists(), f"{entry} is gone: take it out of TESTED_IN"
    assert (TESTS / TESTED_IN[entry]).is_file(), f"{TESTED_IN[entry]}, which tests {entry}, is gone"
    assert entry.endswith("/") or not (TESTS / own_test_of(entry)).is_file(), (
        f"{entry} has a test file of its own"
    )
