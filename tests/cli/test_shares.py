from __future__ import annotations

import pytest

from lungkit.cli._shares import parse_shard
from lungkit.errors import UsageError

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4"}


def array(task: int, count: int, first: int = 0, step: int = 1) -> dict[str, str]:
    names = ("ID", "COUNT", "MIN", "STEP")
    return {
        f"SLURM_ARRAY_TASK_{name}": str(value)
        for name, value in zip(names, (task, count, first, step), strict=True)
    }


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("2/5", {}, (2, 5)),
        ("0/1", TORCHRUN, (0, 1)),
        (None, {}, (0, 1)),
        (None, TORCHRUN, (0, 1)),
        (None, array(3, 10), (0, 1)),
        ("auto", TORCHRUN, (1, 4)),
        ("auto", array(3, 4, first=1), (2, 4)),
        ("auto", array(20, 4, step=10), (2, 4)),
        ("auto", {"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ("auto", {"RANK": "0", "WORLD_SIZE": "1"} | array(3, 10), (3, 10)),
    ],
)
def test_a_share_is_what_was_asked_for(text, environment, expected):
    assert parse_shard(text, environment) == expected


@pytest.mark.parametrize("text", ["2/2", "x/3", "3", "-1/2", "1/0", "\u0662/3", ""])
def test_a_share_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="--shard is"):
        parse_shard(text, {})


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, "neither torchrun nor a Slurm array"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4, WORLD_SIZE=4"),
        ({"WORLD_SIZE": "4"}, "RANK=, WORLD_SIZE=4"),
        ({"RANK": "0", "WORLD_SIZE": "many"}, "WORLD_SIZE=many"),
        (array(7, 3, first=1), "SLURM_ARRAY_TASK_ID=7"),
        (array(5, 3, step=2), "SLURM_ARRAY_TASK_ID=5"),
        (array(5, 3, step=0), "SLURM_ARRAY_TASK_STEP=0"),
        (TORCHRUN | array(3, 10), "torchrun and a Slurm array"),
    ],
)
def test_an_environment_that_names_no_share_is_refused(environment, found):
    with pytest.raises(UsageError, match=found):
        parse_shard("auto", environment)
