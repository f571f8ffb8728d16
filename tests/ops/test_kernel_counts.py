"""What the cost model declares of the kernels is what they do, as the emulator counts it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_on_cpu.counting import Counting, Lines
from kernel_paths import Configuration, Gate, gate_backward, gate_forward
from kernel_paths.attention_gate_tiles import tiles_forward
from kernel_paths.confusion_counts import Counts, counts_forward
from kernel_paths.dice_ce import Loss, loss_backward, loss_forward
from kernel_paths.gate_tail import Tail, psi_backward, psi_forward, scale_backward, scale_forward
from kernel_paths.norm_act import Norm, norm_backward, norm_forward
from native_build import build_counted
from sass import block_end
from torch import Tensor

CSRC = Path(__file__).resolve().parents[2] / "csrc"
MULTIPROCESSORS = 4  # of the emulator's device

GATES = [
    Gate(1, 32, 16, (6, 8, 64)),
    Gate(2, 64, 32, (6, 96)),
    Gate(1, 32, 16, (6, 8, 64), by_voxel=True),
    Gate(2, 64, 32, (6, 96), by_voxel=True),
]
FLOAT_GATE = Gate(1, 32, 16, (4, 8, 32))
LOSSES = [
    Loss(2, 2, (16, 16, 32)),
    Loss(2, 3, (16, 16, 32), "float32"),
    Loss(2, 4, (16, 16, 32), by_voxel=True),
    Loss(2, 2, (16, 16, 32), labels="int64"),
]
TAILS = [Tail(2, 32, (4, 8, 8), by_voxel) for by_voxel in (False, True)]
# Two blocks an image: on the emulator there are no more.
COUNTS = [Counts(2, 4, (16, 16, 16)), Counts(2, 2, (16, 16, 16)), Counts(2, 2, (16, 16, 16), "bfloat16")]
# One launch of a block a channel, and three.
NORMS = [
    Norm(2, 16, (8, 8, 8)),
    Norm(2, 16, (8, 8, 8), by_voxel=True),
    Norm(1, 2, (16, 32, 64)),
    Norm(1, 8, (16, 16, 16), by_voxel=True),
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
    assert_as_declared(
        counting,
        gate_forward(gate, MULTIPROCESSORS),
        lambda: torch.ops.lungkit_counted.attention_gate(*inputs, False),
    )


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.label)
def test_gate_backward_does_what_the_cost_model_declares(counting, gate):
    inputs = _tensors(gate)
    grad_out = torch.randn_like(inputs[0])
    grad_alpha = torch.randn(gate.images, 1, *gate.fine, dtype=torch.bfloat16)
    assert_as_declared(
        counting,
        gate_backward(gate),
        lambda: torch.ops.lungkit_counted.attention_gate_backward(
            grad_out, grad_alpha, *inputs, True, True, True, True, False
        ),
    )


def _features(of: Loss | Tail | Norm, channels: int) -> Tensor:
    """bfloat16, in the configuration's order."""
    features = torch.randn(of.images, channels, *of.grid, dtype=torch.bfloat16)
    return features.contiguous(memory_format=torch.channels_last_3d) if of.by_voxel else features


def _tiles(ops: Any) -> object:
    return ops.attention_gate(*(tensor.float() for tensor in _tensors(FLOAT_GATE)), False)


def _loss(loss: Loss, ops: Any) -> object:
    of_loss = (True, False, False, True, 1e-5, 1e-5, 1.0, 1.0, 0.0)
    return ops.dice_ce_loss(*_logits_and_labels(loss), None, None, *OF_SOFTMAX, *of_loss)


def _loss_gradient(loss: Loss, ops: Any) -> object:
    slopes = torch.randn(6, loss.images, loss.classes)
    return ops.dice_ce_backward(slopes, None, *_logits_and_labels(loss), None, *OF_SOFTMAX)


OF_SOFTMAX = ("softmax", "softmax", False, 0.0, None, False)


def _logits_and_labels(loss: Loss) -> tuple[Tensor, Tensor]:
    labels = torch.randint(loss.classes, (loss.images, *loss.grid), dtype=getattr(torch, loss.labels))
    return _features(loss, loss.classes).to(getattr(torch, loss.logits)), labels


def _psi(tail: Tail, ops: Any) -> object:
    features = (_features(tail, tail.channels) for _ in range(2))
    return ops.gate_psi(*features, torch.randn(tail.channels))


def _psi_gradient(tail: Tail, ops: Any) -> object:
    q = _features(tail, tail.channels)
    return ops.gate_psi_backward(_features(tail, 1), q, torch.randn(tail.channels), True, True)


def _scale(tail: Tail, ops: Any) -> object:
    return ops.gate_scale(_features(tail, tail.channels), _features(tail, 1))


def _scale_gradient(tail: Tail, ops: Any) -> object:
    grad, x = (_features(tail, tail.channels) for _ in range(2))
    return ops.gate_scale_backward(grad, x, _features(tail, 1), True, True)


def _counts(counts: Counts, ops: Any) -> object:
    shape = (counts.images, *counts.grid)
    labels = torch.randint(counts.classes, shape, dtype=torch.uint8)
    if counts.logits is None:
        return ops.confusion_counts(labels.flip(0), labels, counts.classes, None)
    logits = torch.randn(counts.images, counts.classes, *counts.grid).to(getattr(torch, counts.logits))
    return ops.confusion_counts(logits, labels, counts.classes, None)


