"""norm_act of bfloat16 features without a residual, each channel a group of its own, with weight and bias.

Statistics of chunks, their combination and a pass that writes; or one launch where a block holds a channel. A unit is
32 elements, of a kernel that combines a warp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .declarations import Configuration, HostCalls, Launch

THREADS = 256
WARPS = THREADS // 32
VEC = 8  # elements of 16 bytes
MOST_BATCHES = 16
# Vectors of a thread at a time.
MOMENTS, APPLY, GRADIENT = 4, 4, 2
SMALL_FORWARD, SMALL_BACKWARD = 8, 4


@dataclass(frozen=True)
class Plan:
    """What blocks take: `tile` vectors of a row, `rows` at a time, `turns` times."""

    tile: int
    rows: int
    parts: int
    chunks: int
    lines: int
    turns: int
    threads: int = THREADS

    @property
    def warps(self) -> int:
        return self.threads // 32

    @property
    def blocks(self) -> int:
        return self.chunks * self.lines


@dataclass(frozen=True)
class Norm:
    """Sizes of the features."""

    images: int
    channels: int
    grid: tuple[int, ...]
    by_voxel: bool = False

    @property
    def elements(self) -> int:
        return self.images * self.channels * math.prod(self.grid)

    @property
    def rows(self) -> int:
        return math.prod(self.grid) if self.by_voxel else math.prod(self.grid) // VEC

    @property
    def name(self) -> str:
        shape = "x".join(map(str, (self.images, self.channels, *self.grid)))
        return f"{shape} bfloat16 {'channels-last' if self.by_voxel else 'channels-first'}"

    @property
    def parameters(self) -> int:
        """Bytes of weight and bias."""
        return 2 * 4 * self.channels

    @property
    def statistics(self) -> int:
        """Bytes of two numbers of every channel of an image."""
        return 2 * 4 * self.images * self.channels

    @property
    def sums(self) -> int:
        """Channels of a thread."""
        return VEC if self.by_voxel else 1

    def _tiled(self, widest: int, threads: int = THREADS) -> tuple[int, int, int, int]:
        tile = min(self.channels // VEC, widest) if self.by_voxel else 1
        rows = threads // tile
        parts = min(max(threads // (tile * self.sums), 1), math.ceil(math.sqrt(rows)))
        lines = self.images * (-(-self.channels // VEC // tile) if self.by_voxel else self.channels)
        return tile, rows, parts, lines

    def plan(self, vectors: int, blocks: int) -> Plan:
        """As shape_of() in csrc/norm_act/cuda.cu."""
        tile, rows, parts, lines = self._tiled(THREADS)
        batches = -(-self.rows // (rows * vectors))
        of_block = min(max(lines * batches // blocks, 1), MOST_BATCHES)
        return Plan(tile, rows, parts, -(-batches // of_block), lines, of_block)

    def small(self, vectors: int) -> Plan | None:
        """As small_shape_of() there."""
        tile = 2
        while tile > 0:
            tiled = self._tiled(tile)
            if self.rows <= tiled[1] * vectors:
                threads = THREADS
                while threads > 32 and self.rows <= threads // 2 // tiled[0]:
                    threads //= 2
                tiled = self._tiled(tile, threads)
                return Plan(*tiled[:3], 1, tiled[3], 1, threads)
            tile //= 2
        return None

    def working(self, plan: Plan) -> float:
        """Share of a block's warps that have a row."""
        return min(1.0, math.ceil(self.rows * plan.tile / 32) / plan.warps)

    def kernel(self, name: str, after: str = "") -> str:
        return f"{name}INS0_5PlaceIN3c108BFloat16ELi8ELb{int(self.by_voxel)}EEE{after}"


def _of_block(norm: Norm, plan: Plan, loops: int) -> Mapping[str, float | tuple[float, ...]]:
    """Turns of the sums over a block: `loops` at each level, first over rows and then over the parts."""
    levels = ((plan.parts * plan.tile, plan.rows * plan.tile), (plan.tile, plan.parts * plan.tile))
    warps = tuple(min(1.0, slots * norm.sums / 32 / plan.warps) for slots, _ in levels)
    turns = tuple(end / slots for slots, end in levels)
    return {
        "for (int j = threadIdx.x; j < slots * sums": warps,
        "for (int i = slot; i < end; i += step": tuple(turn for turn in turns for _ in range(loops)),
        "for (int j = threadIdx.x; j < end": 1 / plan.warps,
    }


# One channel is one group, and there is no residual.
SKIPPED = (
    "if (shape.group_channels > 1) {",
    "sum_up.template operator()<true>(place.begin(y));",
    "write.template operator()<true>(place.begin(residual));",
    "write_activated<P, size, true>(batch, place, place.row, affine, place.begin(residual), to,",
)


def _launch(
    norm: Norm,
    kernel: str,
    plan: Plan,
    moved: float,
    in_flight: float,
    trips: Mapping[str, float | tuple[float, ...]],
    working: float = 1,
    waits: float = 0,
) -> Launch:
    return Launch(
        source="norm_act",
        kernel=kernel,
        blocks=plan.blocks,
        threads=plan.threads,
        shared_bytes=0,
        trips=trips,
        skipped=SKIPPED,
        moved_bytes=moved,
        in_flight_bytes=in_flight,
        units=norm.elements / 32,
        working=working,
        waits=waits,
    )


