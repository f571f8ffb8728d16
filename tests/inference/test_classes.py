"""The class of every voxel, from logits and from probabilities."""

from __future__ import annotations

import pytest
import torch

from lungkit.errors import UsageError
from lungkit.inference.classes import classes_from_logits, classes_from_probabilities, largest


def probabilities(seed: int, classes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(classes, 4, 6, 5, generator=generator)).softmax(0)


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_is_argmax_and_the_lowest_of_a_tie(classes, dtype):
    # Few values, so that many voxels have ties.
    scores = torch.randint(0, 4, (classes, 3, 4, 5), generator=torch.Generator().manual_seed(classes)).to(
        dtype
    )
    found = largest(scores)
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), torch.from_numpy(scores.float().numpy().argmax(0)))


def test_a_single_logit_is_foreground_above_zero():
    assert classes_from_logits(torch.tensor([[0.0, 0.1, -0.1]])).tolist() == [0, 1, 0]


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_without_threshold_the_most_probable_class_wins(classes):
    p = probabilities(classes, classes)
    assert torch.equal(classes_from_probabilities(p), p.argmax(0).to(torch.uint8))


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_a_threshold_is_for_all_foreground_together(classes, threshold):
    p = probabilities(classes, classes)
    found = classes_from_probabilities(p, threshold)
    is_foreground = p[1:].sum(0) >= threshold
    assert torch.equal(found > 0, is_foreground)
    assert torch.equal(found[is_foreground].long(), p[1:].argmax(0)[is_foreground] + 1)
    assert found.dtype == torch.uint8


def test_a_probability_at_the_threshold_is_foreground():
    assert classes_from_probabilities(torch.tensor([[0.75, 0.76], [0.25, 0.24]]), 0.25).tolist() == [1, 0]


def test_a_sigmoid_model_has_one_channel():
    p = torch.tensor([[0.5, 0.51, 0.3]])
    assert classes_from_probabilities(p).tolist() == [0, 1, 0]
    assert classes_from_probabilities(p, 0.3).tolist() == [1, 1, 1]


@pytest.mark.parametrize("classes", [0, 257])
def test_a_number_of_classes_that_no_mask_holds_is_refused(classes):
    for function in (classes_from_logits, classes_from_probabilities):
        with pytest.raises(UsageError, match=f"{classes} classes"):
            function(torch.zeros(classes, 1, 1, 1))
