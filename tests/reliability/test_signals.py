"""SIGTERM and SIGHUP at a file event: 75, and the same command, or the resumed run, does the rest."""

from __future__ import annotations

import re
import signal
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and /proc of Linux")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("train", signal.SIGHUP),
        ("predict", signal.SIGTERM),
        ("evaluate", signal.SIGTERM),
        ("evaluate", signal.SIGHUP),
        ("compare", signal.SIGTERM),
    ],
)
def test_what_is_done_stays_and_the_rest_is_done_next_time(commands, cases, folder, name, number):
    case = cases[name]
    place = folder("whole")
    events = commands.events(case.command, *case.arguments, folder=place)
    expected = case.results(place)
    place = folder("work")
    fault = {"kind": "signal", "number": int(number), "at": len(events) // 2}
    done = commands.run(case.command, *case.arguments, folder=place, fault=fault)
    assert done.code == 75 and "Traceback" not in done.text, done
    done = commands.run(case.command, *(case.resumed(place) or case.arguments), folder=place)
    assert done.code == 0, done.text
    assert case.results(place) == expected


def test_scans_that_were_predicted_are_not_predicted_again(commands, cases, folder):
    case = cases["predict"]
    events = commands.events(case.command, *case.arguments, folder=folder("whole"))
    place = folder("work")
    at = max(number for number, event in enumerate(events) if event.endswith("-b.nii.gz"))
    fault = {"kind": "signal", "number": int(signal.SIGTERM), "at": at}
    assert commands.run(case.command, *case.arguments, folder=place, fault=fault).code == 75
    text = commands.run(case.command, *case.arguments, folder=place).text
    assert re.search(r"[12] done before, 0 failed", text), (
        text
    )  # the scan that is being written is written whole
