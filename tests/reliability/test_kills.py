"""Killed before any file event: the same command, or the resumed run, ends as if nothing had been."""

from __future__ import annotations

import sys

import pytest
from reliability_cases import spread, survive

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and /proc of Linux")


@pytest.mark.parametrize("name", ["train", "predict", "evaluate", "export", "import", "report"])
def test_a_kill_at_some_file_events_loses_nothing(commands, cases, folder, name):
    case = cases[name]
    events = commands.events(case.command, *case.arguments, folder=(place := folder("whole")))
    expected = case.results(place)
    for at in spread(events, 4):
        survive(commands, folder, case, {"kind": "kill", "at": at}, expected)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["train", "predict", "evaluate", "compare", "export", "import", "report"])
def test_a_kill_at_every_file_event_loses_nothing(commands, cases, folder, name):
    case = cases[name]
    events = commands.events(case.command, *case.arguments, folder=(place := folder("whole")))
    expected = case.results(place)
    for at in range(len(events)):
        survive(commands, folder, case, {"kind": "kill", "at": at}, expected)
