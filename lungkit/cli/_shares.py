"""Which share of many scans a process predicts: only what ``--shard`` asks for, never what a leftover variable says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lungkit.errors import UsageError


class _Launcher(NamedTuple):
    """Variables by which a launcher tells a process its number, and how many there are."""

    name: str
    task: str
    tasks: str
    first: str = ""
    step: str = ""


_LAUNCHERS = (
    _Launcher("torchrun", "RANK", "WORLD_SIZE"),
    _Launcher(
        "a Slurm array",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_ARRAY_TASK_COUNT",
        first="SLURM_ARRAY_TASK_MIN",
        step="SLURM_ARRAY_TASK_STEP",
    ),
)


def parse_shard(text: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """(I, N) of ``--shard I/N``; of ``--shard auto`` what torchrun or a Slurm array say; (0, 1) where it is not given.

    Raises:
        UsageError: another form, or an environment that names no share, an impossible one, or two.

    Example:
        >>> parse_shard("3/8", {}), parse_shard(None, {"RANK": "1", "WORLD_SIZE": "4"})
        ((3, 8), (0, 1))
        >>> parse_shard("auto", {"RANK": "1", "WORLD_SIZE": "4"})
        (1, 4)
    """
    if text is None:
        return 0, 1
    if text != "auto":
        index, _, count = text.partition("/")
        if not _is_number(index) or not _is_number(count) or int(index) >= int(count):
            raise UsageError(f"--shard is {text!r}; give I/N with I from 0 to N - 1, e.g. 0/8, or auto")
        return int(index), int(count)
    found = [launcher for launcher in _LAUNCHERS if environment.get(launcher.tasks, "1") != "1"]
    # A launcher of one process shares nothing out, unless it is the only one.
    found = found or [launcher for launcher in _LAUNCHERS if launcher.tasks in environment]
    if len(found) != 1:
        names = " and ".join(launcher.name for launcher in found) or "neither torchrun nor a Slurm array"
        raise UsageError(f"--shard auto: the environment speaks of {names}; give --shard I/N")
    return _share_of(found[0], environment)


def launcher_around(environment: Mapping[str, str]) -> str | None:
    """Who has started this process as one of several, for a hint.

    Example:
        >>> launcher_around({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "10"})
        'a Slurm array'
    """
    names = [launcher.name for launcher in _LAUNCHERS if environment.get(launcher.tasks, "1") != "1"]
    return " and ".join(names) or None


def _share_of(launcher: _Launcher, environment: Mapping[str, str]) -> tuple[int, int]:
    variables = {name: environment.get(name, "") for name in launcher[1:] if name}
    index, count = environment.get(launcher.task, ""), environment.get(launcher.tasks, "")
    first, step = environment.get(launcher.first) or "0", environment.get(launcher.step) or "1"
    if all(map(_is_number, (index, count, first, step))) and int(step) > 0:
        share, rest = divmod(int(index) - int(first), int(step))
        if rest == 0 and 0 <= share < int(count):
            return share, int(count)
    said = ", ".join(f"{name}={value}" for name, value in variables.items())
    raise UsageError(f"--shard auto: {said} is no share of {launcher.name}; give --shard I/N")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
