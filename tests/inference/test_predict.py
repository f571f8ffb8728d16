"""Label maps and attention maps of a volume, from 2D and 3D networks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lungkit.errors import UsageError
from lungkit.inference import attention_map, predict_case, predict_label


def sign(patches: Tensor) -> Tensor:
    return torch.cat([-patches, patches], 1)


def image_of(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("patch", [(8, 8), (32, 32), (4, 8, 8), (16, 32, 32)])
def test_classes_of_a_pointwise_network(patch: tuple[int, ...]) -> None:
    image = image_of(6, 17, 23)
    label = predict_label(sign, image, patch)
    assert label.dtype == torch.uint8
    assert torch.equal(label, (image[0] > 0).to(torch.uint8))


def test_two_dimensional_network_sees_slices() -> None:
    shapes = []

    def spy(patches: Tensor) -> Tensor:
        shapes.append(tuple(patches.shape))
        return sign(patches)

    predict_label(spy, image_of(5, 16, 16), (16, 16), batch_size=3)
    assert shapes == [(3, 1, 16, 16), (2, 1, 16, 16)]


def test_whole_slices_are_not_cut() -> None:
    shapes = []

    def spy(patches: Tensor) -> Tensor:
        shapes.append(tuple(patches.shape))
        return sign(patches)

    predict_label(spy, image_of(2, 20, 24), (16, 16), whole_slices=True)
    assert shapes == [(2, 1, 20, 24)]


def test_one_channel_is_a_sigmoid_model() -> None:
    label = predict_label(lambda x: x, torch.tensor([[[[-1.0, 0.0, 2.0]]]]), (1, 4))
    assert label.tolist() == [[[0, 0, 1]]]


def test_network_in_training_mode_predicts_without_dropout() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Dropout(0.9)).train()
    first, second = (predict_label(network, image_of(2, 8, 8), (8, 8)) for _ in range(2))
    assert torch.equal(first, second)
    assert network.training


def test_case_gives_its_label_map() -> None:
    case = SimpleNamespace(image_float=lambda: image_of(3, 8, 8).numpy())
    label = predict_case(sign, case, (8, 8))
    assert isinstance(label, np.ndarray)
    assert np.array_equal(label, image_of(3, 8, 8)[0].numpy() > 0)


def attending(patches: Tensor, return_attention: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
    coarse = patches[(..., *(slice(None, None, 2),) * (patches.dim() - 2))]
    return patches, (torch.sigmoid(coarse), torch.sigmoid(patches))


@pytest.mark.parametrize("patch", [(8, 8), (32, 32), (4, 8, 8), (16, 32, 32)])
@pytest.mark.parametrize("slice_index", [0, 3, 5])
def test_attention_map_is_that_of_the_slice(patch: tuple[int, ...], slice_index: int) -> None:
    image = image_of(6, 17, 23)
    alpha = attention_map(attending, image, patch, slice_index)
    torch.testing.assert_close(alpha, torch.sigmoid(image[0, slice_index]))


def test_coarser_gate_is_interpolated_to_full_resolution() -> None:
    alpha = attention_map(attending, image_of(2, 16, 16), (16, 16), 0, level=1)
    assert alpha.shape == (16, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: predict_label(sign, image_of(8, 8), (8, 8)), r"\(C, Z, Y, X\)"),
        (lambda: predict_label(sign, image_of(2, 8, 8), (8,)), "patch_size"),
        (lambda: predict_label(sign, image_of(2, 8, 8), (2, 8, 8), whole_slices=True), "whole_slices"),
        (lambda: attention_map(attending, image_of(2, 8, 8), (8, 8), 2), "slice_index"),
        (lambda: attention_map(attending, image_of(2, 8, 8), (8, 8), 0, level=2), "level"),
    ],
)
def test_bad_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


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
