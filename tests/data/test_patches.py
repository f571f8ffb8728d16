"""Patch sampling: what is drawn, from where, and that it depends on nothing but seed and index."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lungkit.data import (
    CaseCache,
    fingerprint_dataset,
    open_dataset,
    plan_preprocessing,
    write_phantom_dataset,
)
from lungkit.data.patches import PatchSampler
from lungkit.errors import DataError, UsageError


@dataclass
class StoredCase:
    """The attributes of a CachedCase that the sampler reads."""

    case_id: str
    image: np.ndarray
    label: np.ndarray
    slope: float = 0.01
    intercept: float = -1.0
    foreground: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.foreground = np.argwhere((self.label > 0) & (self.label < 255)).astype(np.int32)


def numbered_case(case_id: str = "case", shape: tuple[int, int, int] = (6, 30, 34), *, tumour: bool = True):
    """A case whose stored value is its flat voxel number, so that a crop tells where it came from."""
    image = np.arange(np.prod(shape), dtype=np.int16).reshape(1, *shape)
    label = np.zeros(shape, np.uint8)
    if tumour:
        label[shape[0] // 2, 10:13, 20:22] = 1
    return StoredCase(case_id, image, label)


def test_sample_is_a_pure_function_of_seed_and_index() -> None:
    cases = [numbered_case("a"), numbered_case("b")]
    forward = PatchSampler(cases, (3, 8, 8), seed=3)
    first = [forward.sample(index) for index in range(20)]
    backward = PatchSampler(cases, (3, 8, 8), seed=3)
    for index in reversed(range(20)):
        again = backward.sample(index)
        assert again.case_id == first[index].case_id
        np.testing.assert_array_equal(again.image, first[index].image)


def test_seeds_give_different_patches() -> None:
    case = numbered_case()
    starts = [[PatchSampler([case], (8, 8), seed=seed).sample(i).start for i in range(10)] for seed in (0, 1)]
    assert starts[0] != starts[1]


def test_batch_stacks_the_samples() -> None:
    sampler = PatchSampler([numbered_case()], (8, 8))
    images, labels = sampler.batch([4, 1])
    assert images.dtype == torch.float32
    assert labels.dtype == torch.uint8
    np.testing.assert_array_equal(images[1].numpy(), sampler.sample(1).image)
    np.testing.assert_array_equal(labels[0].numpy(), sampler.sample(4).label)


@pytest.mark.parametrize("patch_size", [(8, 9), (2, 8, 9)])
def test_image_is_the_normalised_crop_at_start(patch_size: tuple[int, ...]) -> None:
    case = numbered_case()
    patch = PatchSampler([case], patch_size).sample(5)
    size = (1, *patch_size) if len(patch_size) == 2 else patch_size
    window = tuple(slice(first, first + length) for first, length in zip(patch.start, size, strict=True))
    expected = case.image[(slice(None), *window)].reshape(1, *patch_size) * case.slope + case.intercept
    np.testing.assert_allclose(patch.image, expected, rtol=1e-6)
    np.testing.assert_array_equal(patch.label, case.label[window].reshape(patch_size))
    assert patch.image.dtype == np.float32


@pytest.mark.parametrize("fraction", [0.0, 0.33, 0.5, 1.0])
def test_foreground_share_of_every_window_of_indices_is_exact(fraction: float) -> None:
    sampler = PatchSampler([numbered_case()], (8, 8), foreground_fraction=fraction)
    forced = [sampler.sample(index).on_foreground for index in range(300)]
    for first in range(0, 300, 12):
        assert abs(sum(forced[first : first + 12]) - 12 * fraction) < 1
    assert abs(sum(forced) - 300 * fraction) < 1


@pytest.mark.parametrize("patch_size", [(8, 8), (2, 8, 8), (12, 40, 40)])
def test_foreground_patches_hold_foreground(patch_size: tuple[int, ...]) -> None:
    sampler = PatchSampler([numbered_case()], patch_size, foreground_fraction=1.0)
    assert all(sampler.sample(index).label.any() for index in range(100))


def test_background_patches_hold_no_foreground_where_the_case_allows_it() -> None:
    case = numbered_case(shape=(3, 40, 40))
    case.label[1, 8:32, 8:32] = 1
    options = {"foreground_fraction": 0.0, "seed": 1}
    free = PatchSampler([case], (16, 16), **options)
    clear = PatchSampler([case], (16, 16), background_fraction=1.0, **options)
    assert any(free.sample(index).label.any() for index in range(40))
    assert not any(clear.sample(index).label.any() for index in range(40))
    case.label[:] = 1
    assert clear.sample(0).label.all()


def test_background_patches_leave_the_others_as_they_were() -> None:
    cases = [numbered_case("a"), numbered_case("b")]
    plain = PatchSampler(cases, (8, 8), foreground_fraction=0.5)
    half = PatchSampler(cases, (8, 8), foreground_fraction=0.5, background_fraction=0.5)
    for index in range(30):
        first, second = plain.sample(index), half.sample(index)
        if first.on_foreground or not first.label.any():
            assert (first.case_id, first.start) == (second.case_id, second.start)


def test_chosen_voxel_falls_anywhere_in_the_patch() -> None:
    label = np.zeros((1, 60, 60), np.uint8)
    label[0, 30, 30] = 1
    case = StoredCase("one voxel", np.zeros((1, 1, 60, 60), np.int16), label)
    sampler = PatchSampler([case], (8, 8), foreground_fraction=1.0)
    places = {tuple(np.argwhere(sampler.sample(index).label)[0].tolist()) for index in range(1000)}
    assert len(places) == 64


def test_patch_stays_inside_a_larger_case() -> None:
    sampler = PatchSampler([numbered_case()], (4, 20, 20), foreground_fraction=0.5)
    for index in range(100):
        start = np.array(sampler.sample(index).start)
        assert (start >= 0).all()
        assert (start <= (2, 10, 14)).all()


@pytest.mark.parametrize("foreground_fraction", [0.0, 1.0])
def test_patches_lie_along_the_border_as_often_as_they_would_hang_over_it(foreground_fraction: float) -> None:
    label = np.zeros((1, 60, 60), np.uint8)
    label[0, 30, 30] = 1
    case = StoredCase("middle", np.zeros((1, 1, 60, 60), np.int16), label)
    sampler = PatchSampler([case], (40, 40), foreground_fraction=foreground_fraction)
    starts = np.array([sampler.sample(index).start[1:] for index in range(2000)])
    # Of 60 middles 21 are too near to the beginning or just fit; of 40 positions that hold voxel 30, 10.
    low, high = (21 / 60, 20 / 60) if foreground_fraction == 0 else (10 / 40, 11 / 40)
    assert np.mean(starts == 0) == pytest.approx(low, abs=0.03)
    assert np.mean(starts == 20) == pytest.approx(high, abs=0.03)
    assert set(starts.ravel().tolist()) == set(range(21))


def test_slices_are_drawn_from_the_whole_stack() -> None:
    sampler = PatchSampler([numbered_case()], (8, 8), foreground_fraction=0.0)
    assert {sampler.sample(index).start[0] for index in range(100)} == set(range(6))


def test_small_case_is_padded_with_its_minimum_and_the_pad_label() -> None:
    case = numbered_case(shape=(1, 14, 24))
    case.image += 100
    patch = PatchSampler([case], (32, 32), foreground_fraction=1.0, pad_label=255).sample(0)
    inside = np.zeros((32, 32), bool)
    inside[-patch.start[1] : 14 - patch.start[1], -patch.start[2] : 24 - patch.start[2]] = True
    np.testing.assert_allclose(patch.image[0][~inside], 100 * case.slope + case.intercept)
    assert (patch.label[~inside] == 255).all()
    stored = case.image.ravel() * case.slope + case.intercept
    np.testing.assert_allclose(patch.image[0][inside], stored, rtol=1e-6)


def test_small_case_moves_inside_the_patch() -> None:
    sampler = PatchSampler([numbered_case(shape=(1, 14, 24))], (32, 32))
    starts = {sampler.sample(index).start[1:] for index in range(200)}
    assert {y for y, _ in starts} == set(range(-18, 1))
    assert {x for _, x in starts} == set(range(-8, 1))


def test_cases_are_drawn_uniformly_and_forced_patches_from_cases_with_foreground() -> None:
    cases = [numbered_case("a"), numbered_case("b"), numbered_case("healthy", tumour=False)]
    sampler = PatchSampler(cases, (8, 8), foreground_fraction=0.5)
    patches = [sampler.sample(index) for index in range(1200)]
    forced = [patch.case_id for patch in patches if patch.on_foreground]
    free = [patch.case_id for patch in patches if not patch.on_foreground]
    assert set(forced) == {"a", "b"}
    for case_id in ("a", "b", "healthy"):
        assert abs(free.count(case_id) / len(free) - 1 / 3) < 0.07


def test_only_the_patch_is_read() -> None:
    class Recorder(np.ndarray):
        largest = 0

        def __getitem__(self, key):
            part = super().__getitem__(key)
            Recorder.largest = max(Recorder.largest, np.asarray(part).size)
            return part

    case = numbered_case()
    case.image = case.image.view(Recorder)
    PatchSampler([case], (2, 8, 8)).batch(range(10))
    assert 0 < Recorder.largest <= 2 * 8 * 8


def test_changing_a_patch_leaves_the_case_alone() -> None:
    case = numbered_case()
    before = case.label.copy()
    PatchSampler([case], (6, 30, 34)).sample(0).label[:] = 7
    np.testing.assert_array_equal(case.label, before)


def test_fold_without_foreground_is_named() -> None:
    with pytest.raises(DataError, match=r"healthy_1.*foreground_fraction"):
        PatchSampler([numbered_case("healthy_1", tumour=False)], (8, 8))


def test_fold_without_foreground_serves_free_patches() -> None:
    sampler = PatchSampler([numbered_case(tumour=False)], (8, 8), foreground_fraction=0.0)
    assert not sampler.sample(0).label.any()


def test_empty_fold_is_refused() -> None:
    with pytest.raises(DataError, match="no case"):
        PatchSampler([], (8, 8))


def test_differing_channels_are_refused() -> None:
    two = numbered_case("two")
    two.image = np.concatenate([two.image, two.image])
    with pytest.raises(DataError, match="two has 2 channels"):
        PatchSampler([numbered_case("one"), two], (8, 8))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"patch_size": (8,)}, "patch_size"),
        ({"patch_size": (8, 0)}, "patch_size"),
        ({"background_fraction": -0.5}, "background_fraction is -0.5"),
        ({"foreground_fraction": 1.5}, "foreground_fraction"),
        ({"seed": -1}, "seed"),
        ({"pad_label": 300}, "pad_label"),
    ],
)
def test_bad_option_is_named(options: dict, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        PatchSampler([numbered_case()], **{"patch_size": (8, 8), **options})


def test_negative_index_is_refused() -> None:
    with pytest.raises(UsageError, match="index"):
        PatchSampler([numbered_case()], (8, 8)).sample(-1)


def test_empty_batch_is_refused() -> None:
    with pytest.raises(UsageError, match="indices"):
        PatchSampler([numbered_case()], (8, 8)).batch([])


def test_cached_cases_of_a_dataset_are_served(tmp_path: Path) -> None:
    root = write_phantom_dataset(tmp_path / "raw", cases=2, shape=(6, 40, 48), dims=3)
    dataset = open_dataset(root)
    fingerprint = fingerprint_dataset(dataset, [case.case_id for case in dataset.cases])
    preprocessing = plan_preprocessing(fingerprint, window="lung", spacing_mm="native")
    cases = CaseCache(tmp_path / "cache", dataset, preprocessing).prepare_all(
        ["phantom_0000", "phantom_0001"]
    )
    sampler = PatchSampler(cases, (8, 32, 32), foreground_fraction=1.0, seed=1)
    images, labels = sampler.batch(range(4))
    assert images.shape == (4, 1, 8, 32, 32)
    assert bool(labels.flatten(1).any(dim=1).all())
    patch, case = sampler.sample(2), {case.case_id: case for case in cases}[sampler.sample(2).case_id]
    z, y, x = patch.start  # eight slices of a case of six: it lies at -z inside the patch
    inside = case.image_float()[:, :, y : y + 32, x : x + 32]
    np.testing.assert_allclose(patch.image[:, -z : 6 - z], inside, atol=1e-6)
    again = PatchSampler(pickle.loads(pickle.dumps(cases)), (8, 32, 32), foreground_fraction=1.0, seed=1)
    np.testing.assert_array_equal(again.sample(2).image, patch.image)


def stack_of_slices():
    image = np.arange(4, dtype=np.int16).reshape(1, 4, 1, 1) * np.ones((1, 4, 16, 16), np.int16)
    label = np.zeros((4, 16, 16), np.uint8)
    label[:, 5, 6] = 1
    foreground = np.argwhere(label).astype(np.int32)
    return SimpleNamespace(
        case_id="a", image=image, label=label, foreground=foreground, slope=1.0, intercept=0.0
    )


def test_context_slices_are_channels_and_repeat_at_the_ends():
    sampler = PatchSampler([stack_of_slices()], (8, 8), context_slices=1)
    for index in range(20):
        patch = sampler.sample(index)
        z = patch.start[0]
        assert patch.image.shape == (3, 8, 8)
        assert patch.image[:, 0, 0].tolist() == [max(z - 1, 0), z, min(z + 1, 3)]


def test_context_slices_change_neither_place_nor_label():
    plain = PatchSampler([stack_of_slices()], (8, 8))
    context = PatchSampler([stack_of_slices()], (8, 8), context_slices=2)
    for index in range(10):
        a, b = plain.sample(index), context.sample(index)
        assert a.start == b.start
        assert np.array_equal(a.label, b.label)
        assert np.array_equal(a.image[0], b.image[2])


@pytest.mark.parametrize(("patch_size", "context"), [((8, 8), -1), ((2, 8, 8), 1)])
def test_context_slices_that_do_not_fit_are_refused(patch_size, context):
    with pytest.raises(UsageError, match="context_slices"):
        PatchSampler([stack_of_slices()], patch_size, context_slices=context)
