"""Turns a run of ``pytest benchmarks`` into a table, a plot and a JSON file.

``python benchmarks/summary.py [RUN.json] [--name NAME]`` from the checkout; without a path it takes the newest run that
pytest-benchmark saved. Prints the table and writes ``NAME.md``, ``NAME.json`` and ``NAME.png`` into
``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

_ROOT = Path(__file__).resolve().parents[1]
_RESULTS = _ROOT / "benchmarks" / "results"
_HEADER = (
    "mode", "provider", "median ms", "p20-p80", "x lungkit", "p20-p80", "peak memory", "share of bound", "launches"
)  # fmt: skip
_LEGEND = (
    "`x lungkit`: time over lungkit's, median of the ratios within each round. `peak memory`: beyond inputs, outputs"
    " and returned gradients, in brackets as a share of the logits (dice_ce), of x (attention_gate) or of the stored"
    " scan (inference). `share of bound`: time of copying the fewest bytes that must be read and written (or, marked a,"
    " of a library product with the same number of operations, where that takes longer) over the time taken."
)


def table(rows: Sequence[Row]) -> str:
    """Markdown with one aligned table for each case."""
    parts = []
    for (op, device, threads, case), group in _by_case(rows):
        where = _where(device, threads)
        cells = [_HEADER, *(_cells(row) for row in group)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADER))]
        lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        parts.append("\n".join([f"{op}: {case} ({where})", "", *lines]))
    return "\n\n".join([*parts, _LEGEND])


def _by_case(rows: Sequence[Row]) -> Iterable[tuple[tuple[Any, ...], list[Row]]]:
    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("op", "device", "threads", "case"))

    return ((name, list(group)) for name, group in groupby(rows, key))


def _where(device: str, threads: int) -> str:
    return f"{device}, {threads} thread{'s' if threads > 1 else ''}" if device == "cpu" else device


def _cells(row: Row) -> tuple[str, ...]:
    low, median, high = (1e3 * value for value in row["seconds"])
    ratio = row.get("times_ours")
    share = row.get("share_of_bound")
    return (
        row["mode"],
        row["provider"],
        f"{median:.3g}" if median < 1000 else f"{median:.0f}",
        f"{low:.3g}-{high:.3g}" if high < 1000 else f"{low:.0f}-{high:.0f}",
        "" if ratio is None else f"{ratio[1]:.2f}",
        "" if ratio is None else f"{ratio[0]:.2f}-{ratio[2]:.2f}",
        _memory(row),
        "" if share is None else f"{100 * share:.0f} %{' a' if row['bound'] == 'arithmetic' else ''}",
        "" if row.get("launches") is None else str(row["launches"]),
    )


def _memory(row: Row) -> str:
    peak, main = row.get("peak_memory"), row.get("main_bytes")
    if peak is None:
        return ""
    text = f"{peak / 2**20:.1f} MiB"
    return text if main is None else f"{text} ({100 * peak / main:.0f} %)"


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Bars of the time of each provider beside lungkit's, forward and backward together (or the one mode there is)."""
    from matplotlib.figure import Figure

    groups = [(name, _whole(group)) for name, group in _by_case(rows)]
    height = sum(0.28 * len(group) + 0.6 for _, group in groups)
    figure = Figure(figsize=(9, height + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(
        len(groups), 1, squeeze=False, height_ratios=[len(group) + 2 for _, group in groups]
    )[:, 0]
    for axis, ((op, device, threads, case), group) in zip(axes, groups, strict=True):
        where = _where(device, threads)
        names = [row["provider"] for row in group]
        values = [1e3 * row["seconds"][1] for row in group]
        spread = [[1e3 * abs(row["seconds"][end] - row["seconds"][1]) for row in group] for end in (0, 2)]
        colours = ["tab:blue" if name == "lungkit" else "0.7" for name in names]
        bars = axis.barh(names, values, xerr=spread, color=colours, error_kw={"elinewidth": 0.8})
        ratios = [row.get("times_ours") for row in group]
        axis.bar_label(
            bars, [f" {v:.3g} ms" + (f", x{r[1]:.2f}" if r else "") for v, r in zip(values, ratios, strict=True)],
            fontsize=7,
        )  # fmt: skip
        axis.set_title(f"{op}: {case} ({where}), {group[0]['mode']}", fontsize=8, loc="left")
        axis.margins(x=0.25)
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
    axes[-1].set_xlabel("milliseconds: median, p20 to p80", fontsize=8)
    figure.savefig(path, dpi=110)


def _whole(group: Sequence[Row]) -> list[Row]:
    modes = [row["mode"] for row in group]
    mode = "both" if "both" in modes else modes[0]
    return [row for row in group if row["mode"] == mode]


def machine(run: Mapping[str, Any]) -> dict[str, Any]:
    """Where and from what the figures come."""
    info, commit = run["machine_info"], run["commit_info"]
    cpu = info.get("cpu") or {}
    return {
        "date": run["datetime"],
        "commit": commit.get("id"),
        "uncommitted_changes": commit.get("dirty"),
        "cpu": cpu.get("brand_raw") or info.get("processor"),
        "cores": cpu.get("count"),
        "system": f"{info.get('system')} {info.get('release')}",
        "python": info.get("python_version"),
        **{
            key: info.get(key)
            for key in (
                "gpu",
                "torch",
                "lungkit",
                "lungkit_from",
                "kernels",
                "selection",
                "compared_with",
                "threads",
                "freed_memory_kept",
                "instruction_set",
                "native_ops",
            )
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "run", nargs="?", type=Path, help="JSON of pytest-benchmark; default: the newest saved run"
    )
    parser.add_argument("--name", help="of the files written; default: cuda or cpu, what was measured")
    parser.add_argument(
        "--results",
        type=Path,
        help="folder of the files written; default: benchmarks/results, of smoke runs .benchmarks",
    )
    options = parser.parse_args(arguments)
    path = options.run or max(
        (_ROOT / ".benchmarks").glob("*/*.json"), key=lambda file: file.stat().st_mtime, default=None
    )
    if path is None or not path.is_file():
        parser.error(
            f"no run at {path or _ROOT / '.benchmarks'}: run `pytest benchmarks` first, or name its JSON"
        )
    run = json.loads(path.read_text(encoding="utf-8"))
    rows = [bench["extra_info"] for bench in run["benchmarks"] if "op" in bench["extra_info"]]
    if not rows:
        parser.error(f"{path} holds no row of lungkit's benchmarks; was it written by `pytest benchmarks`?")
    where = machine(run)
    smoke = where["selection"] == "smoke"
    results = options.results or (_ROOT / ".benchmarks" if smoke else _RESULTS)
    name = options.name or (
        "smoke" if smoke else "cuda" if any(row["device"] == "cuda" for row in rows) else "cpu"
    )
    title = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in where.items() if value is not None)
    text = f"{table(rows)}\n\n{title}\n"
    for backend, state in (where["kernels"] or {}).items():
        if state != "loaded" and any(row["device"] == backend for row in rows):
            text = f"lungkit's {backend} kernels: {state}\n\n{text}"
    if smoke:
        text = f"A smoke run: it shows that everything runs, its times mean nothing.\n\n{text}"
    sys.stdout.write(text)
    results.mkdir(parents=True, exist_ok=True)
    target = results / name
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    target.with_suffix(".json").write_text(
        json.dumps({"machine": where, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    plot(
        rows,
        target.with_suffix(".png"),
        f"{where['gpu'] or where['cpu']}, torch {where['torch']}, {where['commit']}",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
