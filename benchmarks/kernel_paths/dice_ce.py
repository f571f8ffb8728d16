"""dice_ce of two to four classes: sums of chunks, one block that finishes the loss, and the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .declarations import TYPES, Configuration, HostCalls, Launch

THREADS = 128
RUN_VOXELS = 32  # of a thread, before its terms move on
CHUNKS = {2: 1024, 3: 768, 4: 640}
FINISH_WARPS = 32
HEADLINE = (192, 192, 192)  # what kernel_times.py times


@dataclass(frozen=True)
class Loss:
    """Sizes of a loss under a softmax, whose labels are class indices all of which count."""

    images: int
    classes: int
    grid: tuple[int, ...]
    logits: str = "bfloat16"
    labels: str = "uint8"
    by_voxel: bool = False

    @property
    def of_image(self) -> int:
        return math.prod(self.grid)

    @property
    def voxels(self) -> int:
        return self.images * self.of_image

    @property
    def plain(self) -> bool:
        return self.labels == "uint8"

    @property
    def group(self) -> int:
        """Voxels of a thread at a time: one access of 16 bytes a class."""
        return 16 // TYPES[self.logits].bytes

    @property
    def chunk(self) -> int:
        step = THREADS * self.group
        wanted = -(-self.of_image // max(1, CHUNKS[self.classes] // self.images))
        return min(max(-(-wanted // step) * step, THREADS * RUN_VOXELS), 8 * THREADS * RUN_VOXELS)

    @property
    def chunks(self) -> int:
        return -(-self.of_image // self.chunk)

    @property
    def logit_bytes(self) -> int:
        return self.voxels * self.classes * TYPES[self.logits].bytes

    @property
    def label_bytes(self) -> int:
        return self.voxels * TYPES[self.labels].bytes

    @property
    def in_flight(self) -> int:
        """Of a warp: one group of every lane."""
        return 32 * (16 * self.classes + self.group * TYPES[self.labels].bytes)

    @property
    def sums(self) -> int:
        """That a chunk leaves."""
        return 5 * self.classes + 1

    @property
    def label(self) -> str:
        shape = "x".join(map(str, (self.images, self.classes, *self.grid)))
        return f"{shape} {self.logits} {self.labels}"

    @property
    def name(self) -> str:
        return self.label + (", channels-last" if self.by_voxel else "")

    def timed_as(self, mode: str) -> str | None:
        return f"dice_ce {mode} {self.label}" if self.grid == HEADLINE else None

    def kernel(self, name: str) -> str:
        access = 2 if self.by_voxel else 0
        return (
            f"{name}I{TYPES[self.logits].mangled}Li{self.classes}ELNS1_6AccessE{access}ELb{int(self.plain)}EE"
        )

    def skipped(self) -> Sequence[str]:
        """Of labels other than uint8 these are int64: the other types, and what a mask would need."""
        if self.plain:
            return ()
        return (
            "case ScalarType::Short: return body(int16_t",
            "case ScalarType::Int: return body(int32_t",
            "default: return body(uint8_t{})",
            "if (mask != nullptr) {",
        )


def loss_forward(loss: Loss) -> Configuration:
    groups = loss.chunk / (THREADS * loss.group)  # of a thread
    runs = math.ceil(groups * loss.group / RUN_VOXELS)
    blocks = loss.images * loss.chunks
    left = 4 * blocks * loss.sums
    sums = Launch(
        source="dice_ce",
        kernel=loss.kernel("few_class_sums"),
        blocks=blocks,
        threads=THREADS,
        shared_bytes=0,
        trips={
            "for (int v = Reader::first(); v < reader.count;) {": runs,
            "for (int group = 0; group < groups && v < reader.count": loss.of_image
            / loss.chunks
            / (THREADS * loss.group)
            / runs,
        },
        skipped=loss.skipped(),
        moved_bytes=loss.logit_bytes + loss.label_bytes + left,
        loaded_bytes=loss.logit_bytes + loss.label_bytes,
        stored_bytes=left,
        in_flight_bytes=loss.in_flight,
        units=loss.voxels / 32,
    )
    results = 4 * (1 + 6 * loss.images * loss.classes)  # the loss and its slopes
    working = min(1.0, loss.images * loss.sums / FINISH_WARPS)  # a sum a warp, and one warp has the loss
    finish = Launch(
        source="dice_ce",
        kernel="finish_lossIfNS1_4WarpEE",
        blocks=1,
        threads=32 * FINISH_WARPS,
        shared_bytes=0,
        trips={
            "for (int first = threadIdx.x % 32; first < chunks": math.ceil(loss.chunks / 512),
            "for (int output = threadIdx.x / 32; output < outputs": math.ceil(
                loss.images * loss.sums / FINISH_WARPS
            ),
            "for (Index b = group; b < group + images_a_group": 1,
            "for (int distance = first_distance; distance > 0": math.ceil(
                math.log2(loss.images * loss.classes)
            ),
            # The compiler made loops of their own for kinds of cross-entropy and of weights: the longest are priced.
            "for (Index row = first_row, column = first_column": (0, 1, 1, 0, 1, 0, 0),
        },
        skipped=(),
        moved_bytes=left + results,
        loaded_bytes=left,
        stored_bytes=results,
        in_flight_bytes=16 * 4 * 32,
        units=FINISH_WARPS * working,
        working=working,
        waits=1,
    )
    return Configuration(
        f"dice_ce forward {loss.name}",
        loss.logit_bytes + loss.label_bytes,
        (sums, finish),
        loss.timed_as("forward"),
        HostCalls(allocations=3),  # sums of chunks, loss, slopes
    )


def loss_backward(loss: Loss) -> Configuration:
    chunk = THREADS * RUN_VOXELS
    chunks = -(-loss.of_image // chunk)
    moved = 2 * loss.logit_bytes + loss.label_bytes
    gradient = Launch(
        source="dice_ce",
        kernel=loss.kernel("few_class_gradient"),
        blocks=loss.images * chunks,
        threads=THREADS,
        shared_bytes=0,
        trips={
            "for (int v = Reader::first(); v < reader.count; v += Reader::step": loss.of_image
            / chunks
            / (THREADS * loss.group)
        },
        skipped=loss.skipped(),
        moved_bytes=moved + 4 * 4 * loss.images * loss.classes,  # and the slopes of a softmax
        stored_bytes=loss.logit_bytes,
        in_flight_bytes=loss.in_flight,
        units=loss.voxels / 32,
    )
    return Configuration(
        f"dice_ce backward {loss.name}",
        moved,
        (gradient,),
        loss.timed_as("backward"),
        HostCalls(allocations=1, checks=1),
    )


LOSSES = (
    *(Loss(2, classes, HEADLINE, logits) for classes in (2, 3, 4) for logits in ("bfloat16", "float32")),
    Loss(2, 2, (96, 96, 96)),
    Loss(2, 2, (128, 128, 128)),
    *(Loss(2, classes, (128, 128, 128), labels="int64") for classes in (2, 3)),
    *(Loss(2, classes, (128, 128, 128), by_voxel=True) for classes in (2, 3)),
)


def loss_configurations() -> list[Configuration]:
    return [make(loss) for loss in LOSSES for make in (loss_forward, loss_backward)]
