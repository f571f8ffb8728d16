"""Turns the JSON of ``pytest benchmarks --benchmark-json FILE`` into a table, a plot and a record in ``results/``.

pytest benchmarks --benchmark-json run.json && python benchmarks/summary.py run.json
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import lungkit

RESULTS = Path(__file__).parent / "results"


def rows_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a case and mode, in the order of the run."""
    rows = []
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        if "milliseconds" not in info:
            continue
        ours = info["milliseconds"]["lungkit"]["median"]
        copy = info.get("copy_milliseconds")
        rows.append(
            {
                **{key: info.get(key) for key in ("case", "mode", "threads", "device", "milliseconds")},
                "ratio": {name: times["median"] / ours for name, times in info["milliseconds"].items()},
                "times_copy": ours / copy["median"] if copy else None,
                "peak_share": {
                    name: size / info["logits_bytes"] if "logits_bytes" in info else size / 2**20
                    for name, size in info.get("peak_bytes", {}).items()
                },
                "peak_unit": "of the input" if "logits_bytes" in info else "MiB",
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Median milliseconds of every provider, times lungkit's and times a copy of the fewest bytes, and peak memory.

    Peak memory is beyond the inputs and what is returned, as a share of the input (of the logits, of x).
    """
    lines = [
        "| case | mode | threads | lungkit ms (p20-p80) | times the copy | others ms (times lungkit) | peak memory beyond |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = row["milliseconds"]
        ours = times["lungkit"]
        others = ", ".join(
            f"{name} {times[name]['median']:.1f} ({row['ratio'][name]:.1f}x)"
            for name in times
            if name != "lungkit"
        )
        share = row["peak_share"]
        number = (
            (lambda value: f"{value:.1%}")
            if row["peak_unit"] != "MiB"
            else (lambda value: f"{value:.0f} MiB")
        )
        memory = ", ".join(f"{name} {number(value)}" for name, value in share.items())
        copy = f"{row['times_copy']:.1f}" if row["times_copy"] else "-"
        lines.append(
            f"| {row['case']} | {row['mode']} | {row['threads']} "
            f"| {ours['median']:.2f} ({ours['p20']:.2f}-{ours['p80']:.2f}) | {copy} | {others} | {memory} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars: time of each provider over lungkit's, a group a case."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.55 * len(rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = list(dict.fromkeys(name for row in rows for name in row["ratio"] if name != "lungkit"))
    height = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        at = [(i + index * height, row["ratio"][name]) for i, row in enumerate(rows) if name in row["ratio"]]
        axes.barh([y for y, _ in at], [ratio for _, ratio in at], height=height, label=name)
    axes.axvline(1, color="black", linewidth=1)
    labels = [f"{row['case']}, {row['mode']}, {row['threads']} threads" for row in rows]
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(rows))], labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time over lungkit's (medians of one interleaved run)")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="JSON of pytest-benchmark")
    parser.add_argument("--name", default="cpu", help="stem of the files in benchmarks/results")
    options = parser.parse_args()
    report = json.loads(options.report.read_text())
    rows = rows_of(report)
    if not rows:
        sys.stderr.write(f"{options.report}: no benchmark of the shared harness in it\n")
        return 2
    commit = report.get("commit_info", {})
    machine = report["machine_info"]
    record = {
        "commit": commit.get("id"),
        "dirty": commit.get("dirty"),
        "time": report.get("datetime"),
        "cpu": machine.get("cpu", {}).get("brand_raw"),
        "cores": machine.get("cpu", {}).get("count"),
        "python": machine.get("python_version"),
        "versions": {"lungkit": lungkit.__version__}
        | {name: metadata.version(name) for name in ("torch", "monai")},
        "rows": rows,
    }
    table = markdown(rows)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    heading = f"{record['cpu']}, {record['cores']} cores, {versions}, commit {record['commit']}"
    (RESULTS / f"{options.name}.md").write_text(f"{heading}\n\n{table}\n")
    plot(rows, RESULTS / f"{options.name}.png")
    sys.stdout.write(f"{heading}\n\n{table}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
