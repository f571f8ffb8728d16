"""The approximations of csrc/dice_ce/cuda_approximations.h, every instruction at its documented error: how far the
probabilities and the loss may then be off. All else is done as the kernels do it, but sums are exact."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lungkit.ops.dice_ce import reference

Single = NDArray[np.float32]
Double = NDArray[np.float64]


class Errors(NamedTuple):
    """By how many units in the last place the results of the instructions are off: at most 2 and 1."""

    exponential: int
    reciprocal: int

    def exponentials(self, x: Single) -> Single:
        """exp(x) of x <= 0: ``fast_exp_nonpositive``."""
        bounded = np.maximum(x, np.float32(-100))
        t = bounded * np.float32(1.44269504)
        r = fused(t, np.float32(-0.693147182), bounded)
        e = moved(np.exp2(t.astype(np.float64)), self.exponential)
        e[t == 0] = 1
        return fused(e, r, e)

    def reciprocals(self, x: Single) -> Single:
        return moved(1 / x.astype(np.float64), self.reciprocal)


ERRORS = [Errors(*errors) for errors in product((-2, 2), (-1, 1))]


def fused(a: Single, b: Single | np.float32, c: Single) -> Single:
    """a b + c in one rounding: the product of two fp32 numbers is exact in fp64."""
    return (a.astype(np.float64) * np.float64(b) + c).astype(np.float32)


def moved(exact: Double, units: int) -> Single:
    value = exact.astype(np.float32)
    value[np.abs(value) < np.finfo(np.float32).tiny] = 0
    for _ in range(abs(units)):
        value = np.where(value == 0, value, np.nextafter(value, np.float32(np.copysign(np.inf, units))))
    return value


def two_probabilities(errors: Errors, difference: Single) -> tuple[Single, Single, Single]:
    """exp(-|difference|), the probability of the likelier class and that of the other."""
    e = errors.exponentials(-np.abs(difference))
    likely = errors.reciprocals(e + np.float32(1))
    return e, likely, e * likely


def relative_error(found: Single, exact: Double) -> Double:
    return np.abs(found / exact - 1)


DISTANCES = np.concatenate([np.linspace(0, 2, 20001), np.linspace(2, 85, 20001)]).astype(np.float32)


@pytest.mark.parametrize("errors", ERRORS, ids=str)
def test_exponentials_keep_to_the_documented_bound(errors):
    exact = np.exp(-DISTANCES.astype(np.float64))
    error = relative_error(errors.exponentials(-DISTANCES), exact)
    assert (error <= 3.6e-7 + 2.8e-9 * DISTANCES).all()


@pytest.mark.parametrize("errors", ERRORS, ids=str)
def test_probabilities_keep_to_the_documented_bounds(errors):
    e = np.exp(-DISTANCES.astype(np.float64))
    _, likely, unlikely = two_probabilities(errors, DISTANCES)
    assert relative_error(likely, 1 / (1 + e)).max() <= 4.2e-7
    assert (relative_error(unlikely, e / (1 + e)) <= 6.6e-7 + 2.8e-9 * DISTANCES).all()


@pytest.mark.parametrize("errors", ERRORS, ids=str)
def test_an_infinite_or_huge_distance_is_zero_and_nan_is_nan(errors):
    x = np.array([-np.inf, -3e38, -1e4, -104.0, np.nan], np.float32)
    np.testing.assert_array_equal(errors.exponentials(x), np.float32([0, 0, 0, 0, np.nan]))


def two_class_loss(errors: Errors, logits: Single, labels: NDArray[np.intp]) -> float:
    difference = logits[1] - logits[0]
    e, likely, unlikely = two_probabilities(errors, difference)
    p = np.where(difference >= 0, np.stack([unlikely, likely]), np.stack([likely, unlikely]))
    against = np.where(labels == 1, np.maximum(-difference, 0), np.maximum(difference, 0))
    return loss_of(p, against, np.log1p(e.astype(np.float64)), labels)


def many_class_loss(errors: Errors, logits: Single, labels: NDArray[np.intp]) -> float:
    below = logits - logits.max(0)
    e = errors.exponentials(below)
    total = e[0]
    for each in e[1:]:
        total = total + each
    p = e * errors.reciprocals(total)
    against = -np.take_along_axis(below, labels[None], 0)[0]
    return loss_of(p, against, np.log(total.astype(np.float64)), labels)


def loss_of(p: Single, against: Single, logarithm: Double, labels: NDArray[np.intp]) -> float:
    """The default ``dice_ce_loss`` of one image."""
    y = np.arange(len(p))[:, None] == labels
    overlap, total = (p * y).sum(1, dtype=np.float64), p.sum(1, dtype=np.float64) + y.sum(1)
    dice = 1 - (2 * overlap + 1e-5) / (total + 1e-5)
    return float(dice.mean() + (against + logarithm).mean())


# Networks that know nothing, something and all but 1 % of the voxels; few and many voxels of the other classes.
@pytest.mark.parametrize("errors", ERRORS, ids=str)
@pytest.mark.parametrize(("scale", "margin"), [(0.01, 0.0), (1.0, 0.0), (3.0, 2.0), (1.0, 12.0)])
@pytest.mark.parametrize("share", [0.001, 0.3])
@pytest.mark.parametrize(
    ("classes", "loss"), [(2, two_class_loss), (3, many_class_loss), (4, many_class_loss)]
)
def test_the_loss_is_right_to_1e_6(
    classes: int, loss: Callable[..., float], share: float, scale: float, margin: float, errors: Errors
) -> None:
    generator = np.random.default_rng(0)
    labels = np.where(generator.random(20000) < share, generator.integers(1, classes, 20000), 0)
    seen = np.where(generator.random(20000) < 0.01, (labels + 1) % classes, labels)
    logits = (scale * generator.standard_normal((classes, 20000))).astype(np.float32)
    logits += (margin * (np.arange(classes)[:, None] == seen)).astype(np.float32)
    exact = reference(torch.from_numpy(logits)[None].double(), torch.from_numpy(labels)[None]).item()
    assert abs(loss(errors, logits, labels) / exact - 1) < 1e-6
