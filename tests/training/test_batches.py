from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lungkit.data import PatchSampler
from lungkit.training.batches import Batches, augment_generator, seed_of_step


@pytest.fixture
def sampler():
    random = np.random.default_rng(0)
    label = np.zeros((3, 20, 20), np.uint8)
    label[1, 5:9, 5:9] = 1
    case = SimpleNamespace(
        case_id="a",
        image=random.integers(-100, 100, (1, 3, 20, 20)).astype(np.int16),
        label=label,
        foreground=np.argwhere(label).astype(np.int32),
        slope=0.01,
        intercept=0.0,
    )
    return PatchSampler([case], (8, 8))


def collect(sampler, **options):
    with Batches(sampler, **{"batch_size": 2, "first_step": 0, "last_step": 6, **options}) as batches:
        return {step: images for step, images, _ in batches}


def test_a_batch_depends_on_its_step_alone(sampler):
    whole, tail = collect(sampler), collect(sampler, first_step=4)
    assert list(tail) == [4, 5]
    assert all(torch.equal(tail[step], whole[step]) for step in tail)


def test_processes_share_one_global_batch(sampler):
    whole = collect(sampler, batch_size=4, last_step=2)
    parts = [collect(sampler, batch_size=2, last_step=2, rank=rank, world_size=2) for rank in (0, 1)]
    for step, images in whole.items():
        assert torch.equal(torch.cat([part[step] for part in parts]), images)


def test_labels_are_prepared_before_a_batch_is_handed_out(sampler):
    with Batches(
        sampler, batch_size=2, first_step=0, last_step=3, prepare_labels=lambda labels: labels + 7
    ) as batches:
        assert all(int(labels.min()) == 7 for _, _, labels in batches)


def test_an_error_of_the_thread_reaches_the_loop(sampler):
    def broken(indices):
        raise OSError("the cache is gone")

    sampler.batch = broken
    with pytest.raises(OSError, match="the cache is gone"):
        collect(sampler)


def test_leaving_early_ends_the_thread(sampler):
    with Batches(sampler, batch_size=2, first_step=0, last_step=1000) as batches:
        next(iter(batches))
    assert not batches._thread.is_alive()


def test_waiting_is_counted(sampler, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("lungkit.training.batches.time.perf_counter", lambda: float(next(clock)))
    with Batches(sampler, batch_size=2, first_step=0, last_step=3) as batches:
        list(batches)
    assert batches.waited == 3.0


def test_seeds_differ_between_runs_steps_and_processes():
    seeds = {seed_of_step(seed, step, rank) for seed in range(5) for step in range(50) for rank in range(4)}
    assert len(seeds) == 5 * 50 * 4


def test_the_generator_of_a_step_repeats():
    first, second = (torch.rand(3, generator=augment_generator(1, 2, 0)) for _ in range(2))
    assert torch.equal(first, second)
