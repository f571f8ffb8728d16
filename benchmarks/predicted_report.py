"""results/h100-predicted.md: the predictions as tables, beside the budgets and beside what an H200 measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kernel_prices import (
    BYTES_PER_SECOND,
    REACHED_OF_BANDWIDTH,
    REACHED_OF_ISSUES,
    SECONDS_ON_THE_WAY,
    Prediction,
)


def short_name(kernel: str) -> str:
    """Without the arguments of its template, which the mangled name has after an I."""
    return re.split(r"I(?=[A-Z]|[fdvhl])", kernel)[0]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + " --- |" * len(header))
    return "\n".join(lines)


def kernel_table(found: Sequence[Prediction]) -> str:
    """One row a kernel, below one of its configuration."""
    header = (
        "configuration, kernel", "instructions for 32", "memory", "tensor", "multiply", "alu", "special", "double",
        "registers", "warps", "KB in flight", "bytes an access", "issue us", "tensor us", "memory pipe us", "bytes us",
        "predicted us", "limit",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for prediction in found:
        rows.append((f"**{prediction.configuration.name}**", *[""] * (len(header) - 1)))
        for p in prediction.prices:
            of_pipes = [p.per_unit.get(pipe, 0) for pipe in header[2:8]]
            floors = (p.issue, p.tensor, p.memory_pipe, p.memory, p.seconds)
            rows.append((
                short_name(p.launch.kernel), f"{p.instructions:.0f}", *(f"{count:.0f}" for count in of_pipes),
                str(p.resources.registers), str(p.warps), f"{p.in_flight / 1024:.0f}", f"{p.access_bytes:.1f}",
                *(f"{1e6 * t:.1f}" for t in floors), p.limit,
            ))  # fmt: skip
    return _table(header, rows)


def measured_rows(measured: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Seconds and share of the copy's bandwidth that kernel_times.py wrote of lungkit's ops, by its names; of backward
    passes too, which it times together with their forward passes."""
    ours = {
        row["name"]: row for row in measured["rows"] if row["provider"] == "lungkit" and "error" not in row
    }
    found: dict[str, tuple[float, float]] = {}
    for name, row in ours.items():
        if name != "copy" and row["bytes"]:
            found[name] = (row["graph_seconds"], row["bytes_per_second"] / ours["copy"]["bytes_per_second"])
    for name in [name for name in found if " both " in name]:
        both, forward = ours[name], ours[name.replace(" both ", " forward ")]
        seconds = both["graph_seconds"] - forward["graph_seconds"]
        share = (both["bytes"] - forward["bytes"]) / seconds / ours["copy"]["bytes_per_second"]
        found[name.replace(" both ", " backward ")] = (seconds, share)
    return found


def configuration_table(found: Sequence[Prediction], measured: Mapping[str, tuple[float, float]]) -> str:
    """One row for what a call of an op takes."""
    header = (
        "call", "launches", "allocations, fills, copies, checks", "issue us", "bytes us", "issue / bytes",
        "moved / fewest", "predicted us", "predicted share", "measured us", "measured share of a copy",
    )  # fmt: skip
    rows = []
    for prediction in found:
        configuration, host = prediction.configuration, prediction.configuration.host
        fewest = configuration.fewest_bytes / BYTES_PER_SECOND
        times = measured.get(configuration.timed_as or "")
        rows.append((
            configuration.name, str(len(prediction.prices)),
            "-" if host is None else f"{host.allocations}, {host.fills}, {host.copies}, {host.checks}",
            f"{1e6 * prediction.issue:.1f}", f"{1e6 * fewest:.1f}", f"{prediction.issue / fewest:.2f}",
            f"{prediction.moved / fewest:.2f}", f"{1e6 * prediction.seconds:.1f}", f"{100 * prediction.share:.0f} %",
            *(("", "") if times is None else (f"{1e6 * times[0]:.1f}", f"{100 * times[1]:.0f} %")),
        ))  # fmt: skip
    return _table(header, rows)


@dataclass(frozen=True)
class Budget:
    """What every configuration whose name begins with ``calls`` must not exceed."""

    text: str
    calls: str
    value: Callable[[Prediction], float]
    most: float

    def rows(self, found: Sequence[Prediction]) -> Iterator[tuple[str, ...]]:
        values = {
            p.configuration.name: self.value(p) for p in found if re.match(self.calls, p.configuration.name)
        }
        worst = max(values, key=lambda name: values[name])
        missed = [name for name, value in values.items() if value > self.most]
        verdict = "met" if not missed else f"missed by {len(missed)} of {len(values)}"
        yield (self.text, f"{self.most:g}", f"{values[worst]:.2f} ({worst})", verdict)


def _issue(prediction: Prediction) -> float:
    return prediction.issue / (prediction.configuration.fewest_bytes / BYTES_PER_SECOND)


def _moved(prediction: Prediction) -> float:
    return prediction.moved * BYTES_PER_SECOND / prediction.configuration.fewest_bytes


def _few_in_flight(prediction: Prediction) -> float:
    return 32 * 1024 / prediction.prices[0].in_flight


def _finish(prediction: Prediction) -> float:
    return 1e6 * max(p.seconds for p in prediction.prices if "finish" in p.launch.kernel)


def _passes(prediction: Prediction) -> float:
    """Of the features, reads and writes of each tensor counted; partial sums are in it."""
    tensors = 2 if " forward " in prediction.configuration.name else 3
    return tensors * _moved(prediction)


def _issue_of_moved(prediction: Prediction) -> float:
    return prediction.issue / prediction.moved


