"""Label maps and attention maps of a volume, from 2D and 3D networks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from lungkit.errors import UsageError
from lungkit.inference import attention_map, predict_case


def sign(patches: Tensor) -> Tensor:
    return torch.cat([-patches, patches], 1)


def image_of(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


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
        (lambda: attention_map(attending, image_of(2, 8, 8), (8, 8), 2), "slice_index"),
        (lambda: attention_map(attending, image_of(2, 8, 8), (8, 8), 0, level=2), "level"),
    ],
)
def test_bad_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
