"""What killed processes were writing goes; what living ones write stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lungkit._temporary import remove_leftovers, temporary_name

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows cannot ask whether a process lives")


@pytest.fixture(scope="module")
def dead() -> str:
    """Number of a process that has ended, as names hold it."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return f"{process.pid:x}"


def of_process(path: Path, number: str) -> Path:
    """A temporary name as that process would give it."""
    head, _, end = temporary_name(path).name.partition(".tmp-")
    return path.with_name(f"{head.rpartition('-')[0]}-{number}.tmp-{end}")


def test_files_and_folders_of_a_dead_process_go_at_every_level(tmp_path, dead):
    (tmp_path / "reports").mkdir()
    of_process(tmp_path / "reports" / "a.json", dead).touch()
    folder = of_process(tmp_path / "run", dead)
    folder.mkdir()
    (folder / "half").touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["reports"]


def test_files_of_living_processes_and_of_others_stay(tmp_path):
    mine = temporary_name(tmp_path / "a.nii.gz")
    theirs = of_process(tmp_path / "a.nii.gz", f"{os.getppid():x}")
    for path in (mine, theirs, tmp_path / ".hidden.tmp-a", tmp_path / "a.nii.gz"):
        path.touch()
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_another_machine_has_a_day(tmp_path, dead):
    name = of_process(tmp_path / "a.nii.gz", dead).name.split("-")
    path = tmp_path / "-".join([name[0], "000000" if name[1] != "000000" else "000001", *name[2:]])
    path.touch()
    remove_leftovers(tmp_path)
    assert path.exists()
    os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    assert not path.exists()


def test_only_the_names_that_are_asked_for_go(tmp_path, dead):
    long = "scan" * 30 + ".nii.gz"
    for name in (long, "b.nii.gz"):
        of_process(tmp_path / name, dead).touch()
    remove_leftovers(tmp_path, [long])
    assert [path.name.partition(".tmp-")[2] for path in tmp_path.iterdir()] == ["b.nii.gz"]
