"""Times of single kernels: a CUDA graph replayed over rotating inputs, and eager calls on the wall clock.

``python benchmarks/kernel_times.py --output TIMES.json`` on a machine with a GPU. A graph holds one call for each of
several copies of the inputs, together larger than any cache, so that a replay shows what the kernels take without
launches and without help of the L2. The wall clock runs over eager calls in a row, which shows what a network sees
where the host is slower than the device. ``copy`` is a device-to-device copy: the ceiling. On the CPU (``--device
cpu``, for a rehearsal) calls in a loop stand in for the graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention_gate_providers import AttentionGateCase
from dice_ce_providers import DiceCECase
from harness import OURS, Case
from norm_act_providers import NormActCase
from torch import Tensor

from lungkit.ops.confusion_counts import confusion_counts
from lungkit.ops.gate_tail import gate_psi, gate_scale

_ROTATING_BYTES = 512 * 2**20
_REPEATS = 30  # and no more than fit into
_SECONDS = 0.3

Call = Callable[[], Any]


@dataclass(frozen=True)
class Measurement:
    """One kernel at one size: ``make`` gives a call on inputs of its own; ``bytes`` is the least that it moves."""

    name: str
    provider: str
    bytes: int
    make: Callable[[], Call]


def measurements(device: str, *, smoke: bool, compiled: bool = True) -> Iterator[Measurement]:
    """The headline sizes of every op beside eager PyTorch and torch.compile; tiny ones for a rehearsal."""
    yield _copy(device, 1 << 16 if smoke else 1 << 28)
    for case in _cases(device, smoke):
        for provider in _compared(case):
            for mode in ("forward", "both"):
                if compiled or "compiled" not in provider:
                    yield _of_case(case, provider, mode)
    yield from _tail(device, smoke)


def _copy(device: str, count: int) -> Measurement:
    def make() -> Call:
        source, target = (torch.ones(count, dtype=torch.uint8, device=device) for _ in range(2))
        return lambda: target.copy_(source)

    return Measurement("copy", OURS, 2 * count, make)


def _cases(device: str, smoke: bool) -> list[Case]:
    half = torch.bfloat16
    if smoke:
        return [
            AttentionGateCase(device, 1, 8, 4, (9, 9), 1, half),
            DiceCECase(device, 1, (1, 2, 8, 9), half),
            NormActCase(device, 1, (1, 8, 9, 10), half, True),
        ]
    gates = [
        AttentionGateCase(device, 1, 32, 16, (96,) * 3, 1, half),
        AttentionGateCase(device, 1, 64, 32, (512,) * 2, 8, half),
        AttentionGateCase(device, 1, 64, 32, (48,) * 3, 1, half),
        AttentionGateCase(device, 1, 256, 128, (12,) * 3, 1, half),
    ]
    losses = [
        DiceCECase(device, 1, (2, classes, 192, 192, 192), dtype)
        for classes in (2, 3, 4)
        for dtype in (half, torch.float32)
    ]
    norms = [
        NormActCase(device, 1, shape, half, last)
        for shape in ((2, 32, 128, 128, 128), (2, 320, 8, 8, 8))
        for last in (False, True)
    ]
    return [*gates, *losses, *norms]


def _compared(case: Case) -> list[str]:
    known = {"eager", "compiled", "group norm, eager", "group norm, compiled"}
    if isinstance(case, DiceCECase) and case.device == "cuda":
        # The eager form that is fastest on a CPU scatters into few sums, which a GPU does one by one: 29 ms.
        known = {"MONAI", "nnU-Net's formula", "compiled"}
    return [name for name in case.providers if name == OURS or name in known]


def _of_case(case: Case, provider: str, mode: str) -> Measurement:
    def make() -> Call:
        built = case.build(provider, case.inputs())
        if mode == "forward":
            return built.forward
        return lambda: None if built.backward is None else built.backward(built.forward())

    fewest = case.fewest_bytes() or {}
    moved = sum(fewest.values()) if mode == "both" else fewest.get(mode, 0)
    return Measurement(f"{case.op} {mode} {case.label}", provider, moved, make)


def _tail(device: str, smoke: bool) -> Iterator[Measurement]:
    """The ops without a gradient of their own case: the gate's tail at a deep level, counts of two masks."""
    shape = (1, 4, 5, 6, 7) if smoke else (2, 256, 24, 24, 24)
    voxels = torch.Size((shape[0], *shape[2:])).numel()

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=torch.bfloat16)

    def psi() -> Call:
        a, b, weight = draw(*shape), draw(*shape), draw(shape[1])
        return lambda: gate_psi(a, b, weight)

    def eager_psi() -> Call:
        a, b, weight = draw(*shape), draw(*shape), draw(1, shape[1], *(1,) * (len(shape) - 2))
        return lambda: F.conv3d(F.relu(a + b), weight)

    def scale() -> Call:
        x, alpha = draw(*shape), draw(shape[0], 1, *shape[2:])
        return lambda: gate_scale(x, alpha)

    label = "x".join(map(str, shape))
    features = 2 * shape[1] * voxels
    yield Measurement(f"gate_psi forward {label} bfloat16", OURS, 3 * features + 2 * voxels, psi)
    yield Measurement(f"gate_psi forward {label} bfloat16", "eager", 3 * features + 2 * voxels, eager_psi)
    yield Measurement(f"gate_scale forward {label} bfloat16", OURS, 2 * features + 2 * voxels, scale)
    extent = (8,) * 3 if smoke else (256,) * 3

    def counts() -> Call:
        masks = [torch.randint(0, 4, (2, *extent), device=device, dtype=torch.uint8) for _ in range(2)]
        return lambda: confusion_counts(masks[0], masks[1], num_classes=4)

    moved = 4 * torch.Size(extent).numel()
    yield Measurement(f"confusion_counts forward 2x{'x'.join(map(str, extent))} uint8", OURS, moved, counts)


