"""Sliding window: what a patch-wise pass gives back of a direct one, and label maps of volumes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lungkit.data.slices import BufferedSlices, TensorSlices
from lungkit.errors import UsageError
from lungkit.inference import patch_starts, predict_label, sliding_window, stream_logits

SHAPES = [
    ((17, 23), (8, 8)),
    ((5, 40), (8, 16)),  # smaller than the patch along one axis
    ((9, 17, 23), (4, 8, 8)),
    ((3, 5, 7), (4, 8, 8)),  # smaller along every axis
    ((9, 17, 23), (1, 8, 8)),
    ((8, 8, 8), (8, 8, 8)),
]


def pointwise(patches: Tensor) -> Tensor:
    return torch.cat([patches.sin(), patches * 2], 1)


def image_of(shape: tuple[int, ...], channels: int = 1) -> Tensor:
    return torch.randn(channels, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("shape", "patch"), SHAPES)
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("weighting", ["gaussian", "constant"])
def test_pointwise_network_is_reproduced_to_the_rounding_of_float32(
    shape: tuple[int, ...], patch: tuple[int, ...], overlap: float, weighting: Any
) -> None:
    image = image_of(shape)
    stitched = sliding_window(pointwise, image, patch, overlap=overlap, weighting=weighting)
    torch.testing.assert_close(stitched, pointwise(image[None])[0], rtol=1e-5, atol=1e-6)


def test_single_patch_is_passed_through_bit_for_bit() -> None:
    image = image_of((8, 8, 8))
    assert torch.equal(sliding_window(pointwise, image, (8, 8, 8)), pointwise(image[None])[0])


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_batch_size_changes_nothing(batch_size: int) -> None:
    def blur(patches: Tensor) -> Tensor:
        return patches - patches.mean((2, 3, 4), keepdim=True)

    image = image_of((9, 17, 23))
    one = sliding_window(blur, image, (4, 8, 8), batch_size=1)
    assert torch.equal(one, sliding_window(blur, image, (4, 8, 8), batch_size=batch_size))


def test_convolution_away_from_the_patch_borders_matches_a_direct_pass() -> None:
    torch.manual_seed(0)
    network = nn.Conv2d(1, 2, 3, padding=1)
    image = image_of((40, 40))
    stitched = sliding_window(network, image, (24, 24), overlap=0.75)
    direct = network(image[None])[0].detach()
    # A patch's border weighs exp(-8) of its centre, so that its zero padding leaves next to nothing.
    torch.testing.assert_close(stitched[:, 2:-2, 2:-2], direct[:, 2:-2, 2:-2], rtol=0, atol=1e-2)


@pytest.mark.parametrize("weighting", ["gaussian", "constant"])
def test_where_every_patch_sees_the_whole_receptive_field_a_direct_pass_is_reproduced(weighting: Any) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.LeakyReLU(), nn.Conv2d(4, 2, 3, padding=1))
    image, radius, patch = image_of((50, 50)), 2, 24
    stitched = sliding_window(network, image, (patch, patch), overlap=0.25, weighting=weighting)
    direct = network(image[None])[0].detach()
    sees_all = torch.ones(50, dtype=torch.bool)
    for start in patch_starts(50, patch, overlap=0.25):
        first, last = start if start == 0 else start + radius, start + patch
        last -= 0 if last == 50 else radius
        sees_all[start:first] = sees_all[last : start + patch] = False
    valid = sees_all[:, None] & sees_all[None]
    assert 0.3 < valid.float().mean() < 1
    torch.testing.assert_close(stitched[:, valid], direct[:, valid], rtol=0, atol=1e-5)
    assert (stitched - direct).abs().max() > 1e-3  # elsewhere it is not


def test_two_patches_are_weighted_by_their_gaussians() -> None:
    calls = iter([0.0, 1.0])

    def constant(patches: Tensor) -> Tensor:
        return torch.full_like(patches, next(calls))

    logits = sliding_window(constant, torch.zeros(1, 1, 6), (1, 4), batch_size=1)[0, 0]
    near, far = (torch.exp(torch.tensor(-0.5 * (offset / 0.5) ** 2)) for offset in (0.5, 1.5))
    expected = torch.stack(
        [far * 0, far * 0, far / (near + far), near / (near + far), near / near, near / near]
    )
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(("shape", "patch"), SHAPES)
def test_slabs_cover_the_first_axis_in_order(shape: tuple[int, ...], patch: tuple[int, ...]) -> None:
    slabs = [
        (first, last, slab.shape) for first, last, slab in stream_logits(pointwise, image_of(shape), patch)
    ]
    assert [first for first, _, _ in slabs] == [0, *(last for _, last, _ in slabs[:-1])]
    assert slabs[-1][1] == shape[0]
    assert all(size == (2, last - first, *shape[1:]) for first, last, size in slabs)


def test_padding_is_the_smallest_value_of_each_channel() -> None:
    seen = []

    def spy(patches: Tensor) -> Tensor:
        seen.append(patches)
        return patches

    image = torch.stack([torch.full((2, 2), 3.0), torch.full((2, 2), -5.0)])
    sliding_window(spy, image, (4, 4))
    assert seen[0][0, 0].unique().tolist() == [3.0]
    assert seen[0][0, 1].unique().tolist() == [-5.0]


def test_training_mode_comes_back_for_every_module() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(nn.Dropout(0.5)), nn.BatchNorm2d(2))
    network[2].eval()
    modes = []
    network.register_forward_hook(lambda module, *_: modes.append(module[1][0].training))
    sliding_window(network, image_of((8, 8)), (4, 4))
    assert not any(modes)
    assert [m.training for m in network.modules()] == [True, True, True, True, False]


def test_no_gradient_is_recorded() -> None:
    assert not sliding_window(nn.Conv2d(1, 2, 1), image_of((8, 8)), (4, 4)).requires_grad


def test_deep_supervision_outputs_take_the_first() -> None:
    image = image_of((8, 8))
    logits = sliding_window(lambda x: (pointwise(x), x[..., ::2]), image, (4, 4))
    torch.testing.assert_close(logits, pointwise(image[None])[0])


def test_progress_ends_at_the_total() -> None:
    steps: list[tuple[int, int]] = []
    sliding_window(pointwise, image_of((17, 23)), (8, 8), progress=lambda *step: steps.append(step))
    assert steps[-1][0] == steps[-1][1] == len(patch_starts(17, 8)) * len(patch_starts(23, 8))


def test_half_precision_logits_are_added_up_in_float32() -> None:
    logits = sliding_window(lambda x: x.to(torch.float16), image_of((8, 8)), (4, 4))
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": (4,)}, "2 entries"),
        ({"overlap": 1.0}, "overlap"),
        ({"batch_size": 0}, "batch_size"),
        ({"weighting": "none"}, "weighting"),
        ({"image": torch.zeros(1, 0, 8)}, "empty"),
        ({"image": torch.zeros(8, 8)}, r"\(C, Y, X\)"),
        ({"image": torch.zeros(1, 8, 8, dtype=torch.int16)}, "int16"),
        ({"network": lambda x: x[..., ::2]}, "logits"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    arguments = {"network": pointwise, "image": torch.zeros(1, 8, 8), "patch_size": (4, 4), **options}
    network, image, patch = (arguments.pop(name) for name in ("network", "image", "patch_size"))
    with pytest.raises(UsageError, match=message):
        sliding_window(network, image, patch, **arguments)


def sign(patches: Tensor) -> Tensor:
    return torch.cat([-patches, patches], 1)


def volume_of(*shape: int) -> Tensor:
    return image_of(shape)


@pytest.mark.parametrize("patch", [(8, 8), (32, 32), (4, 8, 8), (16, 32, 32)])
def test_classes_of_a_pointwise_network(patch: tuple[int, ...]) -> None:
    image = volume_of(6, 17, 23)
    label = predict_label(sign, image, patch)
    assert label.dtype == torch.uint8
    assert torch.equal(label, (image[0] > 0).to(torch.uint8))


def test_two_dimensional_network_sees_slices() -> None:
    shapes = []

    def spy(patches: Tensor) -> Tensor:
        shapes.append(tuple(patches.shape))
        return sign(patches)

    predict_label(spy, volume_of(5, 16, 16), (16, 16), batch_size=3)
    assert shapes == [(3, 1, 16, 16), (2, 1, 16, 16)]


def test_whole_slices_are_not_cut() -> None:
    shapes = []

    def spy(patches: Tensor) -> Tensor:
        shapes.append(tuple(patches.shape))
        return sign(patches)

    predict_label(spy, volume_of(2, 20, 24), (20, 24))
    assert shapes == [(2, 1, 20, 24)]


def test_one_channel_is_a_sigmoid_model() -> None:
    label = predict_label(lambda x: x, torch.tensor([[[[-1.0, 0.0, 2.0]]]]), (1, 4))
    assert label.tolist() == [[[0, 0, 1]]]


def test_network_in_training_mode_predicts_without_dropout() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Dropout(0.9)).train()
    first, second = (predict_label(network, volume_of(2, 8, 8), (8, 8)) for _ in range(2))
    assert torch.equal(first, second)
    assert network.training


def test_a_network_with_context_sees_the_slices_that_it_was_trained_on():
    image = torch.randn(1, 5, 8, 8)

    def above_is_brighter(x):
        return torch.stack([x[:, 1], x[:, 2]], dim=1)  # this slice against the one above it

    label = predict_label(above_is_brighter, image, (8, 8), context_slices=1)
    above = torch.cat([image[0, 1:], image[0, -1:]])
    assert torch.equal(label, (above > image[0]).to(torch.uint8))


def test_context_is_refused_for_a_3d_network():
    with pytest.raises(UsageError, match="context_slices"):
        predict_label(lambda x: x, torch.zeros(1, 4, 8, 8), (4, 8, 8), context_slices=1)


def test_a_volume_read_by_slices_has_the_label_of_the_tensor() -> None:
    image = volume_of(9, 17, 23)
    slices = BufferedSlices(TensorSlices(image))
    for patch in ((4, 8, 8), (16, 8, 8), (8, 8)):
        assert torch.equal(predict_label(sign, slices, patch), predict_label(sign, image, patch))


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (image_of((8, 8)), {"patch_size": (8, 8)}, r"\(C, Z, Y, X\)"),
        (volume_of(2, 8, 8), {"patch_size": (8,)}, "patch_size"),
        (volume_of(2, 8, 8), {"patch_size": (8, 8), "context_slices": -1}, "context_slices"),
        (volume_of(2, 8, 8), {"patch_size": (2, 8, 8), "context_slices": 1}, "context_slices"),
    ],
)
def test_bad_arguments_of_a_label_are_named(image: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        predict_label(sign, image, **options)
