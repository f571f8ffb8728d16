"""Everything that is to be known of lungkit on a GPU, in one command and in order of use.

``python benchmarks/gpu_hour.py`` from the checkout, on a machine with a GPU, nvcc and lungkit's extras ``test`` and
``bench``. Each step has a time limit and a log; what is done is written down, and the same command goes on from there.
All of it lands in ``benchmarks/results/DEVICE/``: ``steps.json``, the logs, ``kernel-times.json``, the tables of
``pytest benchmarks``, and ``measured-against-predicted.md``. A step that fails costs none of the others.

``--rehearse`` runs the same steps where there is no GPU: the emulator and the CPU stand in, with tiny sizes. It shows
that nothing fails for a silly reason on the day; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PREDICTED = RESULTS / "h100-predicted.json"
REHEARSAL = "rehearsal"


@dataclass(frozen=True)
class Step:
    """A command with a limit in seconds; ``needs`` are programs without which it is passed over."""

    name: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def steps(folder: Path, *, rehearse: bool) -> list[Step]:
    """The list, in order; a rehearsal runs the same programs on stand-ins."""
    python = sys.executable
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    times = (python, "benchmarks/kernel_times.py", "--output", str(folder / "kernel-times.json"))
    run = str(folder / "benchmarks.json")
    bench = (*pytest, "benchmarks", f"--benchmark-json={run}")
    summary = (python, "benchmarks/summary.py", run, "--results", str(folder), "--name", "benchmarks")
    ops = (
        "tests/ops/test_attention_gate.py",
        "tests/ops/test_dice_ce.py",
        "tests/ops/test_norm_act.py",
        "tests/ops/test_on_device.py",
    )
    races = (python, "benchmarks/race_check.py")
    if rehearse:
        return [
            Step(
                "environment",
                (python, "-c", "import sys; from lungkit.cli.info import main; sys.exit(main())"),
                60,
            ),
            Step(
                "tests", (*pytest, "-x", "-m", "cuda", "tests/ops", "tests/metrics/test_surface_cuda.py"), 300
            ),
            Step("sanitizers", (*pytest, "tests/ops/test_sanitized.py"), 600),
            Step("calls of the race check", (*races, "--device", "cpu", "--smoke"), 300),
            Step("kernel times", (*times, "--device", "cpu", "--smoke"), 300),
            Step("benchmarks", (*bench, "--smoke", "-k", "norm_act or gate_tail or confusion_counts"), 600),
            Step("table of benchmarks", summary, 60),
        ]

    def sanitizer(tool: str, command: tuple[str, ...]) -> Step:
        return Step(
            f"compute-sanitizer {tool}",
            ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command),
            480,
            ("compute-sanitizer",),
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )

    # Inside cuBLAS, which the tests call too, racecheck ends with an error of its own.
    sanitizers = [
        sanitizer("memcheck", (*pytest, "-m", "cuda", "-x", *ops)),
        sanitizer("racecheck", races),
        sanitizer("synccheck", (*pytest, "-m", "cuda", "-x", *ops)),
    ]
    profile = Step(
        "ncu",
        (
            "ncu", "--set", "basic", "--csv", "--kernel-name", "regex:lungkit|gate_|dice_ce|norm_|counts",
            "--launch-count", "60", *times[:3], str(folder / "profiled.json"), "--smoke",
        ),
        480,
        ("ncu",),
    )  # fmt: skip
    return [
        Step(
            "environment",
            (python, "-c", "import sys; from lungkit.cli.info import main; sys.exit(main())"),
            60,
        ),
        Step("tests", (*pytest, "-m", "cuda"), 600),
        *sanitizers,
        Step("kernel times", times, 600),
        Step("benchmarks", (*bench, "-k", "cuda and not inference and not metrics"), 600),
        Step("table of benchmarks", summary, 60),
        Step("training step", (*pytest, "benchmarks/test_training_step.py", "-k", "cuda"), 600),
        profile,
    ]


def run_step(step: Step, folder: Path) -> dict[str, Any]:
    """What became of a step: "ok", "failed", "out of time" or "no PROGRAM"; its output goes to a log."""
    missing = [name for name in step.needs if shutil.which(name) is None]
    if missing:
        return {"state": f"no {missing[0]}", "seconds": 0.0}
    log = folder / f"{re.sub(r'[^a-z0-9]+', '-', step.name)}.log"
    started = time.monotonic()
    environment = {**os.environ, **step.environment}
    with log.open("wb") as output:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(step.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # what the command has started as well
            process.wait()
            code = None
    # No test is selected where a rehearsal has no device for those marked cuda: pytest's 5.
    state = "out of time" if code is None else "ok" if code in (0, 5) else "failed"
    return {"state": state, "code": code, "seconds": round(time.monotonic() - started, 1), "log": log.name}


def run_all(todo: Sequence[Step], folder: Path, *, again: bool = False) -> dict[str, Any]:
    """Run what is not done yet, writing down after each step what became of it."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "steps.json"
    done: dict[str, Any] = {}
    if record.is_file() and not again:
        done = json.loads(record.read_text())["steps"]
    for step in todo:
        if done.get(step.name, {}).get("state") == "ok":
            sys.stdout.write(f"{step.name}: done before\n")
            continue
        sys.stdout.write(f"{step.name}: up to {step.limit:.0f} s ... ")
        sys.stdout.flush()
        done[step.name] = run_step(step, folder)
        sys.stdout.write(f"{done[step.name]['state']} in {done[step.name]['seconds']} s\n")
        record.write_text(json.dumps({"machine": machine(), "steps": done}, indent=1) + "\n")
    return done


