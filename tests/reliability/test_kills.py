"""Killed before any file event: the same command, or the resumed run, ends as if nothing had been."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and /proc of Linux")

_TIMES = ("seconds", "seconds_waiting_for_data", "seconds_computing", "seconds_validating")


@dataclass(frozen=True)
class Case:
    """A command, what it is called with, and what it is for: a digest of its results."""

    command: str
    arguments: Sequence[object]
    results: Callable[[Path], Any]
    resumed: Callable[[Path], Sequence[object] | None] = lambda place: None


def _digests(place: Path, *patterns: str) -> dict[str, str]:
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in patterns
        for path in place.glob(pattern)
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in _TIMES} for row in rows]


def _run_of(place: Path, name: str = "run") -> Any:
    (run,) = (path.parent for path in place.glob(f"**/{name}*/config.yaml"))
    assert json.loads((run / "status.json").read_bytes())["state"] == "finished"
    weights = _digests(run, "checkpoints/*/model.safetensors", "validation.csv")
    return {"weights": weights, "rows": _rows(run / "metrics.jsonl")}


def _resume(place: Path) -> Sequence[object] | None:
    return ["--resume", "runs/run"] if (place / "runs" / "run").is_dir() else None


def _predicted(place: Path) -> Any:
    rows = {row["scan"]: row for row in _rows(place / "out" / "results.jsonl")}
    for row in rows.values():
        row["files"] = {name: digest for name, digest in row["files"].items() if name.endswith(".nii.gz")}
    assert (place / "out" / "results.csv").is_file()
    return {"rows": rows, "masks": _digests(place, "out/*.nii.gz")}


@pytest.fixture(scope="session")
def two_scans(phantoms, tmp_path_factory) -> Path:
    scans = tmp_path_factory.mktemp("scans")
    for name, source in zip("ab", sorted((phantoms / "imagesTr").iterdir()), strict=False):
        shutil.copy(source, scans / f"{name}.nii.gz")
    return scans


@pytest.fixture(scope="session")
def cases(phantoms, training, finished, two_scans, tmp_path_factory) -> dict[str, Case]:
    other = shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "other")
    labels = phantoms / "labelsTr"
    bare = ["--no-report", "--no-preview"]
    return {
        "train": Case("train", training("--epochs=1"), _run_of, _resume),
        "predict": Case(
            "predict",
            ["-i", two_scans, "-o", "out", "--model", finished, "--device", "cpu", *bare],
            _predicted,
        ),
        "evaluate": Case(
            "evaluate",
            [labels, labels, "-o", "out", "--no-report", "--metrics", "overlap"],
            lambda place: _digests(place, "out/metrics*"),
        ),
        "compare": Case(
            "compare",
            ["--runs", finished, other, "-o", "out", "--no-report", "--device", "cpu"],
            lambda place: _digests(place, "out/table.*", "out/cases/*.csv"),
        ),
    }


def _leftovers(place: Path) -> list[str]:
    return [str(path) for path in place.rglob(".*") if ".tmp-" in path.name or ".new-" in path.name]


def survive(
    commands: Any, folder: Callable[[str], Path], case: Case, fault: dict[str, Any], expected: Any
) -> None:
    """Run ``case`` under ``fault`` and again without: the results are ``expected``, and nothing is left over."""
    place = folder("work")
    commands.run(case.command, *case.arguments, folder=place, fault=fault)
    done = commands.run(case.command, *(case.resumed(place) or case.arguments), folder=place)
    assert done.code == 0, (fault, done.text)
    assert case.results(place) == expected, fault
    assert not _leftovers(place), fault


def _spread(events: Sequence[str], count: int) -> range:
    """Numbers of ``count`` events at equal distances."""
    return range(len(events) // (2 * count), len(events), len(events) // count)


@pytest.mark.parametrize("name", ["train", "predict", "evaluate"])
def test_a_kill_at_some_file_events_loses_nothing(commands, cases, folder, name):
    case = cases[name]
    events = commands.events(case.command, *case.arguments, folder=(place := folder("whole")))
    expected = case.results(place)
    for at in _spread(events, 4):
        survive(commands, folder, case, {"kind": "kill", "at": at}, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "predict", "evaluate", "compare"])
def test_a_kill_at_every_file_event_loses_nothing(commands, cases, folder, name):
    case = cases[name]
    events = commands.events(case.command, *case.arguments, folder=(place := folder("whole")))
    expected = case.results(place)
    for at in range(len(events)):
        survive(commands, folder, case, {"kind": "kill", "at": at}, expected)