_FLOORS = "issue floor over byte floor"
_BUDGETS = (
    Budget(f"gate forward, bfloat16: {_FLOORS}", "gate forward .*bfloat16", _issue, 1.2),
    Budget(
        "gate forward, bfloat16: 32 KB over bytes in flight", "gate forward .*bfloat16", _few_in_flight, 1.0
    ),
    Budget(f"gate backward, bfloat16: {_FLOORS}", "gate backward", _issue, 1.2),
    Budget("gate backward: bytes moved over fewest bytes", "gate backward", _moved, 1.6),
    Budget(f"dice_ce of 2 classes, forward: {_FLOORS}", r"dice_ce forward \d+x2x", _issue, 1.0),
    Budget(f"dice_ce of 2 classes, backward: {_FLOORS}", r"dice_ce backward \d+x2x", _issue, 1.0),
    Budget(f"dice_ce of 3 and 4 classes: {_FLOORS}", r"dice_ce \w+ \d+x[34]x", _issue, 1.3),
    Budget("dice_ce: us of the block that finishes", "dice_ce forward", _finish, 3.0),
    Budget(f"gate_tail: {_FLOORS}", r"gate_(psi|scale) ", _issue, 1.0),
    Budget(f"confusion_counts: {_FLOORS}", "confusion_counts ", _issue, 1.0),
    Budget("norm_act forward: features read or written so often", "norm_act forward", _passes, 3.02),
    Budget("norm_act backward: features read or written so often", "norm_act backward", _passes, 5.02),
    Budget(
        "norm_act of 128^3: issue floor over time of the bytes moved",
        r"norm_act .*x128 ",
        _issue_of_moved,
        1.0,
    ),
)


_BEFORE = {
    "gate forward (1, 32, 96x96x96) Ci 16 bfloat16": "87 / 36",
    "gate forward (8, 64, 512x512) Ci 32 bfloat16": "375 / 172",
    "gate backward (1, 32, 96x96x96) Ci 16 bfloat16": "342 / 54",
    "gate backward (8, 64, 512x512) Ci 32 bfloat16": "1430 / 260",
    "dice_ce forward 2x2x192x192x192 bfloat16 uint8": "26 / 21",
    "dice_ce backward 2x2x192x192x192 bfloat16 uint8": "23 / 38",
}
"""Issue floor and byte floor of the first kernels, in us."""


def _before_and_now(found: Sequence[Prediction]) -> list[tuple[str, str, str]]:
    floors = {
        p.configuration.name: (1e6 * p.issue, 1e6 * p.configuration.fewest_bytes / BYTES_PER_SECOND)
        for p in found
    }
    return [
        (name, before, f"{floors[name][0]:.1f} / {floors[name][1]:.1f}") for name, before in _BEFORE.items()
    ]


def report(found: Sequence[Prediction], measured: Mapping[str, Any]) -> str:
    budgets = [row for budget in _BUDGETS for row in budget.rows(found)]
    return f"""# Predicted, not measured: lungkit's CUDA kernels on an H100

`python benchmarks/static_model.py` read these numbers from the machine code for compute capability 9.0. The floors are
bounds: instructions issued, tensor products, passes of the memory pipe, bytes at 3.35 TB/s. What a kernel is predicted
to take rests on rules of thumb besides ({100 * REACHED_OF_BANDWIDTH:.0f} % of the bandwidth, \
{100 * REACHED_OF_ISSUES:.0f} % of the issue slots, {1e6 * SECONDS_ON_THE_WAY:.1f} us of latency; of a small
kernel the longest way through its instructions), and on uneven shares of the work; sectors of the caches, bank
conflicts and waits within a warp are not in it. Blocks of code that a configuration may skip at run time count as
executed unless benchmarks/kernel_paths says why not. Not priced: the float32 gate's backward pass and its TF32 kernels,
losses of other classes and of odd sizes, wide gates; spills are looked for in all kernels.

## Predicted calls, beside what an H200 measured

`predicted share`: time of the fewest bytes that must be read and written, at 3.35 TB/s, over the predicted time of the
call. `measured`: by CUDA graphs on an H200, whose copy reaches 4.19 TB/s ([measured.md](h200/measured.md)), at 050b716:
before blocks that hold a channel of the norm were made smaller, below; a backward pass is what both passes took longer
than the forward one.

What these measurements showed and the floors do not know:

- The gate of channels-first features takes 1.3 to 1.4 times what is predicted, after gathers of phi and stores of
  partly filled sectors were mended: the model knows neither sectors nor conflicts within a warp.
- The norm of many short channels took 12.5 us where 5.8 were predicted: the model counts one wave of blocks, while a
  multiprocessor held two of the five that fell to it. They have 64 threads now, not 256, and all fit; not measured.
- Counts of masks of four classes take 1.3 times what is predicted.

{configuration_table(found, measured_rows(measured))}

## Predicted values of the budgets

{_table(("budget, of the predicted values", "at most", "largest", ""), budgets)}

Why some are missed. The block that finishes the loss makes one round trip to memory and issues about 650 instructions
of one warp, one after the other; the same rule gives about 13 us for the kernel that it replaced, of which 12 were
measured. Counts of four classes: half of the instructions set up a block and hand on its sums. Counts of logits: 79
instructions for 32 voxels. Losses of 128^3 voxels: chunks are short beside what one leaves.

## Predicted before the rewrite, and now

The same floors of the first CUDA kernels, at f694bb1, were read from their machine code by hand, before this program
could price them; this program cannot, as it knows the loops of today's kernels alone. Issue floor / byte floor in us:

{_table(("call", "before", "now"), _before_and_now(found))}

## Predicted prices of the kernels

Instructions that a warp issues for 32 voxels (gate, loss, counts) or for 32 elements of the features (tail, norm); of
kernels that combine what others left (`finish`, `weights`, `combine`), all those of a warp. `bytes an access`: what a
lane reads or writes of global memory by one instruction, asynchronous copies included.

{kernel_table(found)}
"""
