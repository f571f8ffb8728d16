"""Lesions are numbered image by image and class by class, and come out of augmentation with their number."""

from __future__ import annotations

import torch

from lungkit.data import AugmentConfig, Augmenter
from lungkit.training.lesion_numbers import number_lesions, split_lesion_numbers


def test_components_of_each_class_and_image_have_their_own_number() -> None:
    labels = torch.zeros(2, 4, 5, dtype=torch.uint8)
    labels[0, 0, 0] = labels[0, 1, 1] = 1  # joined over a corner
    labels[0, 1, 2] = 2  # beside it, of another class
    labels[0, 3, 4] = 1
    labels[1, 2, 2], labels[1, 0] = 1, 255
    back, lesions = split_lesion_numbers(number_lesions(labels))
    assert torch.equal(back, labels) and back.dtype == torch.uint8
    assert lesions[0, 0, 0] == lesions[0, 1, 1]
    assert sorted(set(lesions[0].flatten().tolist())) == [0, 1, 2, 3]
    assert lesions[1, 2, 2] == 1 and not lesions[1, 0].any()


def test_lesions_of_a_volume_are_joined_over_corners() -> None:
    labels = torch.zeros(1, 3, 3, 3, dtype=torch.uint8)
    labels[0, 0, 0, 0] = labels[0, 1, 1, 1] = 1
    _, lesions = split_lesion_numbers(number_lesions(labels))
    assert lesions.max() == 1


def test_the_last_number_is_shared_by_what_is_over() -> None:
    labels = torch.zeros(1, 64, 64, dtype=torch.uint8)
    labels[0, ::2, ::2] = 1
    back, lesions = split_lesion_numbers(number_lesions(labels))
    assert torch.equal(back, labels)
    assert lesions.max() == 255 and (lesions == 255).sum() == 1024 - 254


def test_augmentation_moves_labels_and_numbers_alike() -> None:
    labels = torch.zeros(2, 32, 32, dtype=torch.uint8)
    labels[:, 4:12, 4:12], labels[:, 20:28, 18:30] = 1, 1
    images = torch.randn(2, 1, 32, 32)
    augment = Augmenter(AugmentConfig(), 2)
    moved, numbered = (
        augment(images, given, generator=torch.Generator().manual_seed(3))[1]
        for given in (labels, number_lesions(labels))
    )
    back, lesions = split_lesion_numbers(numbered)
    assert torch.equal(back, moved) and not torch.equal(moved, labels)
    assert torch.equal(lesions > 0, moved > 0) and lesions.max() == 2
