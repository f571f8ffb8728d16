"""Augmentation: what each transform does to images, that labels follow, and how randomness is drawn."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lungkit.data.augment import AugmentConfig, Augmenter
from lungkit.data.augment.config import probability_fields
from lungkit.errors import UsageError

GEOMETRY = ("rotation", "scaling", "flip", "translation", "elastic")
INTENSITY = ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma")
SHAPES = {2: (40, 48), 3: (12, 40, 48)}


def only(*transforms: str, **options) -> AugmentConfig:
    """A configuration in which the named transforms are certain and all others off."""
    certain = {f"{transform}_probability": 1.0 for transform in transforms}
    return dataclasses.replace(AugmentConfig.none(), **{**certain, **options})


def augment(config: AugmentConfig, images, labels=None, *, seed: int = 0, **options):
    labels = torch.zeros(images.shape[:1] + images.shape[2:], dtype=torch.uint8) if labels is None else labels
    augmenter = Augmenter(config, images.ndim - 2, **options)
    return augmenter(images, labels, generator=torch.Generator().manual_seed(seed))


def random_batch(dims: int = 2, *, count: int = 4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 2, *SHAPES[dims], generator=generator).to(dtype)
    labels = torch.randint(0, 3, (count, *SHAPES[dims]), generator=generator).to(torch.uint8)
    return images, labels


def marker(dims: int = 2, *, count: int = 4) -> torch.Tensor:
    """Labels of a shape without any symmetry: three boxes, of class 1, 2 and 3, off the centre."""
    labels = torch.zeros(count, *SHAPES[dims], dtype=torch.uint8)
    labels[..., 2:10, 10:22, 12:20] = 1
    labels[..., 2:6, 22:30, 12:34] = 2
    labels[..., 3:8, 12:20, 28:36] = 3
    return labels


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("config", [AugmentConfig(enabled=False), AugmentConfig.none()])
def test_nothing_drawn_is_the_exact_identity(dims: int, config: AugmentConfig) -> None:
    images, labels = random_batch(dims)
    result, result_labels = augment(config, images, labels)
    assert torch.equal(result, images)
    assert torch.equal(result_labels, labels)


@pytest.mark.parametrize("dims", [2, 3])
def test_input_is_not_changed(dims: int) -> None:
    images, labels = random_batch(dims)
    before = images.clone(), labels.clone()
    augment(only(*GEOMETRY, *INTENSITY), images, labels)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])


@pytest.mark.parametrize("dims", [2, 3])
def test_same_seed_gives_the_same_bits(dims: int) -> None:
    images, labels = random_batch(dims)
    config = only(*GEOMETRY, *INTENSITY)
    first, second = augment(config, images, labels, seed=7), augment(config, images, labels, seed=7)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], augment(config, images, labels, seed=8)[0])


def test_samples_of_a_batch_draw_independently() -> None:
    images = torch.randn(1, 1, 16, 16).expand(64, 1, 16, 16)
    result, _ = augment(only("brightness", brightness_probability=0.5), images)
    shifts = (result - images).mean(dim=(1, 2, 3))
    changed = shifts.abs() > 1e-6
    assert 16 < int(changed.sum()) < 48
    assert len(torch.unique(shifts[changed])) == int(changed.sum())


def test_one_probability_does_not_change_what_others_draw() -> None:
    images, labels = random_batch()
    _, alone = augment(only("rotation", "elastic"), images, labels)
    _, with_noise = augment(only("rotation", "elastic", "noise", "gamma"), images, labels)
    assert torch.equal(alone, with_noise)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("transforms", [*[(name,) for name in GEOMETRY], GEOMETRY])
def test_labels_stay_in_step_with_images(dims: int, transforms: tuple[str, ...]) -> None:
    labels = marker(dims)
    images = torch.stack([labels == value for value in (1, 2, 3)], dim=1).float()
    result, result_labels = augment(only(*transforms), images, labels)
    assert not torch.equal(result_labels, labels)
    for channel, value in enumerate((1, 2, 3)):
        sampled, chosen = result[:, channel], result_labels == value
        # Linear interpolation of an indicator gives its nearest neighbour at least 1/2^dims of the weight.
        assert float(sampled[chosen].min()) > 0.5**dims - 1e-3
        assert float(sampled[~chosen].max()) < 1 - 0.5**dims + 1e-3
        assert float(((sampled > 0.5) == chosen).float().mean()) > 0.99


def test_only_flips_are_exact() -> None:
    images, labels = random_batch(3, count=16)
    result, result_labels = augment(only("flip", flip_probability=0.5), images, labels)
    seen = set()
    for sample in range(16):
        fitting = [
            axes
            for axes in ((), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3))
            if torch.equal(result[sample], images[sample].flip(axes))
            and torch.equal(result_labels[sample], labels[sample].flip([axis - 1 for axis in axes]))
        ]
        assert len(fitting) == 1
        seen.update(fitting)
    assert len(seen) > 4


def test_flip_composes_with_a_warp() -> None:
    images, labels = random_batch()
    warp = {"rotation_degrees": (30.0, 30.0), "scaling_range": (1.2, 1.2)}
    both, both_labels = augment(only("rotation", "scaling", "flip", **warp), images, labels)
    after, after_labels = augment(
        only("rotation", "scaling", **warp), images.flip([2, 3]), labels.flip([1, 2])
    )
    torch.testing.assert_close(both, after, atol=1e-4, rtol=1e-4)
    assert float((both_labels == after_labels).float().mean()) > 0.999


@pytest.mark.parametrize("dims", [2, 3])
def test_rotation_by_a_right_angle_is_rot90(dims: int) -> None:
    images = torch.randn(2, 1, *(6, 24, 24)[3 - dims :])
    labels = (images[:, 0] > 0).to(torch.uint8)
    result, result_labels = augment(
        only("rotation", rotation_degrees=(90.0, 90.0), tilt_degrees=(0, 0)), images, labels
    )
    expected = torch.rot90(images, 1, (-2, -1))
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
    assert torch.equal(result_labels, torch.rot90(labels, 1, (-2, -1)))


def test_rotation_acts_in_millimetres() -> None:
    labels = torch.zeros(1, 40, 40, dtype=torch.uint8)
    labels[0, 18:22, 10:30] = 1  # 20 mm along x, 8 mm along y
    config = only("rotation", rotation_degrees=(90.0, 90.0))
    _, result = augment(config, labels[:, None].float(), labels, spacing_mm=(2.0, 1.0))
    rows, columns = result[0].nonzero(as_tuple=True)
    assert len(rows.unique()) == 10
    assert len(columns.unique()) == 8


def test_tilt_moves_slices_of_isotropic_volumes_only() -> None:
    images = torch.arange(12.0).view(1, 1, 12, 1, 1).expand(1, 1, *SHAPES[3]).contiguous()
    config = only("rotation", "elastic", rotation_degrees=(0.0, 0.0), tilt_degrees=(8.0, 8.0))
    inner = (..., slice(2, 10), slice(15, 25), slice(18, 30))
    thin, _ = augment(config, images, spacing_mm=(1.0, 1.0, 1.0))
    thick, _ = augment(config, images, spacing_mm=(5.0, 1.0, 1.0))
    assert float((thin - images)[inner].abs().max()) > 0.5
    torch.testing.assert_close(thick[inner], images[inner], atol=1e-4, rtol=0)


def test_translation_pads_with_air_and_background() -> None:
    images = torch.randn(1, 1, 40, 40) + 5.0
    labels = torch.ones(1, 40, 40, dtype=torch.uint8)
    result, result_labels = augment(only("translation", translation_fraction=(0.25, 0.25)), images, labels)
    torch.testing.assert_close(result[..., 10:, 10:], images[..., :30, :30], atol=1e-4, rtol=0)
    torch.testing.assert_close(result[..., :10, :], images.min().expand(1, 1, 10, 40), atol=1e-5, rtol=0)
    assert int(result_labels.sum()) == 30 * 30
    assert not result_labels[:, :10].any()


def test_pad_value_is_what_lies_outside() -> None:
    config = only("translation", translation_fraction=(0.5, 0.5))
    result, _ = augment(config, torch.randn(1, 1, 16, 16), pad_value=-3.0)
    torch.testing.assert_close(result[..., :8, :8], torch.full((1, 1, 8, 8), -3.0))


def test_scaling_above_one_magnifies() -> None:
    labels = torch.zeros(1, 40, 40, dtype=torch.uint8)
    labels[0, 15:25, 15:25] = 1
    _, result = augment(only("scaling", scaling_range=(2.0, 2.0)), labels[:, None].float(), labels)
    assert int(result.sum()) == 4 * int(labels.sum())


@pytest.mark.parametrize("dims", [2, 3])
def test_elastic_displacement_is_bounded_and_smooth(dims: int) -> None:
    shape = SHAPES[dims]
    ramps = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in shape), indexing="ij"))[None]
    config = only("elastic", elastic_displacement=(3.0, 3.0), elastic_spacing=10.0)
    result, _ = augment(config, ramps)
    inner = (..., *(slice(4, n - 4) for n in shape))
    moved = (result - ramps)[inner]
    assert 0.5 < float(moved.abs().max()) <= 3.0
    for axis in range(dims):
        assert float(moved.diff(dim=axis + 2).abs().max()) < 1.0  # neighbours never swap


def test_elastic_without_displacement_is_the_identity() -> None:
    images, labels = random_batch()
    result, result_labels = augment(only("elastic", elastic_displacement=(0.0, 0.0)), images, labels)
    torch.testing.assert_close(result, images, atol=1e-3, rtol=0)
    assert torch.equal(result_labels, labels)


@pytest.mark.parametrize("transform", INTENSITY)
def test_intensity_transforms_change_images_and_leave_labels(transform: str) -> None:
    images, labels = random_batch()
    result, result_labels = augment(only(transform), images, labels)
    assert all(not torch.equal(result[sample], images[sample]) for sample in range(len(images)))
    assert torch.equal(result_labels, labels)


def test_noise_has_the_drawn_standard_deviation() -> None:
    result, _ = augment(only("noise", noise_std=(0.3, 0.3)), torch.zeros(2, 1, 128, 128))
    assert abs(float(result.std()) - 0.3) < 0.01
    assert abs(float(result.mean())) < 0.01


def test_blur_spreads_a_point_by_sigma_and_keeps_its_mass() -> None:
    images = torch.zeros(1, 1, 41, 41)
    images[..., 20, 20] = 1.0
    result, _ = augment(only("blur", blur_sigma=(2.0, 2.0)), images)
    offset = (torch.arange(41.0) - 20) ** 2
    assert abs(float(result.sum()) - 1.0) < 1e-5
    for axis in (2, 3):
        profile = result.sum(dim=axis)[0, 0]
        assert abs(float((profile * offset).sum()) ** 0.5 - 2.0) < 0.05


def test_blur_acts_in_millimetres() -> None:
    images = torch.zeros(1, 1, 21, 41)
    images[..., 10, 20] = 1.0
    result, _ = augment(only("blur", blur_sigma=(2.0, 2.0)), images, spacing_mm=(2.0, 1.0))
    for axis, sigma in ((2, 1.0), (3, 2.0)):
        profile = result.sum(dim=5 - axis)[0, 0]
        offset = (torch.arange(len(profile)) - len(profile) // 2) ** 2
        assert abs(float((profile * offset).sum()) ** 0.5 - sigma) < 0.05


def test_blur_keeps_a_constant_image() -> None:
    images = torch.full((2, 1, 16, 16), 3.0)
    torch.testing.assert_close(augment(only("blur"), images)[0], images)


def test_brightness_adds_its_shift() -> None:
    images, _ = random_batch()
    result, _ = augment(only("brightness", brightness_shift=(0.15, 0.15)), images)
    torch.testing.assert_close(result, images + 0.15)


def test_contrast_stretches_about_the_mean_within_the_old_range() -> None:
    images, _ = random_batch()
    result, _ = augment(only("contrast", contrast_factor=(1.2, 1.2)), images)
    mean = images.mean(dim=(2, 3), keepdim=True)
    expected = ((images - mean) * 1.2 + mean).clamp(
        images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    )
    torch.testing.assert_close(result, expected)


def test_gamma_keeps_range_and_order() -> None:
    images, _ = random_batch()
    result, _ = augment(only("gamma", gamma_range=(2.0, 2.0)), images)
    torch.testing.assert_close(result.amax(dim=(2, 3)), images.amax(dim=(2, 3)))
    torch.testing.assert_close(result.amin(dim=(2, 3)), images.amin(dim=(2, 3)))
    assert torch.equal(result.flatten(2).argsort(dim=2), images.flatten(2).argsort(dim=2))
    assert float(result.mean()) < float(images.mean())


def test_gamma_keeps_a_constant_image() -> None:
    images = torch.full((1, 1, 8, 8), -1.5)
    assert torch.equal(augment(only("gamma"), images)[0], images)


def test_low_resolution_removes_fine_detail_and_keeps_coarse() -> None:
    fine = torch.randn(1, 1, 64, 64)
    coarse = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    config = only("low_resolution", low_resolution_scale=(0.5, 0.5))
    assert float(augment(config, fine)[0].std()) < 0.6 * float(fine.std())
    torch.testing.assert_close(augment(config, coarse)[0], coarse, atol=0.02, rtol=0)


def test_low_resolution_keeps_thick_slices() -> None:
    images = torch.randn(1, 1, 8, 1, 1).expand(1, 1, 8, 16, 16).contiguous()
    result, _ = augment(only("low_resolution"), images, spacing_mm=(5.0, 1.0, 1.0))
    torch.testing.assert_close(result, images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int64])
def test_types_and_shapes_are_kept(dtype: torch.dtype, label_dtype: torch.dtype) -> None:
    images, labels = random_batch(dtype=dtype)
    labels = labels.to(label_dtype)
    result, result_labels = augment(only(*GEOMETRY, *INTENSITY), images, labels)
    assert (result.dtype, result.shape) == (dtype, images.shape)
    assert (result_labels.dtype, result_labels.shape) == (label_dtype, labels.shape)
    assert bool(result.isfinite().all())


def test_no_label_value_is_invented() -> None:
    labels = marker() * 85  # 0, 85, 170 and the ignore label 255
    _, result = augment(only(*GEOMETRY), labels[:, None].float(), labels)
    assert set(result.unique().tolist()) == {0, 85, 170, 255}


def test_empty_batch_is_returned() -> None:
    images = torch.zeros(0, 1, 8, 8)
    assert augment(AugmentConfig(), images)[0].shape == images.shape


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_parameters_are_the_same_on_a_cuda_device() -> None:
    images, labels = random_batch(3)
    config = only(*GEOMETRY, *(set(INTENSITY) - {"noise"}))
    expected, expected_labels = augment(config, images, labels)
    result, result_labels = augment(config, images.cuda(), labels.cuda())
    torch.testing.assert_close(result.cpu(), expected, atol=2e-3, rtol=1e-3)
    assert float((result_labels.cpu() == expected_labels).float().mean()) > 0.999


@pytest.mark.parametrize(
    "options",
    [
        {"noise_probability": -0.1},
        {"gamma_probability": float("nan")},
        {"rotation_degrees": (10.0, -10.0)},
        {"scaling_range": (0.0, 1.0)},
        {"blur_sigma": (-1.0, 1.0)},
        {"low_resolution_scale": (0.5, 1.5)},
        {"elastic_spacing": 0.0},
        {"elastic_displacement": (0.0, 20.0)},
        {"noise_std": 0.1},
        {"noise_std": (0.0, float("inf"))},
    ],
)
def test_bad_configuration_names_the_field(options: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        AugmentConfig(**options)


def test_configuration_survives_json() -> None:
    config = AugmentConfig(noise_std=(0.0, 0.4), enabled=False)
    assert AugmentConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_every_transform_has_a_probability() -> None:
    assert {name.removesuffix("_probability") for name in probability_fields()} == {*GEOMETRY, *INTENSITY}


@pytest.mark.parametrize(
    ("images", "labels", "named"),
    [
        (torch.zeros(1, 8, 8), torch.zeros(1, 8, 8).byte(), "images"),
        (torch.zeros(1, 1, 8, 8).int(), torch.zeros(1, 8, 8).byte(), "images"),
        (torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8).byte(), "labels"),
        (torch.zeros(1, 1, 8, 8), torch.zeros(1, 8, 8), "labels"),
    ],
)
def test_wrong_tensors_are_named(images: torch.Tensor, labels: torch.Tensor, named: str) -> None:
    with pytest.raises(UsageError, match=f"^{named}"):
        Augmenter(AugmentConfig(), 2)(images, labels)


@pytest.mark.parametrize(("dims", "spacing"), [(4, None), (2, (1.0,)), (3, (1.0, 1.0, 0.0))])
def test_wrong_geometry_is_refused(dims: int, spacing: tuple[float, ...] | None) -> None:
    with pytest.raises(UsageError, match=r"dims|spacing_mm"):
        Augmenter(AugmentConfig(), dims, spacing_mm=spacing)
