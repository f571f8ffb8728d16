"""Batches drawn ahead of time by a thread; which patches they hold depends on the seed and the step alone."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import torch
from torch import Tensor

from lungkit.data import PatchSampler

_AHEAD = 4
_POLL_SECONDS = 0.1


class Batches:
    """Iterates over ``(step, images, labels)`` from ``first_step`` up to ``last_step``.

    Global batch s holds the patches s * B * W to (s + 1) * B * W - 1 of the sampler, for B patches a process and W
    processes; process r takes its B of them. ``waited`` adds up the seconds spent waiting for patches. The labels of a
    batch pass through ``prepare_labels`` first.

    Use as a context manager: the thread ends with the block.
    """

    def __init__(
        self,
        sampler: PatchSampler,
        *,
        batch_size: int,
        first_step: int,
        last_step: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        prepare_labels: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.steps = range(first_step, last_step)
        self.rank = rank
        self.world_size = world_size
        self.pin_memory = pin_memory
        self.prepare_labels = prepare_labels
        self.waited = 0.0
        self._queue: queue.Queue[tuple[int, Tensor, Tensor] | BaseException] = queue.Queue(_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="lungkit-batches", daemon=True)

    def __enter__(self) -> Batches:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        for _ in self.steps:
            started = time.perf_counter()
            item = self._queue.get()
            self.waited += time.perf_counter() - started
            if isinstance(item, BaseException):
                raise item
            yield item

    def _produce(self) -> None:
        try:
            for step in self.steps:
                first = (step * self.world_size + self.rank) * self.batch_size
                images, labels = self.sampler.batch(range(first, first + self.batch_size))
                if self.prepare_labels is not None:
                    labels = self.prepare_labels(labels)
                if self.pin_memory:
                    images, labels = images.pin_memory(), labels.pin_memory()
                if not self._put((step, images, labels)):
                    return
        except BaseException as error:  # handed to the training thread, which raises it
            self._put(error)

    def _put(self, item: tuple[int, Tensor, Tensor] | BaseException) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False


def seed_of_step(seed: int, step: int, rank: int) -> int:
    """One 63-bit seed for every (run, step, process): augmentation and dropout depend on nothing else.

    Example:
        >>> seed_of_step(0, 1, 0) != seed_of_step(0, 0, 1)
        True
    """
    # SplitMix64 (Steele, Lea and Flood 2014) of a packed counter: neighbouring steps get unrelated seeds.
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + (step << 16) + rank + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


def augment_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """CPU generator of the augmentation of one step."""
    return torch.Generator().manual_seed(seed_of_step(seed, step, rank))
