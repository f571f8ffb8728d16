"""The gate's tail of bfloat16 features in pieces of 16 bytes. A unit is 32 elements of the features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .declarations import Configuration, HostCalls, Launch

THREADS = 256
WARPS = THREADS // 32
WIDTH = 8  # elements of a piece
ROW = ROWS = 16  # threads side by side in memory, and rows of them


@dataclass(frozen=True)
class Tail:
    """Sizes of the features."""

    images: int
    channels: int
    grid: tuple[int, ...]
    by_voxel: bool = False

    @property
    def voxels(self) -> int:
        return self.images * math.prod(self.grid)

    @property
    def bytes(self) -> int:
        return 2 * self.voxels * self.channels

    @property
    def blocks(self) -> int:
        tile = 4 * ROWS if self.by_voxel else ROW * WIDTH
        return self.images * -(-math.prod(self.grid) // tile)

    @property
    def turns(self) -> int:
        """Pieces of a thread and voxel, over the channels."""
        return -(-self.channels // (ROW * WIDTH if self.by_voxel else ROWS))

    @property
    def label(self) -> str:
        return f"{'x'.join(map(str, (self.images, self.channels, *self.grid)))} bfloat16"

    @property
    def name(self) -> str:
        return self.label + (", channels-last" if self.by_voxel else "")

    def timed_as(self, op: str) -> str | None:
        return None if self.by_voxel else f"{op} forward {self.label}"

    def kernel(self, name: str) -> str:
        return f"{name}IN3c108BFloat16ELb{int(self.by_voxel)}E"


def _launch(
    tail: Tail,
    kernel: str,
    trips: tuple[float, ...],
    moved: float,
    stored: float,
    pieces: int,
    line: str | None = None,
    skipped: Sequence[str] = (),
) -> Launch:
    """With ``pieces`` of a thread on their way together."""
    if line is None:
        line = "for (int64_t c = tile.column * width" if tail.by_voxel else "for (int64_t c = tile.row"
    return Launch(
        source="gate_tail",
        kernel=tail.kernel(kernel),
        blocks=tail.blocks,
        threads=THREADS,
        shared_bytes=0,
        trips={line: trips},
        skipped=skipped,
        moved_bytes=moved,
        in_flight_bytes=16 * 32 * pieces,
        units=tail.voxels * tail.channels / 32,
        stored_bytes=stored,
    )


def _over_channels(tail: Tail, variants: int) -> tuple[float, ...]:
    """Turns of the loops over the channels. By voxel there is one of two pieces for each of four voxels, else what is
    left of four pieces, and four. The compiler may make ``variants`` of them, of which the first runs."""
    if not tail.by_voxel:
        return (tail.turns % 4, tail.turns // 4) + (0, 0) * (variants - 1)
    return (tail.turns / 2,) * 4 + (0,) * 4 * (variants - 1)


def psi_forward(tail: Tail) -> Configuration:
    stored = tail.bytes + 2 * tail.voxels
    moved = 2 * tail.bytes + 4 * tail.channels + stored
    launch = _launch(
        tail,
        "gate_psi_pieces_kernel",
        _over_channels(tail, 2 if tail.by_voxel else 1),
        moved,
        stored,
        4 if tail.by_voxel else 8,
    )
    return Configuration(
        f"gate_psi forward {tail.name}",
        moved,
        (launch,),
        tail.timed_as("gate_psi"),
        HostCalls(allocations=2, checks=2),  # psi, q
    )


def psi_backward(tail: Tail) -> Configuration:
    left = 4 * tail.blocks * tail.channels
    weight = 4 * tail.channels
    moved = 2 * tail.bytes + 2 * tail.voxels + weight
    step = "piece_row * width" if tail.by_voxel else "batch * piece_rows"
    main = _launch(
        tail,
        "gate_psi_backward_pieces_kernel",
        (tail.turns if tail.by_voxel else tail.turns / 4,),
        moved + left,
        tail.bytes + left,
        4,
        f"for (int64_t first = 0; first < layout.channels; first += {step})",
    )
    turns = math.ceil(tail.blocks / THREADS)
    weights = Launch(
        source="gate_tail",
        kernel="gate_psi_weights_kernelIffE",
        blocks=tail.channels,
        threads=THREADS,
        shared_bytes=0,
        trips={"for (int64_t run = threadIdx.x; run < runs": (turns % 16, turns // 16)},
        skipped=(),
        moved_bytes=left + weight,
        loaded_bytes=left,
        stored_bytes=weight,
        in_flight_bytes=4 * 32,
        units=tail.channels * WARPS,
        waits=1,
    )
    return Configuration(
        f"gate_psi backward {tail.name}",
        moved + weight,
        (main, weights),
        None,
        HostCalls(allocations=3, checks=3),  # gradients, sums of tiles
    )


def scale_forward(tail: Tail) -> Configuration:
    moved = 2 * tail.bytes + 2 * tail.voxels
    launch = _launch(
        tail,
        "gate_scale_pieces_kernel",
        _over_channels(tail, 1),
        moved,
        tail.bytes,
        2 if tail.by_voxel else 4,
    )
    return Configuration(
        f"gate_scale forward {tail.name}",
        moved,
        (launch,),
        tail.timed_as("gate_scale"),
        HostCalls(1, checks=1),
    )


def scale_backward(tail: Tail) -> Configuration:
    moved = 3 * tail.bytes + 4 * tail.voxels
    trips = _over_channels(tail, 2)
    if tail.by_voxel:  # with the gradient of x and without it, a voxel after the other
        trips = (tail.turns / 2, 0) * 4
    launch = _launch(
        tail,
        "gate_scale_backward_pieces_kernel",
        trips,
        moved,
        tail.bytes + 2 * tail.voxels,
        4 if tail.by_voxel else 8,
    )
    return Configuration(
        f"gate_scale backward {tail.name}", moved, (launch,), None, HostCalls(allocations=2, checks=1)
    )


TAILS = tuple(Tail(2, 256, (24, 24, 24), by_voxel) for by_voxel in (False, True))


def tail_configurations() -> list[Configuration]:
    makers = (psi_forward, psi_backward, scale_forward, scale_backward)
    return [make(tail) for tail in TAILS for make in makers]
