"""What the cost model declares of the kernels is what they do, as the emulator counts it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_on_cpu.counting import Counted, Counting, Lines
from kernel_paths import Configuration, Gate, gate_backward, gate_forward
from native_build import build_counted
from sass import block_end

CSRC = Path(__file__).resolve().parents[2] / "csrc"
MULTIPROCESSORS = 4  # of the emulator's device

GATES = [
    Gate(1, 32, 16, (6, 8, 64)),
    Gate(2, 64, 32, (6, 96)),
    Gate(1, 32, 16, (6, 8, 64), by_voxel=True),
    Gate(2, 64, 32, (6, 96), by_voxel=True),
]


@pytest.fixture(scope="session")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Counting:
    library = build_counted()
    torch.ops.load_library(str(library))
    return Counting(library, tmp_path_factory.mktemp("gcov"))


def _tensors(gate: Gate) -> tuple[torch.Tensor, ...]:
    """x, phi, w_x, w_psi and b_psi."""
    coarse = tuple(size // 2 for size in gate.fine)
    order = torch.channels_last if len(gate.fine) == 2 else torch.channels_last_3d
    features = [
        torch.randn(gate.images, channels, *grid, dtype=torch.bfloat16)
        for channels, grid in ((gate.channels, gate.fine), (gate.inner, coarse))
    ]
    if gate.by_voxel:
        features = [tensor.contiguous(memory_format=order) for tensor in features]
    return (*features, torch.randn(gate.inner, gate.channels), torch.randn(gate.inner), torch.randn(1))


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.label)
def test_gate_forward_does_what_the_cost_model_declares(counting, gate):
    inputs = _tensors(gate)
    counted = counting.count(lambda: torch.ops.lungkit_counted.attention_gate(*inputs, False))
    assert_as_declared(counted, gate_forward(gate, MULTIPROCESSORS))


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.label)
def test_gate_backward_does_what_the_cost_model_declares(counting, gate):
    inputs = _tensors(gate)
    grad_out = torch.randn_like(inputs[0])
    grad_alpha = torch.randn(gate.images, 1, *gate.fine, dtype=torch.bfloat16)
    counted = counting.count(
        lambda: torch.ops.lungkit_counted.attention_gate_backward(
            grad_out, grad_alpha, *inputs, True, True, True, True, False
        )
    )
    assert_as_declared(counted, gate_backward(gate))


def assert_as_declared(counted: Counted, configuration: Configuration) -> None:
    """Launches, products and bytes are equal; loops turn as often; what is left out never runs.

    A loop that the lanes of a warp share out turns as often as for the lane that turns most: less than once more than
    for the average one, which is counted here. Where the compiler made several loops of one, the turns of
    each are its own.
    """
    assert len(counted.launches) == len(configuration.launches)
    for counts, declared in zip(counted.launches, configuration.launches, strict=True):
        assert declared.kernel in counts.name
        assert {
            "blocks": counts.blocks,
            "threads": counts.threads,
            "shared bytes": counts.shared_bytes,
            "products": counts.products,
            "copied bytes": counts.copied_bytes,
            "loaded bytes": counts.loaded_bytes,
            "stored bytes": counts.stored_bytes,
            "moved bytes": counts.different_loaded_bytes + counts.different_stored_bytes,
        } == pytest.approx({
            "blocks": declared.blocks,
            "threads": declared.threads,
            "shared bytes": declared.shared_bytes,
            "products": declared.products,
            "copied bytes": declared.copied_bytes,
            "loaded bytes": declared.loaded_bytes,
            "stored bytes": declared.stored_bytes,
            "moved bytes": declared.moved_bytes,
        }, rel=1e-12)  # fmt: skip
        for snippet, turns in declared.trips.items():
            counted_turns = list(turns_of_loops(counted.lines, declared.source, snippet))
            assert counted_turns, f"{declared.kernel} never comes to the loop {snippet!r}"
            for average in counted_turns if isinstance(turns, (int, float)) else ():
                assert average * (1 - 1e-12) <= turns < average + 1, snippet
        for snippet in declared.skipped:
            ran = list(lines_that_ran(counted.lines, declared.source, snippet))
            assert not ran, f"{declared.kernel} comes to {snippet!r}, which its price leaves out: {ran}"


def places_of(source: str, snippet: str) -> Iterator[tuple[Path, int]]:
    """Lines of an op's sources that hold ``snippet``."""
    for path in (*sorted((CSRC / source).iterdir()), *sorted((CSRC / "support").iterdir())):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if snippet in line:
                yield path, number


def turns_of_loops(lines: Lines, source: str, snippet: str) -> Iterator[float]:
    """How often each loop that ``snippet`` names turns when a thread comes to it, on average.

    A loop's own line runs once more than its body each time.
    """
    for path, number in places_of(source, snippet):
        if lines.get((path, number), 0) > 0:
            body = next(lines[path, n] for n in range(number + 1, number + 9) if (path, n) in lines)
            yield body / (lines[path, number] - body)


def lines_that_ran(lines: Lines, source: str, snippet: str) -> Iterator[str]:
    """Of the blocks that ``snippet`` opens, or the line itself where it opens none."""
    for path, number in places_of(source, snippet):
        last = block_end(str(path), number)
        for n in range(min(number + 1, last), last + 1):
            if lines.get((path, n), 0) > 0:
                yield f"{path.name}:{n}"
