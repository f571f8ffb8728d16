"""Inputs, tolerances and the comparison with the twin in the tests of dice_ce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lungkit.ops.dice_ce import dice_ce_loss, dice_ce_statistics, reference, reference_statistics

LOGIT_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INDEX_DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64]

# What the statistics may differ by, relative to their size, and gradients relative to the largest one. The logits are
# compared as they are after rounding to their dtype, so only the gradient's own rounding is left in half types.
STATISTICS_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


class Form(NamedTuple):
    """How the statistics are computed: options of ``dice_ce_statistics``."""

    activation: str = "softmax"
    cross_entropy: str = "softmax"
    squared: bool = False
    gamma: float = 0.0
    minimum: bool = False


FORMS = [
    Form(),
    Form(squared=True),
    Form(cross_entropy="none"),
    Form(cross_entropy="binary", squared=True),
    Form(gamma=2.0),
    Form(gamma=1.5),
    Form("sigmoid", "softmax"),
    Form("sigmoid", "binary"),
    Form("sigmoid", "binary", gamma=2.0),
    Form("sigmoid", "none", squared=True),
    Form("none", "softmax", gamma=2.0),
    Form("none", "binary", squared=True),
    Form(minimum=True),
    Form("sigmoid", "binary", gamma=2.0, minimum=True),
    Form("none", "none", minimum=True),
]
ONE_CHANNEL_FORMS = [form for form in FORMS if "softmax" not in (form.activation, form.cross_entropy)]

# (batch, *spatial), classes: one voxel; odd sizes; 1D, 2D, 3D; more than a tile, more than a chunk; many classes
CASES = [
    ((1, 1), 2),
    ((2, 5, 7), 2),
    ((2, 16), 1),
    ((3, 2, 3, 5), 3),
    ((1, 4, 8, 8), 4),
    ((1, 65, 67), 5),
    ((2, 41, 801), 2),
    ((1, 20, 33), 130),
    ((1, 7, 11), 300),
]
# Few classes in whole 16-byte packs take CUDA kernels of their own; 13 x 11 voxels do not.
PACKED_CASES = [(shape, classes) for shape in ((2, 8, 24), (1, 13, 11)) for classes in (2, 3, 4, 5)]
# nnU-Net's loss, and every option at once
NNUNET = {"include_background": False, "batch": True}
ALL_OPTIONS = {
    "ignore_index": 1,
    "jaccard": True,
    "reduction": "sum",
    "smooth_nr": 1e-3,
    "smooth_dr": 1e-2,
    "lambda_dice": 0.7,
    "lambda_ce": 0.3,
    "label_smoothing": 0.2,
}


def random_logits(shape: tuple[int, ...], classes: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape[0], classes, *shape[1:], generator=generator)).to(dtype)


def random_indices(shape: tuple[int, ...], classes: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, max(classes, 2), shape, generator=generator).to(dtype)


def random_vectors(shape: tuple[int, ...], classes: int, dtype: torch.dtype, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape[0], classes, *shape[1:], generator=generator).to(dtype)


def assert_matches_twin(
    logits: Tensor,
    labels: Tensor,
    form: Form,
    *,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
) -> None:
    """Statistics and their gradient, with random slopes, against the twin in fp64."""
    z = logits.detach().requires_grad_()
    statistics = dice_ce_statistics(z, labels, mask=mask, ignore_index=ignore_index, **form._asdict())
    slopes = torch.randn(statistics.shape, generator=torch.Generator().manual_seed(3)).to(statistics)
    (gradient,) = torch.autograd.grad(statistics, z, slopes)
    expected, expected_gradient = twin_in_double(logits, labels, form, slopes, mask, ignore_index)
    assert gradient.dtype == logits.dtype
    assert gradient.shape == logits.shape
    # Without an activation the sums have terms of both signs: what they lose is relative to the sum of sizes.
    size = expected.abs() + (logits[0, 0].numel() if form.activation == "none" else 0.0)
    error = ((statistics.detach().double() - expected).abs() / size.clamp_min(1.0)).max().item()
    assert error <= STATISTICS_TOLERANCE[logits.dtype], f"statistics differ by {error:.1e}"
    largest = expected_gradient.abs().max().clamp_min(1e-3)
    error = ((gradient.double() - expected_gradient).abs().max() / largest).item()
    assert error <= GRADIENT_TOLERANCE[logits.dtype], f"gradients differ by {error:.1e}"


def assert_loss_matches_twin(logits: Tensor, labels: Tensor, **options: Any) -> None:
    """The finished loss and its gradient against the twin in the logits' dtype."""
    found, expected = (loss(logits, labels, **options) for loss in (dice_ce_loss, reference))
    torch.testing.assert_close(found, expected)
    found, expected = (gradient_of(loss, logits, labels, **options) for loss in (dice_ce_loss, reference))
    torch.testing.assert_close(found, expected)


def statistics_and_gradient(
    logits: Tensor, labels: Tensor, mask: Tensor | None, form: Form
) -> tuple[Tensor, Tensor]:
    """The statistics, and the gradient of their sum."""
    z = logits.detach().requires_grad_()
    statistics = dice_ce_statistics(z, labels, mask=mask, **form._asdict())
    return statistics.detach(), torch.autograd.grad(statistics.sum(), z)[0]


def twin_in_double(
    logits: Tensor,
    labels: Tensor,
    form: Form,
    slopes: Tensor,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Statistics of the twin in fp64, and the gradient of ``(slopes * statistics).sum()``."""
    z = logits.detach().double().requires_grad_()
    statistics = reference_statistics(
        z,
        labels.double() if labels.is_floating_point() else labels,
        mask=mask,
        ignore_index=ignore_index,
        **form._asdict(),
    )
    (gradient,) = torch.autograd.grad((slopes.double() * statistics).sum(), z)
    return statistics.detach(), gradient


def gradient_of(loss: Callable[..., Tensor], logits: Tensor, *arguments: Tensor, **options: object) -> Tensor:
    """Gradient of ``loss(logits, *arguments, **options)`` with respect to the logits."""
    z = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z, *arguments, **options), z)
    return gradient
