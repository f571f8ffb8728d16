"""Every CUDA kernel of lungkit, forward and backward at small sizes: what a sanitizer watches within a minute.

``compute-sanitizer --tool racecheck --error-exitcode 9 python benchmarks/race_check.py`` on a machine with a GPU. The
calls reach each kernel that the ops choose between: number types, layouts, widths, whole and odd sizes, blocks that go
round their loop more than once. Tensors are drawn on the CPU and nothing calls a library's product, for racecheck
ends with an internal error inside cuBLAS. ``--device cpu`` makes the same calls of the CPU's kernels, for a rehearsal.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from lungkit.ops.confusion_counts import confusion_counts
from lungkit.ops.dice_ce import dice_ce_loss, dice_ce_statistics
from lungkit.ops.gate_tail import gate_psi, gate_scale
from lungkit.ops.norm_act import norm_act

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)
ALL_FLOATS = (torch.float64, *FLOATS)
LAYOUTS = (False, True)  # channels-last or not

Call = tuple[str, Callable[[], object]]


class Inputs:
    """Random tensors on ``device`` that come from the CPU; ``smoke`` makes the largest sizes small."""

    def __init__(self, device: str, *, smoke: bool = False) -> None:
        self.device = device
        self.smoke = smoke
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
        """A leaf that takes a gradient."""
        drawn = torch.randn(shape, generator=self.generator).to(dtype)
        if channels_last:
            order = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
            drawn = drawn.contiguous(memory_format=order)
        return drawn.to(self.device).requires_grad_()

    def codes(self, classes: int, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.randint(classes, shape, generator=self.generator).to(dtype).to(self.device)

    def large(self, *size: int) -> tuple[int, ...]:
        """A grid on which blocks go round their loop more than once."""
        return tuple(min(8, extent) for extent in size) if self.smoke else size


def differentiate(results: Tensor | Sequence[Tensor], leaves: Sequence[Tensor | None]) -> None:
    """Backward from ones, with respect to those that are there."""
    outputs = [results] if isinstance(results, Tensor) else list(results)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    torch.autograd.grad(outputs, wanted, [torch.ones_like(output) for output in outputs])


def gate_calls(inputs: Inputs) -> Iterator[Call]:
    """Rows of the half types and tiles of float32: both widths, each adjoint of the upsampling, each type of weight."""
    grids: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((12, 10, 24), (6, 5, 12)),
        ((6, 10, 24), (6, 5, 12)),
        ((12, 10, 24), (6, 10, 12)),
        ((20, 40), (10, 20)),
        ((20, 40), (20, 20)),
        ((9, 14, 21), (4, 5, 9)),
        ((8, 16), (8, 16)),
        (inputs.large(40, 72, 24), inputs.large(20, 36, 12)),
    ]
    for (channels, inner), grid, last in itertools.product(((32, 16), (64, 32), (23, 11)), grids, LAYOUTS):
        for dtype in HALVES:
            weights = torch.float32 if last else dtype
            yield gate_call(inputs, channels, inner, grid, dtype, weights, channels_last=last)
    for (channels, inner), grid, last in itertools.product(
        ((16, 8), (48, 24)), (grids[0], *grids[3:]), LAYOUTS
    ):
        for tf32 in (False, True):
            yield gate_call(inputs, channels, inner, grid, channels_last=last, tf32=tf32)


def gate_call(
    inputs: Inputs,
    channels: int,
    inner: int,
    grid: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    weights: torch.dtype = torch.float32,
    *,
    channels_last: bool,
    tf32: bool = False,
) -> Call:
    def call() -> None:
        x, phi = (
            inputs.draw(1, width, *size, dtype=dtype, channels_last=channels_last)
            for width, size in zip((channels, inner), grid, strict=True)
        )
        leaves = [
            x,
            phi,
            *(inputs.draw(*size, dtype=weights) for size in ((inner, channels), (inner,), (1,))),
        ]
        # The op itself: the public function would ask torch's settings about tf32.
        differentiate(torch.ops.lungkit.attention_gate(*leaves, tf32), leaves)

    kind = "tf32" if tf32 else str(dtype)
    return f"attention_gate {channels}/{inner} {grid} {kind}, {weights} weights, last={channels_last}", call


def loss_calls(inputs: Inputs) -> Iterator[Call]:
    """Two, three and four classes in each order of memory and with each kind of labels; then what any number takes."""
    whole, odd = (16, 24, 24), (7, 9, 11)
    for dtype, classes, size, last in itertools.product(FLOATS, (2, 3, 4), (whole, odd), LAYOUTS):
        yield loss_call(inputs, dtype, classes, size, channels_last=last)
        yield loss_call(inputs, dtype, classes, size, channels_last=last, labels=torch.int64, ignore_index=1)
    for classes in (2, 3, 4):
        yield loss_call(inputs, torch.bfloat16, classes, inputs.large(160, 160, 192))
        yield loss_call(inputs, torch.bfloat16, classes, whole, masked=True, weighted=True)
    for dtype, classes in itertools.product(ALL_FLOATS, (5, 70, 200)):
        yield loss_call(inputs, dtype, classes, odd, channels_last=classes == 70)
    yield loss_call(inputs, torch.float64, 2, odd)
    yield loss_call(inputs, torch.float32, 5, inputs.large(32, 48, 48))
    yield loss_call(inputs, torch.float32, 2, whole, squared_pred=True)
    yield loss_call(inputs, torch.float32, 1, whole, activation="sigmoid")
    for dtype, classes in itertools.product(ALL_FLOATS, (2, 5)):
        yield statistics_call(inputs, dtype, classes)


def loss_call(
    inputs: Inputs,
    dtype: torch.dtype,
    classes: int,
    size: tuple[int, ...],
    *,
    labels: torch.dtype = torch.uint8,
    channels_last: bool = False,
    masked: bool = False,
    weighted: bool = False,
    **options: object,
) -> Call:
    def call() -> None:
        logits = inputs.draw(2, classes, *size, dtype=dtype, channels_last=channels_last)
        codes = inputs.codes(max(2, classes), 2, *size, dtype=labels)
        mask = inputs.codes(2, 2, *size) if masked else None
        weight = inputs.draw(classes).detach() if weighted else None
        differentiate(dice_ce_loss(logits, codes, mask=mask, weight=weight, **options), [logits])  # type: ignore[arg-type]

    extras = f"mask={masked}, weight={weighted}, {options}"
    return (
        f"dice_ce_loss {classes} classes {size} {dtype}, {labels} labels, last={channels_last}, {extras}",
        call,
    )


def statistics_call(inputs: Inputs, dtype: torch.dtype, classes: int) -> Call:
    def call() -> None:
        logits = inputs.draw(2, classes, 7, 9, 11, dtype=dtype)
        differentiate(dice_ce_statistics(logits, inputs.codes(classes, 2, 7, 9, 11)), [logits])

    return f"dice_ce_statistics {classes} classes {dtype}", call


def norm_calls(inputs: Inputs) -> Iterator[Call]:
    """Channels that a block holds and longer ones, whole and odd sizes, groups, residuals, types of the parameters."""
    sizes = ((32, 6, 6, 8), (6, 5, 7, 11), (96, 12, 12, 12), (10, 15, 17, 19), (8, 40, 40, 40))
    for dtype, size, last in itertools.product(ALL_FLOATS, sizes, LAYOUTS):
        for residual, groups in itertools.product((False, True), (None, 2)):
            yield norm_call(inputs, dtype, size, channels_last=last, residual=residual, groups=groups)
    for last in LAYOUTS:
        yield norm_call(inputs, torch.bfloat16, (32, *inputs.large(64, 64, 64)), channels_last=last)
        yield norm_call(inputs, torch.bfloat16, (320, 8, 8, 8), channels_last=last)
        for dtype, parameters in itertools.product(HALVES, (None, *HALVES)):
            if parameters in (None, dtype):
                for size in ((32, 6, 6, 8), (6, 12, 16, 24)):
                    yield norm_call(inputs, dtype, size, channels_last=last, parameters=parameters)


def norm_call(
    inputs: Inputs,
    dtype: torch.dtype,
    size: tuple[int, ...],
    *,
    channels_last: bool,
    residual: bool = False,
    groups: int | None = None,
    parameters: torch.dtype | None = torch.float32,
) -> Call:
    """``parameters`` is the type of weight and bias; None goes without."""
    kind = torch.float64 if dtype == torch.float64 and parameters is not None else parameters

    def call() -> None:
        x = inputs.draw(2, *size, dtype=dtype, channels_last=channels_last)
        added = inputs.draw(2, *size, dtype=dtype, channels_last=channels_last) if residual else None
        weight, bias = (None if kind is None else inputs.draw(size[0], dtype=kind) for _ in range(2))
        y = norm_act(x, weight, bias, residual=added, groups=groups, slope=0.01)
        differentiate(y, [x, added, weight, bias])
        with torch.no_grad():
            norm_act(x, weight, bias, residual=added, groups=groups, slope=0.01, in_place=True)

    extras = f"last={channels_last}, residual={residual}, groups={groups}, {kind} parameters"
    return f"norm_act {size} {dtype}, {extras}", call


def tail_calls(inputs: Inputs) -> Iterator[Call]:
    """Whole pieces of 16 bytes and single elements."""
    sizes = ((32, 6, 6, 8), (130, 5, 7, 3))
    for dtype, size, last in itertools.product(ALL_FLOATS, sizes, LAYOUTS):
        half = dtype in HALVES
        for weights in {dtype, torch.float32} if half else {dtype}:
            yield tail_call(inputs, dtype, size, weights, channels_last=last)


def tail_call(
    inputs: Inputs, dtype: torch.dtype, size: tuple[int, ...], weights: torch.dtype, *, channels_last: bool
) -> Call:
    def call() -> None:
        a, b = (inputs.draw(2, *size, dtype=dtype, channels_last=channels_last) for _ in range(2))
        weight, alpha = inputs.draw(size[0], dtype=weights), inputs.draw(2, 1, *size[1:], dtype=dtype)
        differentiate(gate_psi(a, b, weight), [a, b, weight])
        differentiate(gate_scale(a, alpha), [a, alpha])

    return f"gate_psi and gate_scale {size} {dtype}, {weights} weight, last={channels_last}", call


def counts_calls(inputs: Inputs) -> Iterator[Call]:
    """Of codes and of logits: two classes, few, any number, more than shared memory counts."""
    sizes = ((16, 24, 24), (7, 9, 11), inputs.large(64, 128, 128))
    for classes, size in itertools.product((2, 3, 4, 9, 5000), sizes):
        for dtype in (torch.uint8, torch.int64) if classes < 256 else (torch.int64,):
            yield counts_call(inputs, classes, size, dtype, None)
    for dtype, classes, size in itertools.product(ALL_FLOATS, (1, 2, 4, 9), sizes[:2]):
        yield counts_call(inputs, classes, size, torch.uint8, dtype)


def counts_call(
    inputs: Inputs, classes: int, size: tuple[int, ...], labels: torch.dtype, logits: torch.dtype | None
) -> Call:
    """Without ``logits`` predictions are codes of the labels' type."""
    known = max(2, classes)

    def call() -> None:
        codes = inputs.codes(known, 2, *size, dtype=labels)
        if logits is None:
            pred = inputs.codes(known, 2, *size, dtype=labels)
        else:
            pred = inputs.draw(2, classes, *size, dtype=logits).detach()
        confusion_counts(pred, codes, known)
        confusion_counts(pred, codes, known, ignore_index=1)

    return f"confusion_counts {classes} classes {size}, {labels} labels, logits: {logits}", call


