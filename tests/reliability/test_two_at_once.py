"""Two processes that do the same at once: both end well, or one says why not; the results are whole."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from reliability_cases import leftovers, run_of

from lungkit.data import open_dataset, write_phantom_dataset

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and /proc of Linux")


@pytest.mark.parametrize("name", ["predict", "compare"])
def test_in_one_folder_both_end_well(commands, cases, folder, name):
    case = cases[name]
    place = folder("whole")
    assert commands.run(case.command, *case.arguments, folder=place).code == 0
    expected = case.results(place)
    place = folder("work")
    done = commands.together(2, case.command, *case.arguments, folder=place)
    assert [one.code for one in done] == [0, 0], done
    assert case.results(place) == expected and not leftovers(place)


def test_of_two_evaluations_in_one_folder_one_says_that_it_is_taken(commands, cases, folder):
    case, place = cases["evaluate"], folder("work")
    done = commands.together(2, case.command, *case.arguments, folder=place)
    assert sorted(one.code for one in done) == [0, 2], done
    assert "exists and is not an empty folder" in "".join(one.text for one in done)
    assert case.results(place) and not leftovers(place)


def test_two_trainings_of_one_name_have_a_folder_each(commands, cases, folder):
    case, place = cases["train"], folder("work")
    done = commands.together(2, case.command, *case.arguments, folder=place)
    assert [one.code for one in done] == [0, 0], done
    assert sorted(path.name for path in (place / "runs").iterdir()) == ["run", "run-2"]
    first, second = (run_of(place / "runs", name) for name in ("run", "run-2"))
    assert first == second


def test_two_phantom_datasets_in_one_folder_are_one(tmp_path):
    def write(_: int) -> None:
        write_phantom_dataset(tmp_path / "phantoms", cases=3, shape=(1, 32, 32), dims=2)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    assert len(open_dataset(tmp_path / "phantoms").cases) == 3 and not leftovers(tmp_path)