def time_one(measurement: Measurement, device: str) -> dict[str, Any]:
    """Median seconds of a call: of a graph's replay over rotating inputs, and of eager calls in a row."""
    copies = max(2, min(16, _ROTATING_BYTES // max(1, measurement.bytes))) if device == "cuda" else 2
    calls = [measurement.make() for _ in range(copies)]
    for call in calls * 2:
        call()
    row: dict[str, Any] = {
        "name": measurement.name,
        "provider": measurement.provider,
        "bytes": measurement.bytes,
        "wall_seconds": _wall(calls, device),
    }
    row["graph_seconds"] = _graph(calls) if device == "cuda" else row["wall_seconds"]
    row["bytes_per_second"] = measurement.bytes / row["graph_seconds"] if measurement.bytes else None
    return row


def _turns(times: Sequence[float]) -> bool:
    """Whether there is time for another turn after those of ``times``: three at least."""
    return len(times) < 3 or (len(times) < _REPEATS and sum(times) < _SECONDS)


def _wall(calls: Sequence[Call], device: str) -> float:
    times: list[float] = []
    while _turns(times) and (device == "cuda" or len(times) < 3):
        _synchronise(device)
        start = time.perf_counter()
        for call in calls:
            call()
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times) / len(calls)


def _graph(calls: Sequence[Call]) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call() for call in calls]
    times: list[float] = []
    while _turns(times):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        graph.replay()
        marks[1].record()
        torch.cuda.synchronize()
        times.append(marks[0].elapsed_time(marks[1]) / 1e3)
    del kept
    return statistics.median(times) / len(calls)


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON to write; rows that it holds are kept"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that all of it runs")
    parser.add_argument("--without-compiled", action="store_true", help="leave out what has to be compiled")
    options = parser.parse_args(arguments)
    rows: dict[str, Mapping[str, Any]] = {}
    if options.output.is_file():
        rows = {
            f"{row['name']} | {row['provider']}": row
            for row in json.loads(options.output.read_text())["rows"]
        }
    for measurement in measurements(
        options.device, smoke=options.smoke, compiled=not options.without_compiled
    ):
        key = f"{measurement.name} | {measurement.provider}"
        if key in rows and "error" not in rows[key]:
            continue
        try:
            rows[key] = time_one(measurement, options.device)
        except (RuntimeError, NotImplementedError) as error:  # one form that fails must not cost the others
            message = str(error).partition("\n")[0]
            rows[key] = {"name": measurement.name, "provider": measurement.provider, "error": message}
        shown = rows[key].get("graph_seconds")
        sys.stdout.write(f"{key}: {rows[key].get('error') if shown is None else f'{1e6 * shown:.1f} us'}\n")
        sys.stdout.flush()
        options.output.write_text(
            json.dumps(
                {"device": options.device, "torch": torch.__version__, "rows": list(rows.values())}, indent=1
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
