"""What the compiled CUDA code says before a GPU has run it: predicted times of the headline configurations.

``python benchmarks/static_model.py`` from the checkout compiles csrc/<op>/cuda.cu for ``--architectures`` (default 80
and 90; ``--cubins`` keeps what it compiles), or reads ``--library``, a lungkit_cuda.so that is there, and prices each
kernel: instructions that a warp issues for 32 voxels, by pipe; the time that the schedulers, the tensor cores and the
memory pipe need at least (the floors); the bytes; the warps that fit a multiprocessor and the bytes that these have on
their way; launches and calls of the host. It needs nvcc or a library, and lungkit's extra ``cuda-dev`` or the CUDA
toolkit's nvdisasm and cuobjdump. Writes ``results/h100-predicted.md`` and ``.json``, for the sizes of an H100 SXM.

``--check`` writes nothing and fails where any kernel of an op spills registers to memory on one of these architectures,
or is dearer than ``kernel-budgets.json`` allows; ``--tighten`` writes today's prices there.

None of these numbers is a measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cubins import Resources, compiled, of_library, resources_of
from kernel_paths import Launch, configurations
from kernel_prices import Prediction, Price, price
from predicted_report import kernel_table, report, short_name
from sass import Function, functions, listing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BUDGETS = ROOT / "benchmarks" / "kernel-budgets.json"
MEASURED = RESULTS / "h200" / "kernel-times.json"


def predictions(cubins: Sequence[Path], resources: Mapping[tuple[str, str], Resources]) -> list[Prediction]:
    wanted = configurations()
    names = {launch.kernel for configuration in wanted for launch in configuration.launches}
    found: dict[str, Function] = {}
    for cubin in cubins:
        found |= {function.name: function for function in functions(listing(cubin), sorted(names))}

    def of(launch: Launch) -> Price:
        matches = [name for name in found if launch.kernel in name]
        if len(matches) != 1:
            raise ValueError(f"{launch.kernel} names {len(matches)} kernels: {matches}")
        return price(launch, found[matches[0]], resources["sm_90", matches[0]])

    return [Prediction(c, tuple(map(of, c.launches))) for c in wanted]


def prices_by_kernel(found: Sequence[Prediction]) -> dict[str, float]:
    return {
        f"{prediction.configuration.name}: {short_name(p.launch.kernel)}": math.ceil(p.instructions)
        for prediction in found
        for p in prediction.prices
    }


def seconds_by_name(found: Sequence[Prediction]) -> dict[str, float]:
    """Predicted seconds by the names of kernel_times.py, so that gpu_hour.py joins them to what was measured.

    There a backward pass is timed with its forward pass, as "both".
    """
    seconds: dict[str, float] = {}
    for prediction in found:
        name = prediction.configuration.timed_as
        if name is not None:
            seconds[name] = prediction.seconds
            if " backward " in name:
                forward = seconds[name.replace(" backward ", " forward ")]
                seconds[name.replace(" backward ", " both ")] = forward + prediction.seconds
    return seconds


def problems(
    found: Sequence[Prediction],
    resources: Mapping[tuple[str, str], Resources],
    budgets: Mapping[str, float],
) -> list[str]:
    """Kernels that spill, that are over their budget, or whose priced path lacks products, loads or stores which they
    make (tests/ops/test_kernel_counts.py)."""
    spills = [
        f"{name} spills on {architecture}: {r.stack} bytes of stack"
        for (architecture, name), r in resources.items()
        if r.stack or r.local
    ]
    wrong = [
        f"{prediction.configuration.name}: {priced:.0f} {what} in the code, {declared:.0f} declared"
        for prediction in found
        for p in prediction.prices
        for what, priced, declared, most in (
            ("products", p.products, p.launch.products, 2.0),
            # Instructions that the edges of a problem leave out are priced too.
            ("bytes of loads", p.accessed.get("LDG", 0.0), p.launch.loaded_bytes, math.inf),
            ("bytes of stores", p.accessed.get("STG", 0.0), p.launch.stored_bytes, math.inf),
            ("bytes of copies", p.accessed.get("LDGSTS", 0.0), p.launch.copied_bytes, math.inf),
        )
        if declared and not 0.99 <= priced / declared <= most
    ]
    dear = [
        f"{name}: {instructions:.0f} instructions for 32 voxels, the budget is {budgets.get(name, 0):.0f}"
        for name, instructions in prices_by_kernel(found).items()
        if instructions > budgets.get(name, 0)
    ]
    return spills + wrong + dear


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--library", type=Path, help="a lungkit_cuda.so to read instead of compiling")
    parser.add_argument("--cubins", type=Path, help="folder that keeps the compiled code for the next run")
    parser.add_argument(
        "--architectures", nargs="+", default=["80", "90"], help="compute capabilities; prices are 90's"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail on spills and on broken budgets"
    )
    parser.add_argument("--tighten", action="store_true", help="make today's prices the budgets")
    options = parser.parse_args(arguments)
    sources = sorted({launch.source for c in configurations() for launch in c.launches})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if options.cubins is None else options.cubins
        folder.mkdir(parents=True, exist_ok=True)
        if options.library is not None:
            wanted = {f"sm_{name}" for name in options.architectures}
            resources = {key: r for key, r in resources_of(options.library).items() if key[0] in wanted}
            cubins = of_library(options.library, "90", folder)
        else:
            made = {name: compiled(sources, name, folder) for name in options.architectures}
            cubins = made["90"]
            resources = {
                key: r for files in made.values() for file in files for key, r in resources_of(file).items()
            }
        found = predictions(cubins, resources)
    if options.tighten:
        BUDGETS.write_text(json.dumps(prices_by_kernel(found), indent=2) + "\n")
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.is_file() else {}
    broken = problems(found, resources, budgets)
    sys.stdout.write(kernel_table(found) + "\n" + "".join(f"{line}\n" for line in broken))
    sys.stdout.write(f"{len(resources)} kernels, {len(broken)} problems\n")
    if not options.check:
        measured = json.loads(MEASURED.read_text()) if MEASURED.is_file() else {"rows": []}
        RESULTS.joinpath("h100-predicted.md").write_text(report(found, measured))
        seconds = seconds_by_name(found)
        RESULTS.joinpath("h100-predicted.json").write_text(json.dumps({"seconds": seconds}, indent=2) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