def _combining(
    kernel: str, blocks: int, read: float, waits: float, trips: Mapping[str, float | tuple[float, ...]]
) -> Launch:
    return Launch(
        source="norm_act",
        kernel=kernel,
        blocks=blocks,
        threads=THREADS,
        shared_bytes=0,
        trips=trips,
        skipped=("if (!alone) {",),
        moved_bytes=read,
        in_flight_bytes=2 * 4 * 32,
        units=blocks * WARPS,
        waits=waits,
    )


def _turns(plan: Plan) -> Mapping[str, float | tuple[float, ...]]:
    return {"for (int from = place.row; from < place.here; from +=": plan.turns}


def norm_forward(norm: Norm) -> Configuration:
    main = 2 * norm.elements
    affine = norm.statistics + norm.parameters
    small = norm.small(SMALL_FORWARD)
    launches: Sequence[Launch]
    if small is not None:
        launches = [
            _launch(
                norm, norm.kernel("norm_small_kernel"), small, 2 * main + affine, main / small.blocks / small.warps,
                _of_block(norm, small, 2), norm.working(small), waits=2,
            )
        ]  # fmt: skip
    else:
        moments, apply = norm.plan(MOMENTS, 1024), norm.plan(APPLY, 4096)
        partial = norm.statistics * moments.chunks
        turns = math.ceil(moments.chunks / THREADS)
        launches = [
            _launch(
                norm, norm.kernel("norm_moments_kernel"), moments, main + partial, 512 * MOMENTS,
                {**_turns(moments), **_of_block(norm, moments, 2)},
            ),
            _combining(
                "norm_combine_kernelIfE", norm.images * norm.channels, partial + norm.statistics, 2,
                # Twice: what is left of four, and fours.
                {"for (int64_t i = threadIdx.x; i < count": (turns % 4, turns // 4) * 2},
            ),
            _launch(
                norm, norm.kernel("norm_apply_kernel"), apply, 2 * main + affine, 512 * APPLY, _turns(apply)
            ),
        ]  # fmt: skip
    memory = 0 if small is not None else 1
    return Configuration(
        f"norm_act forward {norm.name}",
        2 * main,
        tuple(launches),
        f"norm_act forward {norm.name}",
        HostCalls(allocations=3 + memory),  # y, mean, rstd
    )


def norm_backward(norm: Norm) -> Configuration:
    main = 2 * norm.elements
    affine = norm.statistics + norm.parameters
    small = norm.small(SMALL_BACKWARD)
    launches: Sequence[Launch]
    if small is not None:
        launches = [
            _launch(
                norm, norm.kernel("norm_small_gradient_kernel", "Lb0E"), small,
                3 * main + affine + norm.statistics,  # what parameters' gradients are summed from is left
                2 * main / small.blocks / small.warps, _of_block(norm, small, 1), norm.working(small), waits=2,
            ),
            _combining(
                "norm_parameter_gradients_kernelIffE", -(-norm.channels // THREADS),
                affine, 1,
                {"for (int64_t image = 0": (norm.images // 4, norm.images % 4)},
            ),
        ]  # fmt: skip
    else:
        sums, writing = norm.plan(GRADIENT, 1024), norm.plan(GRADIENT, 4096)
        partial = norm.statistics * sums.chunks
        launches = [
            _launch(
                norm, norm.kernel("norm_gradient_sums_kernel"), sums, 2 * main + partial + affine,
                2 * 512 * GRADIENT, {**_turns(sums), **_of_block(norm, sums, 1)},
            ),
            _combining(
                "norm_combine_gradients_kernelIffE", norm.channels,
                # Reads the deviations and weights too; leaves two numbers of a channel, and the parameters' gradients.
                partial + affine + norm.statistics + affine / 2, norm.images + 2,
                {
                    # Over the images, and in what the parameters' gradients are summed from: fours and the rest.
                    "for (int64_t image = 0": (norm.images, norm.images // 4, norm.images % 4),
                    "for (int64_t channel = begin + thread / members": 1,
                    "for (int i = member; i < shape.chunks": math.ceil(sums.chunks / THREADS),
                    "for (int64_t channel = begin + thread; channel": (0, 0, 0, 0, 1),
                },
            ),
            _launch(
                norm, norm.kernel("norm_input_gradient_kernel", "Lb0E"), writing,
                3 * main + affine + norm.statistics,
                2 * 512 * GRADIENT, _turns(writing),
            ),
        ]  # fmt: skip
    memory = 1 if small is not None else 2
    return Configuration(
        f"norm_act backward {norm.name}",
        3 * main,
        tuple(launches),
        f"norm_act backward {norm.name}",
        HostCalls(
            allocations=3 + memory + 1, checks=2
        ),  # gradients of x, weight and bias; an empty one of the residual
    )


NORMS = tuple(
    Norm(images, channels, grid, by_voxel)
    for images, channels, grid in ((2, 32, (128, 128, 128)), (2, 320, (8, 8, 8)))
    for by_voxel in (False, True)
)


def norm_configurations() -> list[Configuration]:
    return [make(norm) for norm in NORMS for make in (norm_forward, norm_backward)]