def _norm(norm: Norm, ops: Any) -> object:
    x, parameters = _features(norm, norm.channels), torch.randn(2, norm.channels)
    return ops.norm_act(x, *parameters, None, norm.channels, 1e-5, 0.01)


def _norm_gradient(norm: Norm, ops: Any) -> object:
    grad, x = (_features(norm, norm.channels) for _ in range(2))
    statistics, parameters = torch.ones(2, norm.images, norm.channels), torch.randn(2, norm.channels)
    return ops.norm_act_backward(grad, x, None, *statistics, *parameters, 0.01, False)


CALLS: list[tuple[Configuration, Callable[[Any], object]]] = [
    (tiles_forward(FLOAT_GATE), _tiles),
    *((loss_forward(loss), partial(_loss, loss)) for loss in LOSSES),
    *((loss_backward(loss), partial(_loss_gradient, loss)) for loss in LOSSES),
    *((psi_forward(tail), partial(_psi, tail)) for tail in TAILS),
    *((psi_backward(tail), partial(_psi_gradient, tail)) for tail in TAILS),
    *((scale_forward(tail), partial(_scale, tail)) for tail in TAILS),
    *((scale_backward(tail), partial(_scale_gradient, tail)) for tail in TAILS),
    *((counts_forward(counts), partial(_counts, counts)) for counts in COUNTS),
    *((norm_forward(norm), partial(_norm, norm)) for norm in NORMS),
    *((norm_backward(norm), partial(_norm_gradient, norm)) for norm in NORMS),
]


@pytest.mark.parametrize(("configuration", "call"), CALLS, ids=[c.name for c, _ in CALLS])
def test_ops_do_what_the_cost_model_declares(counting, configuration, call):
    assert_as_declared(counting, configuration, lambda: call(torch.ops.lungkit_counted))


def assert_as_declared(counting: Counting, configuration: Configuration, call: Callable[[], object]) -> None:
    """Launches, products and bytes are equal; loops turn as often; what is left out never runs.

    A loop that the lanes of a warp share out turns as often as for the lane that turns most: less than once more than
    for the average one, which is counted here. Where the compiler made several loops of one, the turns of each are its
    own. What is loaded and stored in all is declared where the source says it as the compiled code does.
    """
    counted = counting.count(configuration.launches[0].source, call)
    assert len(counted.launches) == len(configuration.launches)
    for counts, declared in zip(counted.launches, configuration.launches, strict=True):
        assert declared.kernel in counts.name
        found = {
            "blocks": counts.blocks,
            "threads": counts.threads,
            "shared_bytes": counts.shared_bytes,
            "products": counts.products,
            "copied_bytes": counts.copied_bytes,
            "moved_bytes": counts.different_loaded_bytes + counts.different_stored_bytes,
            "loaded_bytes": counts.loaded_bytes if declared.loaded_bytes else 0,
            "stored_bytes": counts.stored_bytes if declared.stored_bytes else 0,
        }
        assert found == pytest.approx({name: getattr(declared, name) for name in found}, rel=1e-12)
        for snippet, turns in declared.trips.items():
            if isinstance(turns, tuple):
                continue
            loops = list(turns_of_loops(counted.lines, declared.source, snippet))
            assert loops or turns == 0, f"{declared.kernel} never comes to the loop {snippet!r}"
            for average in loops:
                assert average * (1 - 1e-12) <= turns < average + 1, snippet
        for snippet in declared.skipped:
            ran = list(lines_that_ran(counted.lines, declared.source, snippet))
            assert not ran, f"{declared.kernel} comes to {snippet!r}, which its price leaves out: {ran}"


def places_of(source: str, snippet: str) -> Iterator[tuple[Path, int, list[str]]]:
    """Lines of an op's sources that hold ``snippet``: file, number, and all lines of the file."""
    for path in (*sorted((CSRC / source).iterdir()), *sorted((CSRC / "support").iterdir())):
        text = path.read_text().splitlines()
        for number, line in enumerate(text, start=1):
            if snippet in line:
                yield path, number, text


def turns_of_loops(lines: Lines, source: str, snippet: str) -> Iterator[float]:
    """How often each loop that ``snippet`` names turns when a thread comes to it, on average; an unrolled one fewer."""
    for path, number, text in places_of(source, snippet):
        if lines.get((path, number), 0) > 0:
            body = arrivals(lines, path, _statement_after(lines, path, number), text)
            unrolled = re.fullmatch(r"#pragma unroll (\d+).*", text[number - 2])
            yield body / arrivals(lines, path, number, text) / (int(unrolled[1]) if unrolled else 1)


def arrivals(lines: Lines, path: Path, number: int, text: list[str]) -> int:
    """How often threads come to the statement of a line. A loop's own line runs once more than its body each time."""
    runs = lines[path, number]
    if re.match(r"\s*(for|while) \(", text[number - 1]):
        runs -= arrivals(lines, path, _statement_after(lines, path, number), text)
    return runs


def _statement_after(lines: Lines, path: Path, number: int) -> int:
    return next(n for n in range(number + 1, number + 9) if (path, n) in lines)


def lines_that_ran(lines: Lines, source: str, snippet: str) -> Iterator[str]:
    """Of the blocks that ``snippet`` opens, or the line itself where it opens none; one that is an if and what it
    decides about cannot tell."""
    for path, number, text in places_of(source, snippet):
        last = block_end(str(path), number)
        if last == number and re.match(r"\s*if \(.*;", text[number - 1]):
            continue
        for n in range(min(number + 1, last), last + 1):
            if lines.get((path, n), 0) > 0:
                yield f"{path.name}:{n}"
