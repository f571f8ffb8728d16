"""The end of a process that was one of several: all that is to be done is done, and nothing is taken apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lungkit
from lungkit._leaving import leave

SCRIPT = """
import atexit, sys
from lungkit._leaving import become_one_of_several
from lungkit.cli._common import run_command

class Kept:
    def __del__(self):
        sys.stderr.write("taken apart")

def command():
    {command}

kept = Kept()
atexit.register(print, "done at the end")
become_one_of_several() if {several} else None
code = run_command(command)
print("returned")
sys.exit(code)
"""


def ran(command: str, *, several: bool) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(command=command, several=several)],
        env={"PYTHONPATH": str(Path(lungkit.__file__).parents[1]), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("several", [False, True])
def test_one_of_several_ends_with_the_code_and_its_interpreter_whole(several: bool) -> None:
    end = ran("print('result', end=' '); return 3", several=several)
    assert end.returncode == 3
    assert end.stdout == ("result done at the end\n" if several else "result returned\ndone at the end\n")
    assert end.stderr == ("" if several else "taken apart")


@pytest.mark.parametrize(("code", "expected"), [("0", 0), ("None", 0), ("4", 4)])
def test_an_exit_in_the_middle_keeps_its_code(code: str, expected: int) -> None:
    end = ran(f"raise SystemExit({code})", several=True)
    assert (end.returncode, end.stdout, end.stderr) == (expected, "done at the end\n", "")


def test_a_message_that_ends_a_process_is_shown() -> None:
    end = ran("raise SystemExit('why')", several=True)
    assert end.returncode == 1
    assert end.stderr.startswith("why")


def test_a_process_by_itself_goes_on() -> None:
    assert leave(3) == 3
