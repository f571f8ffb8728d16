"""The command for a GPU: what it writes down, that it goes on, that one failure costs nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gpu_hour
from gpu_hour import Step


def _python(name: str, code: str, limit: float = 60, **options: object) -> Step:
    return Step(name, (sys.executable, "-c", code), limit, **options)


def test_a_step_that_fails_or_takes_too_long_costs_none_of_the_others(tmp_path: Path) -> None:
    steps = [
        _python("bad", "print('seen'); raise SystemExit(3)"),
        _python("slow", "import time; time.sleep(60)", limit=0.5),
        _python("missing tool", "", needs=("no-such-program",)),
        _python("good", ""),
    ]
    done = gpu_hour.run_all(steps, tmp_path)
    states = {name: result["state"] for name, result in done.items()}
    assert states == {
        "bad": "failed", "slow": "out of time", "missing tool": "no no-such-program", "good": "ok"
    }  # fmt: skip
    assert (tmp_path / "bad.log").read_text() == "seen\n"
    assert json.loads((tmp_path / "steps.json").read_text())["steps"] == done


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    step = _python("mark", f"open({str(marks)!r}, 'a').write('x')")
    gpu_hour.run_all([step], tmp_path)
    gpu_hour.run_all([step], tmp_path)
    assert marks.read_text() == "x"
    gpu_hour.run_all([step], tmp_path, again=True)
    assert marks.read_text() == "xx"


def test_the_comparison_shows_ratios_bandwidth_and_prediction() -> None:
    def row(name: str, provider: str, seconds: float, moved: int) -> dict[str, object]:
        return {"name": name, "provider": provider, "bytes": moved, "wall_seconds": 2 * seconds,
                "graph_seconds": seconds, "bytes_per_second": moved / seconds}  # fmt: skip

    rows = [
        row("copy", "lungkit", 1e-6, 3_000_000),
        row("gate", "lungkit", 1e-5, 15_000_000),
        row("gate", "eager", 4e-5, 15_000_000),
        {"name": "gate", "provider": "compiled", "error": "it does not compile"},
    ]
    text = gpu_hour.comparison({"rows": rows}, {"gate": 8e-6})
    assert "| gate | 10.0 | x 4.00 | - | 50 % | 8.0 | 20.0 |" in text
    assert "- gate, compiled: it does not compile" in text


def test_every_step_of_the_day_has_a_stand_in_or_a_tool_that_only_a_gpu_has(tmp_path: Path) -> None:
    real = {step.name for step in gpu_hour.steps(tmp_path, rehearse=False)}
    rehearsed = {step.name for step in gpu_hour.steps(tmp_path, rehearse=True)}
    only_there = {name for name in real if name.startswith("compute-sanitizer")} | {"ncu", "training step"}
    assert real - rehearsed == only_there
    assert sum(step.limit for step in gpu_hour.steps(tmp_path, rehearse=False)) < 2 * 3600
