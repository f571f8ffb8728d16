"""Agreement with readers: what is computed from votes equals what the readers' own masks give."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lungkit.errors import UsageError
from lungkit.metrics.agreement import agreement_metrics, pairwise_dice


@pytest.fixture
def masks() -> np.ndarray:
    """Masks of four readers, (4, Z, Y, X)."""
    random = np.random.default_rng(0)
    return random.random((4, 5, 6, 7)) < random.random((1, 5, 6, 7))


def pooled(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    both = sum(int((a & b).sum()) for a, b in pairs)
    return 2 * both / sum(int(a.sum() + b.sum()) for a, b in pairs)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_levels_are_those_of_the_readers_masks(masks, level):
    votes, prediction = masks.sum(0), masks[0] | masks[3]
    found = agreement_metrics(prediction, votes, np.full(votes.shape, 4))[str(level)]
    target = votes >= level
    assert found["dice"] == pytest.approx(pooled([(prediction, target)]))
    assert found["readers_dice"] == pytest.approx(pooled([(mask, target) for mask in masks]))
    others = [(mask, votes - mask >= level) for mask in masks]
    assert found["other_readers_dice"] == pytest.approx(pooled(others))


def test_the_consensus_is_the_mask_that_was_given(masks):
    votes, consensus = masks.sum(0), masks[1]
    found = agreement_metrics(masks[0], votes, np.full(votes.shape, 4), consensus)["labels"]
    assert found["dice"] == pytest.approx(pooled([(masks[0], consensus)]))
    assert found["readers_dice"] == pytest.approx(pooled([(mask, consensus) for mask in masks]))
    assert math.isnan(found["other_readers_dice"])


def test_pairs_of_readers(masks):
    votes = masks.sum(0)
    expected = pooled(list(itertools.combinations(masks, 2)))
    assert pairwise_dice(votes, np.full(votes.shape, 4)) == pytest.approx(expected)


def test_voxels_that_nobody_has_read_do_not_count(masks):
    votes, readings = masks.sum(0), np.full(masks.shape[1:], 4)
    kept = agreement_metrics(masks[0][:3], votes[:3], readings[:3], masks[1][:3])
    votes[3:], readings[3:] = 0, 0
    found = agreement_metrics(masks[0], votes, readings, masks[1])
    assert found.keys() == kept.keys()
    for level, values in kept.items():
        assert found[level] == pytest.approx(values, nan_ok=True)


def test_a_target_without_a_voxel_is_undefined():
    votes = np.array([0, 1, 1, 0])
    found = agreement_metrics(votes > 0, votes, np.full(4, 3), votes > 2)
    assert math.isnan(found["2"]["dice"]) and math.isnan(found["labels"]["readers_dice"])
    assert found["1"]["dice"] == 1
    assert math.isnan(pairwise_dice(np.zeros(3, int), np.full(3, 2)))


@pytest.mark.parametrize(
    ("votes", "readings", "message"),
    [
        (np.array([2, 0]), np.array([1, 1]), "must not exceed"),
        (np.zeros(3, int), np.ones(2, int), "one shape"),
    ],
)
def test_what_does_not_fit_is_named(votes, readings, message):
    with pytest.raises(UsageError, match=message):
        agreement_metrics(votes > 0, votes, readings)