CALLS: dict[str, Callable[[Inputs], Iterator[Call]]] = {
    "attention_gate": gate_calls,
    "dice_ce": loss_calls,
    "norm_act": norm_calls,
    "gate_tail": tail_calls,
    "confusion_counts": counts_calls,
}


def run(inputs: Inputs, ops: Sequence[str]) -> int:
    """Make the calls; a line before each tells which one a sanitizer's report belongs to. Returns their number."""
    wait = torch.cuda.synchronize if inputs.device == "cuda" else partial(int, 0)
    count = 0
    for op in ops:
        started = time.monotonic()
        for name, call in CALLS[op](inputs):
            sys.stdout.write(f"{name}\n")
            sys.stdout.flush()
            call()
            wait()
            count += 1
        sys.stdout.write(f"== {op}: {time.monotonic() - started:.1f} s\n")
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "ops", nargs="*", default=list(CALLS), help=f"some of {', '.join(CALLS)}; default: all"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="with the largest sizes made small")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.ops) - set(CALLS))
    if unknown:
        parser.error(f"no op is called {', '.join(unknown)}; those known are {', '.join(CALLS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu makes the same calls of the CPU's kernels")
    count = run(Inputs(options.device, smoke=options.smoke), options.ops)
    sys.stdout.write(f"{count} calls made\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