def machine() -> dict[str, Any]:
    """Device, versions and commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if found else "CPU and emulator",
        "capability": list(torch.cuda.get_device_capability()) if found else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
    }


def comparison(times: Mapping[str, Any], predicted: Mapping[str, float] | None) -> str:
    """Markdown: every kernel's time beside eager PyTorch, torch.compile, the bound by bytes and the prediction.

    The bound is the fewest bytes over the bandwidth that a copy reached on the same device.
    """
    rows = [row for row in times["rows"] if "error" not in row]
    bandwidth = next((row["bytes_per_second"] for row in rows if row["name"] == "copy"), None)
    names = list(dict.fromkeys(row["name"] for row in rows if row["name"] != "copy"))
    header = [
        "kernel",
        "lungkit us",
        "eager",
        "compiled",
        "share of copy bandwidth",
        "predicted us",
        "wall us",
    ]
    lines = [header, ["---"] * len(header)]
    for name in names:
        group = {row["provider"]: row for row in rows if row["name"] == name}
        ours = group.get("lungkit")
        if ours is None:
            continue
        seconds = ours["graph_seconds"]
        others = [
            next((row["graph_seconds"] / seconds for key, row in group.items() if kind in key), None)
            for kind in ("eager", "compiled")
        ]
        share = ours["bytes"] / bandwidth / seconds if bandwidth and ours["bytes"] else None
        expected = None if predicted is None else predicted.get(name)
        lines.append(
            [
                name,
                f"{1e6 * seconds:.1f}",
                *("-" if value is None else f"x {value:.2f}" for value in others),
                "-" if share is None else f"{100 * share:.0f} %",
                "-" if expected is None else f"{1e6 * expected:.1f}",
                f"{1e6 * ours['wall_seconds']:.1f}",
            ]
        )
    failed = [
        f"- {row['name']}, {row['provider']}: {row['error']}" for row in times["rows"] if "error" in row
    ]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([table, *(["", "Not measured:", *failed] if failed else [])])


def write_comparison(folder: Path) -> Path | None:
    """``measured-against-predicted.md``, where kernels were timed."""
    times = folder / "kernel-times.json"
    if not times.is_file():
        return None
    predicted = json.loads(PREDICTED.read_text())["seconds"] if PREDICTED.is_file() else None
    where = machine()
    title = "Measured, beside what was predicted from the compiled code"
    note = (
        f"Measured on {where['device']}, torch {where['torch']}, commit {where['commit']}, {where['date']}."
    )
    if folder.name == REHEARSAL:
        title, note = "Rehearsal", "Tiny sizes on the CPU: the times mean nothing."
    path = folder / "measured-against-predicted.md"
    path.write_text(f"# {title}\n\n{note}\n\n{comparison(json.loads(times.read_text()), predicted)}\n")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU and the emulator, with tiny sizes"
    )
    parser.add_argument("--again", action="store_true", help="do again what was done before")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder above that of the device")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --rehearse runs the same steps on the CPU and the emulator")
    device = (
        REHEARSAL if options.rehearse else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    )
    folder = options.results / device
    done = run_all(steps(folder, rehearse=options.rehearse), folder, again=options.again)
    path = write_comparison(folder)
    if path is not None:
        sys.stdout.write(f"\n{path.read_text()}\nwritten to {path}\n")
    return 1 if any(result["state"] in ("failed", "out of time") for result in done.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
