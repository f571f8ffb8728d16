"""Errors of the system at any file event: one sentence and a code, and afterwards the command does what it should."""

from __future__ import annotations

import sys

import pytest
from reliability_cases import spread, survive

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and /proc of Linux")

CODES = ("EIO", "EACCES", "ENOSPC", "EMFILE", "ESTALE", "EROFS", "ENAMETOOLONG", "EDQUOT")


@pytest.mark.parametrize(
    ("name", "count"),
    [("train", 3), ("predict", 6), ("evaluate", 6), ("export", 4), ("import", 4), ("report", 2)],
)
def test_errors_at_some_file_events(commands, cases, folder, name, count):
    case = cases[name]
    events = commands.events(case.command, *case.arguments, folder=(place := folder("whole")))
    expected = case.results(place)
    for at, code in zip(spread(events, count), CODES, strict=False):
        fault = {"kind": "errno", "code": code, "at": at}
        survive(commands, folder, case, fault, expected, one_sentence=True)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("train", "predict", "evaluate") for kind in ("memory", "thread")),
        *((name, "memory") for name in ("export", "import", "report")),  # they start no threads
    ],
)
def test_no_memory_or_no_thread_is_one_sentence(commands, cases, folder, name, kind):
    case = cases[name]
    done = commands.run(case.command, *case.arguments, folder=folder("work"), fault={"kind": kind, "at": 0})
    assert done.code == 5 and "Traceback" not in done.text
    assert ("out of memory" if kind == "memory" else "no more threads can be started") in done.text


@pytest.mark.parametrize(
    ("name", "file", "size"),
    [
        ("train", "runs/run/checkpoints/", 20_000),
        ("predict", "out/reports/", 3_000),
        ("evaluate", "out/metrics", 1_000),
    ],
)
def test_a_limit_on_the_size_of_files_is_told_with_the_file(commands, cases, folder, name, file, size):
    case = cases[name]
    limits = {"RLIMIT_FSIZE": size}
    done = commands.run(case.command, *case.arguments, folder=folder("work"), limits=limits)
    assert done.code == 5 and "Traceback" not in done.text
    last = done.text.splitlines()[-1]
    assert last.startswith(f"error: {file}") and "larger than a limit allows (ulimit -f)" in last


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["train", "predict", "evaluate", "compare", "export", "import", "report"])
def test_errors_at_every_file_event(commands, cases, folder, name):
    case = cases[name]
    events = commands.events(case.command, *case.arguments, folder=(place := folder("whole")), reads=True)
    expected = case.results(place)
    for at in range(len(events)):
        fault = {"kind": "errno", "code": CODES[at % len(CODES)], "at": at, "reads": True}
        survive(commands, folder, case, fault, expected, one_sentence=True)
