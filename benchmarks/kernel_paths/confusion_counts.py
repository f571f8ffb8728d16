"""confusion_counts of class indices of one byte, or of logits against them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .declarations import TYPES, Configuration, HostCalls, Launch

THREADS = 256
GROUP = 8  # voxels of a thread at a time


@dataclass(frozen=True)
class Counts:
    """Sizes of two masks of uint8, or of logits against one."""

    images: int
    classes: int
    grid: tuple[int, ...]
    logits: str | None = None

    @property
    def voxels(self) -> int:
        return self.images * math.prod(self.grid)

    @property
    def guess_bytes(self) -> int:
        """Of a voxel's prediction."""
        return 1 if self.logits is None else self.classes * TYPES[self.logits].bytes

    @property
    def name(self) -> str:
        shape = "x".join(map(str, (self.images, *self.grid)))
        guess = "uint8" if self.logits is None else f"{self.logits} logits, uint8"
        return f"{shape} {self.classes} classes {guess}"

    @property
    def timed_as(self) -> str | None:
        timed = self.logits is None and self.classes == 4
        return (
            f"confusion_counts forward {'x'.join(map(str, (self.images, *self.grid)))} uint8"
            if timed
            else None
        )


def counts_forward(counts: Counts) -> Configuration:
    of_image = math.prod(counts.grid)
    per_image = min(-(-of_image // (THREADS * GROUP)), max(128, 1024 // counts.images))
    counted = 3 * counts.classes + 1  # numbers of an image, of 8 bytes, to which blocks add
    kind = 0 if counts.classes == 2 else 1 if counts.logits is not None else 2
    guess = "v" if counts.logits is None else TYPES[counts.logits].mangled
    skipped = [
        "if (++groups == 255 / group_voxels",  # every 31 turns, of eight here
        "if (++groups == most_groups) finish(add);",  # every 127
        "words[k / 4] |= (group.has(k)",
        "atomicAdd(&image_counts[k], Count{count});",
        "if (!group.whole) {",
        "for (int k = 0; k < group_voxels; ++k, from += group.between * stride) {",
        "case ScalarType::Short: return load(int16_t",
        "case ScalarType::Int: return load(int32_t",
        "case ScalarType::Long: return load(int64_t",
    ]
    if kind == 0 and counts.logits is None:  # four voxels at a time, as bytes of a word
        skipped += [
            "load_codes(view.labels, view.label_type",
            "load_codes(view.pred, view.pred_type",
            "counter.see(guesses[k], labels[k], add);",
        ]
    launch = Launch(
        source="confusion_counts",
        kernel=f"confusion_counts_kernelI{guess}LNS0_7ClassesE{kind}EE",
        blocks=per_image * counts.images,
        threads=THREADS,
        shared_bytes=4 * counted,
        trips={
            "for (int k = threadIdx.x; k < local_size": (1 / 8, 0),
            "for (int64_t first = blockIdx.x * int64_t{block_voxels}": of_image
            / per_image
            / (THREADS * GROUP),
            "for (int c = 1; c < static_cast<int>(layout.channels)": counts.classes - 1
            if counts.logits
            else 0,
            "for (int k = threadIdx.x; k < width": (1 / 8, 0),
        },
        skipped=skipped,
        moved_bytes=counts.voxels * (1 + counts.guess_bytes) + 2 * 8 * counts.images * counted,
        in_flight_bytes=32 * GROUP * (1 + (1 if counts.logits is None else TYPES[counts.logits].bytes)),
        units=counts.voxels / 32,
    )
    return Configuration(
        f"confusion_counts {counts.name}",
        launch.moved_bytes,
        (launch,),
        counts.timed_as,
        HostCalls(allocations=2, fills=2),
    )


COUNTS = (
    Counts(2, 4, (256, 256, 256)),
    Counts(2, 2, (256, 256, 256)),
    Counts(2, 2, (128, 128, 128), "bfloat16"),
)


def counts_configurations() -> list[Configuration]:
    return [counts_forward(counts) for counts in COUNTS]
