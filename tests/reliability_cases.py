"""Commands that the reliability tests run, what their results are, and running them under a fault and again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TIMES = ("seconds", "seconds_waiting_for_data", "seconds_computing", "seconds_validating")


@dataclass(frozen=True)
class Case:
    """A command, what it is called with, and what it is for: a digest of its results."""

    command: str
    arguments: Sequence[object]
    results: Callable[[Path], Any]
    resumed: Callable[[Path], Sequence[object] | None] = lambda place: None


def digests(place: Path, *patterns: str) -> dict[str, str]:
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in patterns
        for path in place.glob(pattern)
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in _TIMES} for row in rows]


def run_of(place: Path, name: str = "run") -> Any:
    (run,) = (path.parent for path in place.glob(f"**/{name}/config.yaml"))
    assert json.loads((run / "status.json").read_bytes())["state"] == "finished"
    weights = digests(run, "checkpoints/*/model.safetensors", "validation.csv")
    return {"weights": weights, "rows": _rows(run / "metrics.jsonl")}


def resume(place: Path) -> Sequence[object] | None:
    return ["--resume", "runs/run"] if (place / "runs" / "run").is_dir() else None


def predicted(place: Path) -> Any:
    rows = {row["scan"]: row for row in _rows(place / "out" / "results.jsonl")}
    for row in rows.values():
        row["files"] = {name: digest for name, digest in row["files"].items() if name.endswith(".nii.gz")}
    assert (place / "out" / "results.csv").is_file()
    return {"rows": rows, "masks": digests(place, "out/*.nii.gz")}


def leftovers(place: Path) -> list[str]:
    return [str(path) for path in place.rglob(".*") if ".tmp-" in path.name or ".new-" in path.name]


def survive(
    commands: Any,
    folder: Callable[[str], Path],
    case: Case,
    fault: dict[str, Any],
    expected: Any,
    *,
    one_sentence: bool = False,
) -> None:
    """Run ``case`` under ``fault``, and again without where that ended it: the results are ``expected``.

    Nothing is left over. With ``one_sentence`` the first time must end by itself, without a traceback.
    """
    place = folder("work")
    done = commands.run(case.command, *case.arguments, folder=place, fault=fault)
    if one_sentence:
        assert done.code in (0, 2, 3, 4, 5) and "Traceback" not in done.text, (fault, done)
        assert (done.code == 0) or "error: " in done.text or "failed: " in done.text, (fault, done)
    if done.code != 0:
        done = commands.run(case.command, *(case.resumed(place) or case.arguments), folder=place)
        assert done.code == 0, (fault, done.text)
    assert case.results(place) == expected, fault
    assert not leftovers(place), fault


def spread(events: Sequence[str], count: int) -> range:
    """Numbers of ``count`` events at equal distances."""
    return range(len(events) // (2 * count), len(events), max(1, len(events) // count))
