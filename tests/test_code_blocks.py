"""Every code block of README.md and docs/ runs, page by page, in a folder with a tiny dataset and a tiny budget.

Commands run in this process, one after another, with options appended that keep them short. A block that cannot run
here stands below a line ``*Not run by the tests: reason.*``, which its readers see too. Lines of pip are held against
pyproject.toml instead of being run: installing is what the first steps of CI do.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from nnunet_cases import write_nnunet_model

from lungkit.data import make_phantom, write_nifti, write_phantom_dataset

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"\*Not run by the tests: (.+)\.\*\n*\Z")
_SHOWN = ("text", "yaml", "json")  # what a command prints, or a file
_SCRIPTS = dict(
    re.findall(r'^(lungkit-[\w-]+) = "([\w.]+):main"$', (ROOT / "pyproject.toml").read_text(), re.M)
)
_EXTRAS = set(
    re.findall(
        r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("optional-dependencies]")[2], re.M
    )
)
_BUDGET = {
    "epochs": "1",
    "steps_per_epoch": "1",
    "batch_size": "2",
    "data.patch_size": "[32, 32]",
    "data.context_slices": "0",
    "data.phantom_cases": "10",
    "model.features": "[4, 8]",
    "engine.accelerator": "cpu",
    "engine.precision": "fp32",
}


class Block(NamedTuple):
    page: Path
    number: int
    language: str
    code: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.number}"


def blocks(page: Path) -> list[Block]:
    text, found = page.read_text(encoding="utf-8"), []
    for number, fence in enumerate(_FENCE.finditer(text), start=1):
        reason = _NOT_RUN.search(text[: fence.start()])
        found.append(Block(page, number, fence[1], fence[2], reason[1] if reason else None))
    return found


WITH_CODE = [
    page
    for page in PAGES
    if any(not block.not_run and block.language not in _SHOWN for block in blocks(page))
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of: DATASET, scans, labels, predictions, trained runs, DICOM, a model of nnU-Net."""
    folder = tmp_path_factory.mktemp("workplace")
    dataset = write_phantom_dataset(folder / "DATASET", cases=5, shape=(3, 48, 48))
    (dataset / "splits_final.json").unlink()
    for name in ("scans", "labels", "predictions", "archive"):
        (folder / name).mkdir()
    for number, path in enumerate(sorted((dataset / "imagesTr").iterdir()), start=1):
        name = f"patient-{number}.nii.gz"  # not phantom_0000, which alone would be channel 0 of a scan
        label = dataset / "labelsTr" / path.name.replace("_0000.nii", ".nii")
        label = label.rename(label.with_name(name))
        image = path.rename(path.with_name(f"patient-{number}_0000.nii.gz"))
        if number <= 2:
            shutil.copy(image, folder / "scans" / name)
            shutil.copy(label, folder / "labels" / name)
            shutil.copy(label, folder / "predictions" / name)
    shutil.copy(folder / "scans" / "patient-1.nii.gz", folder / "scan.nii.gz")
    for name in ("a.nii.gz", "b.nii.gz"):
        shutil.copy(folder / "labels" / "patient-1.nii.gz", folder / name)
    write_nnunet_model(folder)
    (folder / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        run("lungkit-train --data DATASET --name A")
    for name in ("B", "NAME"):
        shutil.copytree(folder / "runs" / "A", folder / "runs" / name)
    if importlib.util.find_spec("highdicom") is not None:
        write_dicom(folder)
    return folder


def write_dicom(folder: Path) -> None:
    """series/, an archive of two patients with the RTSTRUCT of their tumours, RS.dcm and a mask on its grid."""
    from dicom_cases import write_ct

    from lungkit.data import read_series, write_rtstruct

    for number in (1, 2):
        phantom = make_phantom(number, shape=(3, 48, 48))
        patient = folder / "archive" / f"p{number}"
        write_ct(
            patient / "ct",
            phantom.image.transpose(2, 1, 0),
            spacing=phantom.spacing_mm[1:],
            step=phantom.spacing_mm[0],
            series=number,
            edit=lambda header, _, number=number: setattr(header, "PatientID", f"P{number}"),
        )
        scan = read_series(patient / "ct")
        write_rtstruct(patient / "RS.dcm", scan, phantom.label.transpose(2, 1, 0), {"GTV-1": 1})
        if number == 1:
            shutil.copytree(patient / "ct", folder / "series")
            shutil.copy(patient / "RS.dcm", folder / "RS.dcm")
            write_nifti(folder / "mask-of-p1.nii.gz", phantom.label.transpose(2, 1, 0), scan.volume.affine)


@pytest.fixture
def place(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the workplace, which is the current folder; what a page exports ends with it."""
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(tmp_path / "cache")}):
        monkeypatch.chdir(shutil.copytree(workplace, tmp_path / "place", symlinks=True))
        yield tmp_path / "place"


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.usefixtures("place")
def test_the_code_of_a_page_runs(page: Path) -> None:
    if page.name == "dicom.md" and importlib.util.find_spec("highdicom") is None:
        pytest.skip("highdicom is not installed (extra dicom)")
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.not_run or block.language in _SHOWN:
            continue
        if block.language == "python":
            exec(compile(block.code, str(block), "exec"), names)
        else:
            assert block.language == "sh", f"{block}: say what it is: sh, python, or {', '.join(_SHOWN)}"
            for line in block.code.replace("\\\n", " ").splitlines():
                run(line)


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    assert len([block for page in PAGES for block in blocks(page) if block.not_run]) <= 6


def test_the_two_commands_training_prediction_and_the_parts_are_among_them() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in ("pip install . && lungkit-train", "pip install '.[test]' && pytest"):
        assert command in readme
    code = "".join(block.code for page in PAGES for block in blocks(page))
    for call in ("Trainer(config).fit()", "Predictor.from_run(", "DiceCELoss(", "dice_ce_statistics("):
        assert call in code


def run(line: str) -> None:
    """One line of a shell: commands joined by ``&&``, ``> FILE``, ``export NAME=VALUE``."""
    words = shlex.split(line, comments=True)
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        command, words = words[:end], words[end + 1 :]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = run_command(command[: command.index(">")] if ">" in command else command)
        expected = 2 if "# refused" in line else 0
        assert code == expected, f"{line!r} ended with exit code {code}: {printed.getvalue()[-500:]}"
        if ">" in command:
            Path(command[-1]).write_text(printed.getvalue())


def run_command(words: Sequence[str]) -> int:
    """Run a command in this process, with a small budget where it trains; its exit code."""
    while re.match(r"[A-Z_]+=", words[0]):  # an environment for this command alone
        words = words[1:]
    name, *arguments = words
    if name in ("python3", "source", ".") or name == "pytest":  # a virtual environment; this suite itself
        return 0
    if name == "export":
        os.environ.update(assignment.split("=", 1) for assignment in arguments)
        return 0
    if name == "pip":
        return installs(arguments)
    if name == "python":  # tests/test_examples.py runs them
        return 0 if Path(arguments[0]).is_file() and arguments[0].startswith("examples/") else 2
    if name == "lungkit-compare" and "--seeds" in arguments:
        at = arguments.index("--seeds")
        arguments = [*arguments[: at + 2], *arguments[at + 4 :]]  # one of the three
    trains = name == "lungkit-train" and not {"--resume", "--print-config"} & set(arguments)
    if trains or (name == "lungkit-compare" and "--runs" not in arguments):
        arguments += ["--no-report", *(f"--{option}={value}" for option, value in _BUDGET.items())]
    try:
        return int(importlib.import_module(_SCRIPTS[name]).main(arguments))
    except SystemExit as end:  # of the parser
        return int(end.code or 0)


def installs(arguments: Sequence[str]) -> int:
    """Whether the extras that a line of pip asks for exist."""
    for argument in arguments:
        extras = re.fullmatch(r"(?:\.|lungkit)\[(.+)\]", argument)
        assert extras is None or set(extras[1].split(",")) <= _EXTRAS, f"no such extra: {argument}"
    return 0 if arguments[0] == "install" else 2
